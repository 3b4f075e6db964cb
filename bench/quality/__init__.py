"""What a model's answers are worth: code that runs, sums that come out, choices, text, paths."""

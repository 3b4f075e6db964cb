"""`tandem bench peers`: one checkpoint, the same prompts and threads, ourselves and others in turns."""

"""`make bench-gpu`: the engine on a GPU beside transformers, without a service."""

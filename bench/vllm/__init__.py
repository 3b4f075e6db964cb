"""vLLM as a peer, in the Python that has it."""

"""`tandem bench goodput`: the largest rate within limits, of the whole service and of vLLM's server."""

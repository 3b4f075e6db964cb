"""Load tests of a running service, over gRPC or HTTP."""

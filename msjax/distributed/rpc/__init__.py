"""gRPC between organisations: the protocol, the servicers, security."""

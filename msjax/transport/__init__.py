"""gRPC between the parties; no maths. See split.proto for what is said, `server` and `client` for the two ends."""

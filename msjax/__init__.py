"""Split learning in JAX with compressed feature maps."""

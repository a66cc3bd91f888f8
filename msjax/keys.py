"""Random keys that are the same on every machine, whatever JAX's default there is."""

import jax

KEY_IMPL = "threefry2x32"
"""How keys are made. With "rbg" what is drawn under `vmap` depends on all that is in it, and so on how clients are
grouped over devices; and parties with other defaults would begin with other weights."""


def make_key(seed: int) -> jax.Array:
    """Returns the key of a seed."""
    return jax.random.key(seed, impl=KEY_IMPL)

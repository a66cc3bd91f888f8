"""Arithmetic that makes no NaN and no Inf of finite numbers, nor any on the way, which `jax_debug_nans` would find."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

LARGE, DOWN = 2.0**100, 2.0**-32
"""From where on numbers are made smaller before they are subtracted or multiplied by a code, and by how much."""


def lowered(x: Float32[Array, "..."], is_large: Bool[Array, "..."]) -> Float32[Array, "..."]:
    """Returns `x` or, where numbers are large, `x` · `DOWN`: a power of two, so nothing is rounded otherwise.

    A choice, not a factor that may be 1: that XLA might move to where it changes what is rounded.
    """
    return jnp.where(is_large, x * jnp.float32(DOWN), x)


def raised(x: Float32[Array, "..."], is_large: Bool[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Returns the inverse of `lowered` in `dtype`, clamped to its largest numbers."""
    most = jnp.where(is_large, jnp.float32(largest(dtype) * DOWN), jnp.float32(largest(dtype)))
    x = jnp.clip(x, -most, most)
    up = jnp.where(is_large, x, jnp.float32(0)) * jnp.float32(1 / DOWN)
    return jnp.where(is_large, up, x).astype(dtype)


def largest(dtype: Any) -> np.float32:
    """Returns the largest finite number of a floating dtype."""
    return np.float32(jnp.finfo(dtype).max)


def product(values: Float[Array, "..."], factor: Float32[Array, ""], dtype: Any) -> Float[Array, "..."]:
    """Returns `values` · `factor` ≥ 0 in `dtype`, at most its largest number where the value is finite.

    One of the two must be at most 2^31, as counts and float16 are.
    """
    given = values.astype(jnp.float32)
    finite = jnp.isfinite(given)  # of `isnan` and `isfinite` alone no Inf is made
    values = jnp.where(finite, given, jnp.float32(0))
    is_large = (jnp.abs(values) > 1) & (factor > 1)
    product = raised(lowered(values, is_large) * factor, is_large, dtype)
    other = jnp.where(finite, jnp.float32(0), given) * factor
    return jnp.where(finite, product, other.astype(dtype))


def unless(is_finite: Bool[Array, ""], otherwise: Callable[[], Any], usual: Any) -> Any:
    """`usual` or, where not all is finite, `otherwise()`, computed then alone.

    A loop of one turn at most. A condition takes both of its branches under `vmap`, where `shard_map` refuses it, too.
    """

    def turn(state):
        return state[0] & ~state[0], otherwise()

    return lax.while_loop(lambda state: state[0], turn, (~is_finite, usual))[1]


def nan_where(is_nan: Bool[Array, "..."], x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`x`, and one NaN where `is_nan`: by its bits, so that there is none where none comes out."""
    bits = jnp.where(is_nan, jnp.uint32(0x7FC00000), lax.bitcast_convert_type(x, jnp.uint32))
    return lax.bitcast_convert_type(bits, jnp.float32)

"""Which k of d values are the largest: exactly k, ties settled by position.

Values are ranked by `score`: NaN above +Inf, and −0 equal to +0, so that every input has one answer. The selection is
`lax.top_k`'s.
"""

from fractions import Fraction

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32


def num_kept(ratio: float, d: int) -> int:
    """k = ⌊(1 − ratio)·d⌋, at least 1 unless d = 0; `ratio` is read as the decimal it prints as.

    In binary (1 − 0.9)·10 is just under 1, so the decimal is what a user means. The paper allows k = 0, where no
    threshold exists and its program fails; one value is kept here, so that a small array never decodes to nothing but
    zeros.
    """
    return min(d, max(1, int((1 - Fraction(str(float(ratio)))) * d)))


def score(x: Float[Array, "d"], *, by_magnitude: bool) -> Float32[Array, "d"]:
    """What `x` is ranked by: its value or magnitude in float32, with one NaN and one zero."""
    x = x.astype(jnp.float32)
    x = jnp.abs(x) if by_magnitude else jnp.where(x == 0, jnp.float32(0), x)
    return jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), x)


def top_positions(score: Float32[Array, "d"], k: int) -> Int32[Array, "k"]:
    """Positions of the k largest scores, ascending; among equals the first ones."""
    return jnp.sort(lax.top_k(score, k)[1])


def top_mask(score: Float32[Array, "d"], k: int) -> tuple[Float32[Array, ""], Bool[Array, "d"]]:
    """(the k-th largest score, which k scores are kept), k ≥ 1; the mask of `top_positions`, without a scatter."""
    # Behind a barrier: XLA turns a top-k of which only the last value is used into a full sort, sixteen times slower.
    # Swapped, since a barrier right behind the pair aborts XLA's compiler where it does decompose the top-k.
    values, indices = lax.top_k(score, k)
    indices, values = lax.optimization_barrier((indices, values))
    order, kth = _order(score), _order(values[-1])
    # Equal scores come in the order of their positions, so the last index is that of the last tie that is kept.
    tied = (order == kth) & (lax.iota(jnp.int32, score.size) <= indices[-1])
    return values[-1], (order > kth) | tied


def positions(mask: Bool[Array, "d"], k: int) -> Int32[Array, "k"]:
    """Positions of the k true entries of `mask`, ascending."""
    return jnp.nonzero(mask, size=k, fill_value=mask.shape[0])[0].astype(jnp.int32)


def _order(score):
    """Unsigned integers in the same order as the scores, NaN last."""
    bits = lax.bitcast_convert_type(score, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

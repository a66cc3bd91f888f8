"""The paper's bounds on the squared compression error, (31)–(33) of arXiv 2408.13787, for non-negative features."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from msjax.compress import _select
from msjax.compress._options import check_bits, check_ratio


def uniform_error_bound(h: Float[Array, "..."], bits: int) -> Float32[Array, ""]:
    """Returns (31), √d/(2^bits − 1) · ‖h‖²: at least ‖h − ĥ‖² of `Uniform(bits)` where no h is below 0."""
    check_bits(bits)
    return _norm2(h) * jnp.float32(h.size**0.5 / (2**bits - 1))


def topk_error_bound(h: Float[Array, "..."], ratio: float) -> Float32[Array, ""]:
    """Returns (32), (d − k)/d · ‖h‖²: at least ‖h − ĥ‖² of `TopK(ratio)`."""
    check_ratio(ratio)
    k = _select.num_kept(ratio, h.size)
    return _norm2(h) * jnp.float32((h.size - k) / max(h.size, 1))


@functools.partial(jax.jit, static_argnames=("ratio", "bits"))
def mask_encoded_error_bound(h: Float[Array, "..."], ratio: float, bits: int) -> Float32[Array, ""]:
    """Returns (33), α·√(d − k)/(2^bits − 1) · ‖h‖²: at least ‖h − ĥ‖² of `MaskEncoded(ratio, bits)`, either rounding.

    For h of which none is below 0, and with `signed=True` for all. α = ‖the values that are not kept‖ / ‖h‖. It follows
    from |error| ≤ min(x, τ/(2^bits − 1)), Cauchy–Schwarz and τ ≤ ‖h‖.
    """
    check_ratio(ratio)
    check_bits(bits)
    if h.size == 0:
        return jnp.float32(0)
    x = h.reshape(h.size).astype(jnp.float32)
    k = _select.num_kept(ratio, x.size)
    kept = _select.select(x, k, by_magnitude=True).positions
    dropped = jnp.sqrt(_norm2(_select.put(x, kept, jnp.zeros(k, x.dtype))))
    return dropped * jnp.sqrt(_norm2(x)) * jnp.float32((x.size - k) ** 0.5 / (2**bits - 1))


def _norm2(h):
    return jnp.sum(jnp.square(h.astype(jnp.float32)))

"""QU, uniform min–max quantization, rounded to nearest or at random."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.compress import _bits, _finite, _numpy, _random, _select
from msjax.compress._arrays import shaped
from msjax.compress._options import check_bits
from msjax.compress._vector_codec import VectorCodec


class UniformPayload(NamedTuple):
    codes: jax.Array
    """uint8 (⌈d·bits/8⌉,) packed codes, least significant bits first."""
    low: jax.Array
    """float32 () the value of code 0: the smallest of the input."""
    high: jax.Array
    """float32 () the value of code 2^bits − 1: the largest."""


@dataclasses.dataclass(frozen=True, repr=False)
class Uniform(VectorCodec):
    """QU: every value to the nearest of 2^bits levels, evenly spaced from the smallest value to the largest.

    Payload: ⌈d·bits/8⌉ bytes, and 8 for the two ends, which the paper does not count. Arithmetic is float32; the
    result has the input's dtype.

    A constant array is exact. NaN or ±Inf anywhere make everything decode to NaN. Bias: biased; the error of a value is
    at most half a step, (max − min)/(2^bits − 1)/2. Squared error: `uniform_error_bound`. Source: arXiv 2408.13787,
    section 3.

    >>> import jax.numpy as jnp
    >>> Uniform(bits=1).roundtrip(jnp.array([0.0, 0.2, 0.9, 1.0]))
    Array([0., 0., 1., 1.], dtype=float32)
    """

    bits: int = 3

    def __post_init__(self):
        super().__post_init__()
        check_bits(self.bits)

    @property
    def _top(self) -> int:
        return 2**self.bits - 1

    def _vector_like(self, d, dtype):
        return UniformPayload(shaped(_bits.packed_bytes(d, self.bits)), *[shaped((), jnp.float32)] * 2)

    def _round(self, steps, key):
        return jnp.round(steps)

    def _lowered(self, *x):
        """Arrays, of which the last two are the ends, and whether they are large."""
        is_large = jnp.maximum(jnp.abs(x[-2]), jnp.abs(x[-1])) > _finite.LARGE
        return *(_finite.lowered(part, is_large) for part in x), is_large

    def _quantize(self, x, key):
        """(codes as float32, smallest, largest) of the vector `x`."""
        if x.size == 0:
            return x.astype(jnp.float32), jnp.float32(0), jnp.float32(0)
        x = x.astype(jnp.float32)
        low, high = (jnp.where(end == 0, jnp.float32(0), end) for end in _select.ends(x))  # not −0
        x, start, end, _ = self._lowered(x, low, high)
        above = x - start
        # A divisor a value, also since XLA would multiply by the inverse of one for all, and round otherwise.
        steps = above * jnp.float32(self._top) / jnp.where(above > 0, end - start, jnp.float32(1))
        # A comparison, so that NaN becomes code 0; the decoder sees NaN in the ends.
        return jnp.where(steps > 0, jnp.minimum(self._round(steps, key), jnp.float32(self._top)), 0), low, high

    def _levels(self, codes, low, high, dtype):
        low, high, is_large = self._lowered(low, high)
        spread = high - low
        # At most the spread, which rounding may exceed. Without this choice LLVM would fuse the product with the sum in
        # some programs and not in others.
        above = jnp.minimum(codes * (spread * jnp.float32(1 / self._top)), spread)
        return _finite.raised(low + above, is_large, dtype)

    def _encode_vector(self, x, key):
        codes, low, high = self._quantize(x, key)
        return UniformPayload(_bits.pack(codes.astype(jnp.uint8), self.bits), low, high)

    def _encode_vector_numpy(self, x):
        if x.size == 0:
            return UniformPayload(np.zeros(0, np.uint8), np.zeros((), np.float32), np.zeros((), np.float32))
        low, high = (np.asarray(end.astype(np.float32) + np.float32(0)) for end in (x.min(), x.max()))  # not −0
        top, scale = np.float32(self._top), _numpy.scale(max(abs(low), abs(high)))
        spread = high * scale - low * scale
        codes = np.zeros(x.size, np.uint8)
        for piece in _numpy.pieces(x.size):
            steps = (x[piece].astype(np.float32) * scale - low * scale) * top / spread
            codes[piece] = _numpy.to_codes(steps, self._top)
        return UniformPayload(_numpy.pack(codes, self.bits), low, high)

    def _decode_vector(self, payload, like):
        codes = _bits.unpack(payload.codes, self.bits, like.size).astype(jnp.float32)
        return self._levels(codes, payload.low, payload.high, like.dtype)

    def _roundtrip_vector(self, x, key):
        return self._levels(*self._quantize(x, key), x.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class StochasticUniform(Uniform):
    """Uniform min–max quantization, rounded up with the probability that makes the mean right.

    Levels, payload and corners are those of `Uniform`; needs a key. Unbiased: the mean over keys is `h` (to the
    rounding of float32 and of h's dtype); the variance of a value is at most a quarter of a squared step. Values are
    rounded independently, except that each 32 neighbours share the lower bits of their random numbers: the variance of
    a mean grows by at most an eighth. Source: the rounding of QSGD, arXiv 1610.02132.

    >>> import jax, jax.numpy as jnp
    >>> h = jnp.array([0.0, 0.25, 1.0])
    >>> keys = jax.random.split(jax.random.key(0), 4000)
    >>> mean = jax.vmap(lambda key: StochasticUniform(bits=1).roundtrip(h, key))(keys).mean(0)
    >>> bool(jnp.abs(mean - h).max() < 0.03)
    True
    """

    needs_key: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    def _round(self, steps, key):
        low = jnp.floor(steps)
        # steps − low is exact, so a value on a level stays there.
        return low + (_random.uniform(key, steps.size) < steps - low).astype(jnp.float32)

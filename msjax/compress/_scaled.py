"""What quantizers to fixed levels share: values divided by their largest magnitude, codes of the nearest levels."""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.compress import _bits, _finite, _numpy, _select
from msjax.compress._arrays import shaped
from msjax.compress._vector_codec import VectorCodec


class ScaledPayload(NamedTuple):
    codes: jax.Array
    """uint8 (⌈d·b/8⌉,) packed codes of b bits, least significant bits first."""
    scale: jax.Array
    """float32 () the largest magnitude of the input; NaN where it is not finite."""


@dataclasses.dataclass(frozen=True, repr=False)
class ScaledCodec(VectorCodec):
    """Each value becomes the code of a level in [−1, 1] times the largest magnitude; both ends know the levels."""

    @property
    @abc.abstractmethod
    def _width(self) -> int:
        """Bits of a code."""

    @abc.abstractmethod
    def _levels(self) -> np.ndarray:
        """float32 (2^_width,): what each code stands for, where the largest magnitude is 1."""

    @abc.abstractmethod
    def _quantize(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """uint8 codes of float32 `x` of this largest magnitude, which is positive and finite."""

    @abc.abstractmethod
    def _quantize_numpy(self, x: np.ndarray, scale: np.float32) -> np.ndarray:
        """`_quantize` by NumPy."""

    @property
    def _zero(self) -> int:
        """The code of 0."""
        return int(np.flatnonzero(self._levels() == 0)[0])

    def _vector_like(self, d, dtype):
        return ScaledPayload(shaped(_bits.packed_bytes(d, self._width)), shaped((), jnp.float32))

    def _codes(self, x):
        """(uint8 codes, scale) of the vector `x`."""
        if x.size == 0:
            return jnp.zeros(0, jnp.uint8), jnp.float32(0)
        low, high = _select.ends(x)
        scale = jnp.maximum(jnp.abs(low), jnp.abs(high))
        known = (scale > 0) & jnp.isfinite(scale)
        codes = self._quantize(x.astype(jnp.float32), jnp.where(known, scale, jnp.float32(1)))
        return jnp.where(known, codes, jnp.uint8(self._zero)), _finite.nan_where(~jnp.isfinite(scale), scale)

    def _values(self, codes, scale, dtype):
        # At most the scale, which is in range. The choice changes nothing, but keeps LLVM from fusing the product with
        # what a program adds to it, so that it has the same bits in every program.
        values = jnp.asarray(self._levels())[codes.astype(jnp.int32)] * scale
        return jnp.minimum(values, scale).astype(dtype)

    def _encode_vector(self, x, key):
        codes, scale = self._codes(x)
        return ScaledPayload(_bits.pack(codes, self._width), scale)

    def _encode_vector_numpy(self, x):
        if x.size == 0:
            return ScaledPayload(np.zeros(0, np.uint8), np.zeros((), np.float32))
        scale = np.float32(max(abs(x.min()), abs(x.max())))  # NaN if there is any: of a minimum and a maximum both are
        codes = np.full(x.size, self._zero, np.uint8)
        for piece in _numpy.pieces(x.size if 0 < scale < np.inf else 0):
            codes[piece] = self._quantize_numpy(x[piece].astype(np.float32), scale)
        return ScaledPayload(
            _numpy.pack(codes, self._width), np.asarray(scale if np.isfinite(scale) else np.float32(np.nan))
        )

    def _decode_vector(self, payload, like):
        return self._values(_bits.unpack(payload.codes, self._width, like.size), payload.scale, like.dtype)

    def _roundtrip_vector(self, x, key):
        return self._values(*self._codes(x), x.dtype)

"""Half precision: each value in 16 bits."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from msjax.compress import _finite
from msjax.compress._arrays import shaped
from msjax.compress._codec import Codec
from msjax.compress._identity import DensePayload
from msjax.compress._options import check_choice, plain


@dataclasses.dataclass(frozen=True, repr=False)
class Cast(Codec):
    """Sends each value as bfloat16 or float16, rounded to the nearest, ties to even: 2 bytes a value.

    What mixed precision does to a message, and what to compare other codecs with. bfloat16 has float32's range and a
    relative error of at most 2⁻⁸; float16 2⁻¹¹, from 6·10⁻⁵ to 65504: smaller values have fewer digits, larger ones
    become the largest. In sequential mode, and in SplitFed with a `client_fraction`, it is the codec of the parts that
    are handed on (`update_codec`).

    Payload: 2·d bytes. NaN and Inf are kept; finite values stay finite. Deterministic; biased only where it clips.

    Attributes:
      dtype: "bfloat16" or "float16".

    >>> import jax.numpy as jnp
    >>> Cast().roundtrip(jnp.array([1.0, 1.001, 3.14159]))
    Array([1.      , 1.      , 3.140625], dtype=float32)
    """

    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    def __post_init__(self):
        object.__setattr__(self, "dtype", plain(self.dtype, "str"))
        check_choice("dtype", self.dtype, ("bfloat16", "float16"))

    def _payload_like(self, like):
        return DensePayload(shaped(like.shape, jnp.dtype(self.dtype)))

    def _encode(self, h, key):
        return DensePayload(_clipped(h, self.dtype))

    def _encode_numpy(self, h):
        return DensePayload(_clipped(h, self.dtype, np))

    def _decode(self, payload, like):
        return _clipped(payload.values.reshape(like.shape), like.dtype)


def _clipped(values, dtype, xp=jnp):
    """`values` in another dtype, finite where they are; by JAX or NumPy."""
    most, wide = _finite.largest(dtype), values.astype(np.float32)
    return xp.where(xp.isfinite(wide), xp.clip(wide, -most, most), wide).astype(jnp.dtype(dtype))

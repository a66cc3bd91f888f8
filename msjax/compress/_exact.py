"""Integers and booleans as they are: what travels beside compressed features."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from msjax.compress._arrays import check_array, shaped
from msjax.compress._codec import Codec
from msjax.compress._identity import DensePayload

EXACT_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclasses.dataclass(frozen=True, repr=False)
class Exact(Codec):
    """Sends integer and boolean arrays exactly: attention masks, positions, class numbers.

    Payload: the array itself, its bytes the dtype's; of booleans one bit each, ⌈d/8⌉ bytes, the first in the lowest
    bit. Features that cross the cut beside floating ones go through it; `compress.CODECS`, for floating arrays, does
    not list it.

    Raises:
      TypeError: the array is floating, or of another dtype.

    >>> import jax.numpy as jnp
    >>> Exact().payload_bytes(jnp.ones((4, 5), bool))
    3
    """

    def _payload_like(self, like):
        if jnp.dtype(like.dtype) == jnp.bool_:
            return DensePayload(shaped(-(-math.prod(like.shape) // 8)))
        return DensePayload(shaped(tuple(like.shape), jnp.dtype(like.dtype)))

    def _encode(self, h, key):
        if h.dtype == jnp.bool_:
            return DensePayload(jnp.packbits(h.reshape(-1), bitorder="little"))
        return DensePayload(h)

    def _encode_numpy(self, h):
        if h.dtype == np.bool_:
            return DensePayload(np.packbits(h.reshape(-1), bitorder="little"))
        return DensePayload(np.array(h))

    def _decode(self, payload, like):
        if jnp.dtype(like.dtype) == jnp.bool_:
            bits = jnp.unpackbits(payload.values, count=math.prod(like.shape), bitorder="little")
            return bits.reshape(like.shape).astype(jnp.bool_)
        return payload.values

    def _roundtrip(self, h: jax.Array, key):
        return h

    def _check(self, h, key=...):
        check_array(h, EXACT_DTYPES, " for Exact")

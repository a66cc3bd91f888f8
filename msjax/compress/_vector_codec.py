"""Codecs of vectors: how an array becomes one, or several, each with a scale of its own."""

import abc
import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import numpy as np

from msjax.compress._arrays import shaped
from msjax.compress._codec import Codec
from msjax.compress._options import check_choice, plain

Granularity = Literal["tensor", "sample", "token", "channel"]


@dataclasses.dataclass(frozen=True, repr=False)
class VectorCodec(Codec):
    """A codec that sees its input as one vector, or as several that it compresses one by one.

    Where there are several, the payload's arrays have a leading axis with their number, each has its own scale, and
    packed codes begin with a new byte in each:

      - `granularity="tensor"`: the whole array at once, as the paper does with the batch of one client.
      - `"sample"`: each `h[i]`, so what one sample decodes to does not depend on its neighbours.
      - `"token"`: each vector along the last axis, as a transformer's features have one a token (`h[i, t]`).
      - `"channel"`: each `h[..., c]`, as a transformer has few channels whose values are far larger than all others.
    """

    granularity: Granularity = dataclasses.field(default="tensor", kw_only=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name), str(field.type)))
        check_choice("granularity", self.granularity, get_args(Granularity))

    @abc.abstractmethod
    def _encode_vector(self, x, key):
        """Payload of the vector `x` (d,)."""

    @abc.abstractmethod
    def _decode_vector(self, payload, like):
        """Vector (d,) and dtype of `like` from its payload."""

    def _roundtrip_vector(self, x, key):
        return self._decode_vector(self._encode_vector(x, key), x)

    def _encode_vector_numpy(self, x):
        """`_encode_vector` by NumPy, of a codec that is not random."""
        return Codec._encode_numpy(self, x)

    @abc.abstractmethod
    def _vector_like(self, d: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the payload of a vector of `d` values of `dtype`."""

    def _payload_like(self, like):
        rows, d = self._rows(like)
        payload = self._vector_like(d, like.dtype)
        return payload if rows is None else jax.tree.map(lambda leaf: shaped((rows, *leaf.shape), leaf.dtype), payload)

    def _rows(self, h) -> tuple[int | None, int]:
        """(number of vectors or None for one unbatched vector, values in each)."""
        if self.granularity == "tensor":
            return None, h.size
        if not h.shape:
            axis = "batch" if self.granularity == "sample" else "last"
            raise ValueError(f'h must have a {axis} axis with granularity="{self.granularity}", got a scalar')
        if self.granularity == "token":
            return math.prod(h.shape[:-1]), h.shape[-1]
        rows = h.shape[0 if self.granularity == "sample" else -1]
        return rows, h.size // max(rows, 1)

    def _split(self, h):
        """The vectors (rows, d) of an array, of JAX or NumPy, or the one vector (d,)."""
        rows, d = self._rows(h)
        if rows is None:
            return h.reshape(d)
        return h.reshape(d, rows).T if self.granularity == "channel" else h.reshape(rows, d)

    def _joined(self, vectors, shape):
        """The inverse of `_split`."""
        return (vectors.T if self.granularity == "channel" else vectors).reshape(shape)

    def _encode(self, h, key):
        return self._over_rows(self._encode_vector, h, key)

    def _encode_numpy(self, h):
        rows, d = self._rows(h)
        if rows is None:
            return self._encode_vector_numpy(self._split(h))
        # One more than there are, so that there is one.
        payloads = [self._encode_vector_numpy(row) for row in np.ascontiguousarray(self._split(h))]
        payloads.append(self._encode_vector_numpy(np.zeros(d, h.dtype)))
        return type(payloads[0])(*(np.stack(arrays)[:rows] for arrays in zip(*payloads, strict=True)))

    def _roundtrip(self, h, key):
        if type(self)._roundtrip_vector is VectorCodec._roundtrip_vector:  # by the payload, which is then checked
            return Codec._roundtrip(self, h, key)
        return self._joined(self._over_rows(self._roundtrip_vector, h, key), h.shape)

    def _over_rows(self, fun, h, key):
        rows, _ = self._rows(h)
        if rows is None:
            return fun(self._split(h), key)
        keys = None if key is None else jax.random.split(key, rows)
        return jax.vmap(fun)(self._split(h), keys)

    def _decode(self, payload, like):
        rows, d = self._rows(like)
        vector = jax.ShapeDtypeStruct((d,), like.dtype)
        if rows is None:
            return self._decode_vector(payload, vector).reshape(like.shape)
        return self._joined(jax.vmap(lambda p: self._decode_vector(p, vector))(payload), like.shape)

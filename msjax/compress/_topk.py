"""SP, top-k sparsification, and the payload that all sparsifiers share."""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.compress import _bits, _finite, _numpy, _select
from msjax.compress._arrays import shaped
from msjax.compress._options import check_ratio
from msjax.compress._vector_codec import VectorCodec


class SparsePayload(NamedTuple):
    values: jax.Array
    """(k,) the kept values in the order of their positions, in the dtype of the input."""
    mask: jax.Array
    """uint8 (⌈d/8⌉,) packed, least significant bit first; 1 where a value is kept."""


@dataclasses.dataclass(frozen=True, repr=False)
class Sparsifier(VectorCodec):
    """Keeps k = ⌊(1 − ratio)·d⌋ values (at least 1) and zeros the rest; a subclass says which.

    Payload: k values of the input's width and a mask of one bit an element: 4k + ⌈d/8⌉ bytes for float32. A mask
    costs less than positions while ratio < 96.875 %.
    """

    ratio: float = 0.95875

    def __post_init__(self):
        super().__post_init__()
        check_ratio(self.ratio)

    @abc.abstractmethod
    def _kept(self, x, k, key) -> jax.Array:
        """uint32 (⌈d/32⌉,) packed mask of the k values that are kept of `x`."""

    def _scale(self, d: int) -> float:
        """What kept values are multiplied by at the receiver."""
        return 1.0

    def _vector_like(self, d, dtype):
        return SparsePayload(shaped(_select.num_kept(self.ratio, d), dtype), shaped(_bits.packed_bytes(d, 1)))

    def _encode_vector(self, x, key):
        if x.size == 0:
            return SparsePayload(x, jnp.zeros(0, jnp.uint8))
        k = _select.num_kept(self.ratio, x.size)
        kept = self._kept(x, k, key)
        return SparsePayload(x[_select.packed_positions(kept, k, x.size)], _bits.as_bytes(kept, x.size))

    def _decode_vector(self, payload, like):
        kept = _select.packed_positions(_bits.to_words(payload.mask), payload.values.size, like.size)
        return _select.put(jnp.zeros(like.size, like.dtype), kept, self._scaled(payload.values, like))

    def _roundtrip_vector(self, x, key):
        if x.size == 0:
            return x
        kept = self._kept(x, _select.num_kept(self.ratio, x.size), key)
        return jnp.where(_bits.unpack_words(kept, x.size), self._scaled(x, x), jnp.zeros((), x.dtype))

    def _kept_like(self, like):
        return self._payload_like(like).values

    def _take_kept(self, payload, g):
        take = self._take_kept_vector if self.granularity == "tensor" else jax.vmap(self._take_kept_vector)
        return take(payload, self._split(g))

    def _take_kept_vector(self, payload, g):
        if g.size == 0:
            return g
        return g[_select.packed_positions(_bits.to_words(payload.mask), payload.values.size, g.size)]

    def _put_kept(self, payload, kept, like):
        return self._decode(payload._replace(values=kept), like)

    def _scaled(self, values, like):
        return _finite.product(values, jnp.float32(self._scale(like.size)), like.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class TopK(Sparsifier):
    """SP: the k values of largest magnitude, exactly; zeros elsewhere.

    See `Sparsifier` for k and the payload; by default it has the size of `MaskEncoded()`. Ties: the first by
    position. NaN ranks above ±Inf; both are kept exactly while there are at most k. Bias: biased toward 0; the
    squared error is at most (d − k)/d · ‖h‖² (`topk_error_bound`). Source: arXiv 2408.13787, section 3; Aji &
    Heafield, arXiv 1704.05021.

    >>> import jax.numpy as jnp
    >>> TopK(ratio=0.5).roundtrip(jnp.array([3.0, -1.0, -4.0, 2.0]))
    Array([ 3.,  0., -4.,  0.], dtype=float32)
    """

    def _kept(self, x, k, key):
        return _select.select(x, k, by_magnitude=True).words

    def _encode_vector_numpy(self, x):
        if x.size == 0:
            return SparsePayload(x, np.zeros(0, np.uint8))
        k = _select.num_kept(self.ratio, x.size)
        kept, _ = _numpy.largest(_numpy.score(x, by_magnitude=True), k)
        mask = np.zeros(x.size, np.uint8)
        mask[kept] = 1
        return SparsePayload(x[kept], _numpy.pack(mask, 1))

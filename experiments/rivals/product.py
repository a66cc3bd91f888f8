"""Product quantization of features, as FedLite has it: short vectors, each sent as the number of its cluster."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msjax.compress import Codec
from msjax.compress._arrays import shaped
from msjax.compress._bits import pack, packed_bytes, unpack
from msjax.compress._options import check_choice, check_integer


class ProductPayload(NamedTuple):
    codes: jax.Array
    """uint8, packed numbers of clusters."""
    codebook: jax.Array
    """(groups, clusters, length) in the dtype of the input."""


@dataclasses.dataclass(frozen=True, repr=False)
class ProductQuantizer(Codec):
    """Each sample's features in sub-vectors of `length` values, each replaced by the mean of its cluster.

    The sub-vectors of a batch are clustered by k-means, those of each of `groups` stretches of a sample by themselves,
    and the codebook travels with the batch. Payload, where a sample has q sub-vectors and there are B samples:
    ⌈B·q·log₂ clusters/8⌉ bytes, and the codebook, groups·clusters·length values. Source: arXiv 2201.11865.

    Bias: biased. With NaN or Inf nothing useful comes out. Deviations: k-means starts from evenly spread sub-vectors
    and takes `iterations` steps of Lloyd's; a cluster that nothing is nearest to stays where it is; sub-vectors are
    neighbours in memory, thus of the last axes; zeros fill up a last sub-vector and a last group. The source's
    correction of the client's gradient, which adds λ·(h − ĥ), is a part of training, not of a codec, and is left out;
    the source sends the gradient uncompressed.

    Attributes:
      length: values of a sub-vector.
      clusters: L, a power of two from 2 to 256.
      groups: R.
      iterations: of Lloyd's algorithm.
    """

    length: int = 8
    clusters: int = 16
    groups: int = 1
    iterations: int = 5

    def __post_init__(self):
        check_integer("length", self.length, 1, 1 << 20)
        check_choice("clusters", self.clusters, (2, 4, 8, 16, 32, 64, 128, 256))
        check_integer("groups", self.groups, 1, 1 << 20)
        check_integer("iterations", self.iterations, 0, 1000)

    @property
    def _bits(self) -> int:
        return self.clusters.bit_length() - 1

    def _shape(self, like):
        """(samples, values of a sample, sub-vectors of a sample and group)."""
        if not like.shape:
            raise ValueError("h must have a batch axis, got a scalar")
        d = math.prod(like.shape[1:])
        return like.shape[0], d, -(-d // (self.length * self.groups))

    def _payload_like(self, like):
        samples, _, each = self._shape(like)
        codes = packed_bytes(samples * each * self.groups, self._bits)
        return ProductPayload(shaped(codes), shaped((self.groups, self.clusters, self.length), like.dtype))

    def _encode(self, h, key):
        samples, d, each = self._shape(h)
        if h.size == 0:
            return ProductPayload(
                jnp.zeros(0, jnp.uint8), jnp.zeros((self.groups, self.clusters, self.length), h.dtype)
            )
        rows = jnp.pad(h.reshape(samples, d).astype(jnp.float32), ((0, 0), (0, each * self.groups * self.length - d)))
        points = rows.reshape(samples, self.groups, each, self.length).swapaxes(0, 1)
        points = points.reshape(self.groups, samples * each, self.length)
        codebook = jax.vmap(self._cluster)(points).astype(h.dtype)
        codes = jax.vmap(_nearest)(points, codebook.astype(jnp.float32))
        return ProductPayload(pack(codes.reshape(-1).astype(jnp.uint8), self._bits), codebook)

    def _cluster(self, points):
        count = points.shape[0]
        first = points[jnp.arange(self.clusters, dtype=jnp.int32) * count // self.clusters]

        def step(_, means):
            codes = _nearest(points, means)
            sums = jax.ops.segment_sum(points, codes, self.clusters)
            sizes = jax.ops.segment_sum(jnp.ones(count, jnp.float32), codes, self.clusters)[:, None]
            return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), means)

        return jax.lax.fori_loop(0, self.iterations, step, first)

    def _decode(self, payload, like):
        samples, d, each = self._shape(like)
        if 0 in (samples, d):
            return jnp.zeros(like.shape, like.dtype)
        codes = unpack(payload.codes, self._bits, samples * each * self.groups).astype(jnp.int32)
        points = jax.vmap(lambda codebook, codes: codebook[codes])(payload.codebook, codes.reshape(self.groups, -1))
        rows = points.reshape(self.groups, samples, each * self.length).swapaxes(0, 1).reshape(samples, -1)
        return rows[:, :d].reshape(like.shape).astype(like.dtype)


def _nearest(points, means):
    """The number of the mean that is nearest to each point; of equally near ones the first."""
    return jnp.argmin(jnp.sum(means**2, 1)[None] - 2 * jnp.matmul(points, means.T, precision="highest"), axis=1)

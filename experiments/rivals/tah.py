"""TAH-Quant: tiles of a token quantized by themselves, outliers spread by a Hadamard transform, bits by token."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.compress import Codec
from msjax.compress._arrays import shaped
from msjax.compress._bits import pack, packed_bytes, unpack
from msjax.compress._options import check_choice, check_integer


class TAHPayload(NamedTuple):
    low_codes: jax.Array
    """uint8, packed codes of the tokens of `low_bits`."""
    high_codes: jax.Array
    """uint8, packed codes of the others."""
    zeros: jax.Array
    """bfloat16 (tiles,): what code 0 stands for."""
    scales: jax.Array
    """bfloat16 (tiles,): from one code to the next."""
    is_low: jax.Array
    """uint8, packed, a bit a token."""
    is_rotated: jax.Array
    """uint8, packed, a bit a tile."""
    pivots: jax.Array
    """uint8, packed, log₂ tile bits a tile."""


@dataclasses.dataclass(frozen=True, repr=False)
class TAHQuant(Codec):
    """Tiles of `tile` values of a token, each quantized from its smallest to its largest value, with bits by token.

    In each sample the tokens of the least entropy, of |x|/Σ|x|, get `low_bits`, all others `high_bits`. A tile whose
    largest magnitude is twice the second or more has it moved to the front and is rotated by a Hadamard matrix, which
    spreads it evenly. Payload: the codes' bits, two bfloat16 and 1 + log₂ tile bits a tile, a bit a token. Source:
    arXiv 2506.01352, and its program for what that leaves open.

    Bias: biased. NaN or Inf spoil their tile. Deviations: a token is the last axis of three, and of a feature map a
    row of pixels, so that tiles are full where there are few channels; zeros fill up a last tile; a tile's zero point
    and scale are bfloat16, not float16, where small gradients would vanish, and codes are made with them as they are
    sent; every tile sends its pivot, also where it is not rotated, as shapes are static.

    Attributes:
      high_bits, low_bits: of a code, 1 to 8.
      high_share: part of the tokens of a sample that get `high_bits`, as in the source's program.
      tile: values, a power of two from 2 to 256.
    """

    high_bits: int = 4
    low_bits: int = 3
    high_share: float = 0.8
    tile: int = 64

    def __post_init__(self):
        check_integer("high_bits", self.high_bits, 1, 8)
        check_integer("low_bits", self.low_bits, 1, 8)
        if not 0 <= self.high_share <= 1:
            raise ValueError(f"high_share must be in [0, 1], got {self.high_share}")
        check_choice("tile", self.tile, (2, 4, 8, 16, 32, 64, 128, 256))

    def _shape(self, like):
        """(samples, tokens of a sample, values of a token, tiles of a token, low tokens of a sample)."""
        if not like.shape:
            raise ValueError("h must have a batch axis, got a scalar")
        axes = 2 if len(like.shape) > 3 else 1
        d = math.prod(like.shape[-axes:]) if len(like.shape) > 1 else 1
        tokens = math.prod(like.shape[1:-axes]) if len(like.shape) > 1 + axes else 1
        return like.shape[0], tokens, d, -(-d // self.tile), int(tokens * (1 - self.high_share) + 1e-9)

    @property
    def _pivot_bits(self) -> int:
        return self.tile.bit_length() - 1

    def _payload_like(self, like):
        samples, tokens, _, tiles, low = self._shape(like)
        values, tiles = samples * tiles * self.tile, samples * tokens * tiles
        return TAHPayload(
            shaped(packed_bytes(values * low, self.low_bits)),
            shaped(packed_bytes(values * (tokens - low), self.high_bits)),
            *[shaped(tiles, jnp.bfloat16)] * 2,
            shaped(packed_bytes(samples * tokens, 1)),
            shaped(packed_bytes(tiles, 1)),
            shaped(packed_bytes(tiles, self._pivot_bits)),
        )

    def _encode(self, h, key):
        if h.size == 0:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._payload_like(h))
        samples, tokens, d, tiles, low = self._shape(h)
        x = h.reshape(samples, tokens, d).astype(jnp.float32)
        order = jnp.argsort(_entropy(x), axis=1, stable=True)
        is_low = jnp.zeros((samples, tokens), jnp.uint8).at[jnp.arange(samples)[:, None], order[:, :low]].set(1)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, tiles * self.tile - d))).reshape(samples, tokens, tiles, self.tile)
        first, second = jnp.moveaxis(jax.lax.top_k(jnp.abs(x), 2)[0], -1, 0)
        is_rotated, pivots = first >= 2 * second, jnp.argmax(jnp.abs(x), axis=-1)
        x = jnp.where(is_rotated[..., None], _rotate(_swap(x, pivots)), x)
        bits = jnp.where(is_low == 1, self.low_bits, self.high_bits)[..., None]
        zeros = x.min(-1).astype(jnp.bfloat16)
        top = jnp.left_shift(1, bits) - 1
        scales = ((x.max(-1) - zeros.astype(jnp.float32)) / top.astype(jnp.float32)).astype(jnp.bfloat16)
        steps = (x - zeros.astype(jnp.float32)[..., None]) / jnp.where(scales > 0, scales, 1).astype(jnp.float32)[
            ..., None
        ]
        codes = jnp.clip(jnp.round(steps), 0, top[..., None].astype(jnp.float32)).astype(jnp.uint8)
        # The tokens of few bits first, each kind in its order.
        codes = jnp.take_along_axis(codes, jnp.argsort(1 - is_low, axis=1, stable=True)[..., None, None], axis=1)
        return TAHPayload(
            pack(codes[:, :low].reshape(-1), self.low_bits),
            pack(codes[:, low:].reshape(-1), self.high_bits),
            zeros.reshape(-1),
            scales.reshape(-1),
            pack(is_low.reshape(-1), 1),
            pack(is_rotated.reshape(-1).astype(jnp.uint8), 1),
            pack(pivots.reshape(-1).astype(jnp.uint8), self._pivot_bits),
        )

    def _decode(self, payload, like):
        samples, tokens, d, tiles, low = self._shape(like)
        if math.prod(like.shape) == 0:
            return jnp.zeros(like.shape, like.dtype)
        counts = (samples * low * tiles * self.tile, samples * (tokens - low) * tiles * self.tile)
        parts = [
            unpack(codes, bits, count).reshape(samples, -1, tiles, self.tile)
            for codes, bits, count in zip(payload[:2], (self.low_bits, self.high_bits), counts, strict=True)
        ]
        is_low = unpack(payload.is_low, 1, samples * tokens).reshape(samples, tokens)
        order = jnp.argsort(jnp.argsort(1 - is_low, axis=1, stable=True), axis=1)
        codes = jnp.take_along_axis(jnp.concatenate(parts, axis=1), order[..., None, None], axis=1).astype(jnp.float32)
        shape = (samples, tokens, tiles)
        zeros, scales = (part.astype(jnp.float32).reshape(*shape, 1) for part in (payload.zeros, payload.scales))
        x = zeros + codes * scales
        rotated = unpack(payload.is_rotated, 1, math.prod(shape)).reshape(*shape, 1)
        pivots = unpack(payload.pivots, self._pivot_bits, math.prod(shape)).astype(jnp.int32).reshape(shape)
        x = jnp.where(rotated == 1, _swap(_rotate(x), pivots), x)
        return x.reshape(samples, tokens, -1)[..., :d].reshape(like.shape).astype(like.dtype)


def _entropy(x):
    """That of |x|/Σ|x| along the last axis."""
    magnitude = jnp.abs(x)
    shares = magnitude / jnp.maximum(magnitude.sum(-1, keepdims=True), jnp.float32(1e-30))
    return -jax.scipy.special.xlogy(shares, shares).sum(-1)


def _swap(x, pivots):
    """The value at the pivot and the first one, exchanged."""
    at, place = pivots[..., None], jnp.arange(x.shape[-1], dtype=pivots.dtype)
    pivot = jnp.take_along_axis(x, at, axis=-1)
    return jnp.where(place == 0, pivot, jnp.where(place == at, x[..., :1], x))


def _rotate(x):
    """By the orthonormal Hadamard matrix, which is symmetric and its own inverse."""
    n, matrix = x.shape[-1], np.ones((1, 1), np.float32)
    while matrix.shape[0] < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return jnp.matmul(x, jnp.asarray(matrix / np.float32(n**0.5)), precision="highest")

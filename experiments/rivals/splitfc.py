"""SplitFC: columns of the feature matrix dropped at random by their deviation, the others quantized by their range."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msjax.compress import Codec
from msjax.compress._arrays import shaped
from msjax.compress._bits import pack, packed_bytes, unpack

_MOST_BITS = 8


class SplitFCPayload(NamedTuple):
    kept: jax.Array
    """uint8, packed, a bit a column, 1 where it is kept; (0,) where all are."""
    ends: jax.Array
    """uint8 (columns, 2): the smallest and the largest value of each, or twice the mean, on a grid of 256."""
    range: jax.Array
    """float32 (2,): the ends of that grid."""
    codes: jax.Array
    """uint8, packed, bit by bit of the columns' codes."""


@dataclasses.dataclass(frozen=True, repr=False)
class SplitFC(Codec):
    """Keeps some columns of the matrix (batch, values of a sample), and quantizes those by their range.

    The probability to keep a column grows with the standard deviation of its values (of a feature map, after each
    channel was scaled to [0, 1]); a column that is kept is divided by it. Of what is kept, columns' ends are quantized
    to 256 levels, and values between them to as many bits as reduce the squared error most, 0 to 8; with 0 a column is
    its mean. Payload for D of D̄ columns and B samples: ⌈D̄/8⌉ (if any is dropped) + 2D + 8 + ⌈B·⌊bits·D⌋/8⌉ bytes.
    Source: arXiv 2307.10805.

    For gradients, `SplitFC(keep=1.0)`; the source sends the gradient of kept columns alone, here that of all.

    Bias: the dropping is unbiased, the quantization is not. NaN or Inf anywhere make everything NaN. Deviations: just
    D columns are kept, drawn systematically, each with its probability, so that shapes are static; probabilities are
    proportional to deviation + c, with the least c ≥ 0 for which none is above 1; a column has 2^b levels, b whole and
    given out bit by bit to the largest range, where the source has any number of levels in closed form, and the ends'
    256 levels are not chosen; at inference nothing is dropped, as is usual for dropout.

    Attributes:
      keep: D/D̄, the part of the columns that is kept.
      bits: of a value of a kept column, on average.
    """

    keep: float = 0.25
    bits: float = 2.0

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        if not 0 <= self.bits <= _MOST_BITS:
            raise ValueError(f"bits must be in [0, {_MOST_BITS}], got {self.bits}")

    @property
    def needs_key(self) -> bool:  # type: ignore[override]
        """Whether columns are dropped."""
        return self.keep < 1

    def at_inference(self):
        """Returns the codec that drops nothing."""
        return dataclasses.replace(self, keep=1.0)

    def _shape(self, like):
        """(samples, columns, columns that are kept, bits of all codes of a sample)."""
        if not like.shape:
            raise ValueError("h must have a batch axis, got a scalar")
        columns = math.prod(like.shape[1:])
        kept = min(columns, max(1, round(self.keep * columns)))
        return like.shape[0], columns, kept, int(self.bits * kept)

    def _payload_like(self, like):
        samples, columns, kept, bits = self._shape(like)
        mask = packed_bytes(columns, 1) if self.needs_key else 0
        codes = packed_bytes(samples * bits, 1)
        return SplitFCPayload(shaped(mask), shaped((kept, 2)), shaped(2, jnp.float32), shaped(codes))

    def _encode(self, h, key):
        if h.size == 0:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._payload_like(h))
        samples, columns, kept, bits = self._shape(h)
        x, mask = h.reshape(samples, columns).astype(jnp.float32), jnp.zeros(0, jnp.uint8)
        if self.needs_key:
            shares = _probabilities(h.astype(jnp.float32), kept)
            at = _draw(key, shares, kept)
            x = x[:, at] / shares[at]
            mask = pack(jnp.zeros(columns, jnp.uint8).at[at].set(1), 1)
        low, high = x.min(), x.max()
        inverse = jnp.where(high > low, 255 / jnp.where(high > low, high - low, 1), 0)
        grid = [(part - low) * inverse for part in (x.min(0), x.max(0), x.mean(0))]
        ends = jnp.stack([jnp.floor(grid[0]), jnp.ceil(grid[1])], axis=1)
        ends = jnp.clip(ends, 0, 255).astype(jnp.uint8)
        widths = _widths(ends, bits)
        mean = jnp.clip(jnp.round(grid[2]), 0, 255).astype(jnp.uint8)
        ends = jnp.where(widths[:, None] > 0, ends, mean[:, None])
        start, step = _steps(ends, jnp.stack([low, high]), widths)
        codes = jnp.round((x - start) / jnp.where(step > 0, step, 1))
        codes = jnp.clip(codes, 0, (jnp.left_shift(1, widths) - 1).astype(jnp.float32)).astype(jnp.int32)
        column, place = _planes(widths, bits)
        planes = jnp.where(place >= 0, (codes.T[column] >> jnp.maximum(place, 0)) & 1, 0)
        return SplitFCPayload(mask, ends, jnp.stack([low, high]), pack(planes.reshape(-1).astype(jnp.uint8), 1))

    def _decode(self, payload, like):
        samples, columns, kept, bits = self._shape(like)
        if 0 in (samples, columns):
            return jnp.zeros(like.shape, like.dtype)
        widths = _widths(payload.ends, bits)
        column, place = _planes(widths, bits)
        planes = unpack(payload.codes, 1, samples * bits).reshape(bits, samples).astype(jnp.int32)
        planes = jnp.where(place >= 0, planes << jnp.maximum(place, 0), 0)
        codes = jnp.zeros((kept, samples), jnp.int32).at[column].add(planes).T.astype(jnp.float32)
        start, step = _steps(payload.ends, payload.range, widths)
        x = start + codes * step
        if self.needs_key:
            at = jnp.nonzero(unpack(payload.kept, 1, columns), size=kept, fill_value=columns)[0]
            x = jnp.zeros((samples, columns), jnp.float32).at[:, at].set(x, mode="drop")
        return x.reshape(like.shape).astype(like.dtype)


def _probabilities(h, kept):
    """Of each column, to be kept: (columns,), `kept` in sum."""
    axes = tuple(range(h.ndim - 1)) if h.ndim > 2 else None
    low, high = h.min(axes, keepdims=True), h.max(axes, keepdims=True)
    scaled = (h - low) / jnp.where(high > low, high - low, 1)
    deviations = scaled.std(0).reshape(-1)
    total, columns = deviations.sum(), deviations.size
    c = jnp.maximum(0, (kept * deviations.max() - total) / max(columns - kept, 1))
    sums = total + c * columns
    even = jnp.float32(kept / columns)
    # A column that never varies within its batch may still be drawn, so that nothing is divided by 0.
    return jnp.where(sums > 0, jnp.clip((deviations + c) / jnp.where(sums > 0, sums, 1) * kept, 1e-6, 1), even)


def _draw(key, shares, kept):
    """Ascending positions of `kept` columns, each drawn with its share: systematic sampling."""
    ends = jnp.cumsum(shares)
    ends *= kept / ends[-1]
    index = jnp.arange(kept)
    at = jnp.searchsorted(ends, jax.random.uniform(key) + index.astype(jnp.float32), side="right")
    at = jax.lax.cummax(at - index) + index  # no column twice, however sums were rounded
    return jnp.minimum(at, shares.size - kept + index)


def _widths(ends, bits):
    """int32 (columns,): `bits` bits given out one by one, each to the largest step that is left; from integers alone.

    A column that is down to 0 has equal ends, so both sides find the same.
    """
    widest = ends[:, 1].astype(jnp.int32) - ends[:, 0].astype(jnp.int32)
    steps = (widest[:, None] << jnp.arange(_MOST_BITS - 1, -1, -1, dtype=jnp.int32)).reshape(-1)
    first = jnp.argsort(-steps, stable=True)[:bits]
    return jnp.zeros(widest.size, jnp.int32).at[first // _MOST_BITS].add((steps[first] > 0).astype(jnp.int32))


def _planes(widths, bits):
    """(column, place of the bit in its code, −1 where there is none) of each bit plane, (bits,) and (bits, 1)."""
    ends = jnp.cumsum(widths)
    index = jnp.arange(bits, dtype=ends.dtype)
    column = jnp.minimum(jnp.searchsorted(ends, index, side="right"), widths.size - 1)
    place = index - (ends - widths)[column]
    return column, jnp.where(index < ends[-1], place, -1)[:, None]


def _steps(ends, limits, widths):
    """(value of code 0, from one code to the next) of each column."""
    values = limits[0] + ends.astype(jnp.float32) * ((limits[1] - limits[0]) * jnp.float32(1 / 255))
    levels = jnp.maximum(jnp.left_shift(1, widths) - 1, 1).astype(jnp.float32)
    return values[:, 0], (values[:, 1] - values[:, 0]) / levels

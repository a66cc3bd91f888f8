"""The step of `EntropyMask`: the one that meets its target in bits or in error, found on a sample of the input."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msjax.compress import _finite, _huffman, _select
from msjax.compress._arrays import by_platform

DEFAULT_ERROR = 0.07
"""Of a codec that has neither an error nor bits."""
_SAMPLE = 1 << 14  # values that the step is chosen from
_PER_OCTAVE = 64  # steps are powers of 2^(1/64), so that programs which round otherwise still choose the same
_FINEST, _COARSEST = -15 * _PER_OCTAVE, 3 * _PER_OCTAVE  # against the largest value, which float16 is to hold in steps
_FINEST_WHOLE = -11 * _PER_OCTAVE  # and here as a whole number
_BLOCK = 128  # values that are added up in order
_TELLING = 64  # values of the sample that are not zero: fewer say little of the others
_UNREACHED = 1e6  # errors and bits: more is the same


def choose_step(codec: Any, x: jax.Array, bits: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the step, float32 (), the levels in steps, float16 (m + 1,), and whether all of `x` is finite, bool ().

    Args:
      codec: an `EntropyMask`.
      x: (d,), floating, not empty.
      bits: in place of the codec's; None where it has an error alone.
    """
    d, g = x.size, codec._per_byte
    bytes_ = -(-d // g)
    n = min(bytes_, _SAMPLE // g)
    low, high = _select.ends(x)
    finite = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = _finite.unless(
        finite, lambda: _select.ends(jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))), (low, high)
    )
    largest = jnp.maximum(codec._magnitude(low), codec._magnitude(high))
    # Neighbours that share a byte: all, or some of them.
    group = lax.iota(jnp.int32, n) if n == bytes_ else _select.spread(n, bytes_)
    values = x[jnp.minimum(group[:, None] * g + np.arange(g, dtype=np.int32)[None], d - 1)].reshape(-1)
    values = jnp.where(jnp.isfinite(values), values.astype(jnp.float32), jnp.float32(0))
    values = values if codec.signed else codec._magnitude(values)
    # Of a sample of zeros nothing can be learnt; then there is one value, the largest.
    alone = jnp.where(lax.iota(jnp.int32, values.size) == 0, largest, jnp.float32(0))
    lonely = ~jnp.any(codec._magnitude(values) > 0)
    values = jnp.where(lonely, alone, values)
    octave = jnp.clip(_octave(largest), -125, 125)
    scale = _power_of_two(-octave)  # to about 1 at most, so that squares are in range
    values *= scale
    sample = _Sample.of(codec._magnitude(values))
    room = jnp.float32(0.75 * _select.num_kept(codec.ratio, d) / d)

    def crowded(at):
        return _shares(codec, sample, _step(at))[-1] > room

    at = jnp.int32(_FINEST)
    spread = _first(lambda at: _step(at) * codec._most >= largest * scale, sample.sorted)
    if codec.error is not None or bits is None:
        # Of all values: where tails are heavy a sample does not know it. Unless it is beyond float32.
        in_range = jnp.maximum(jnp.abs(low), jnp.abs(high)) < 2.0**48
        within = jnp.where(in_range, x, jnp.zeros((), x.dtype))
        square = jnp.vdot(within, within, preferred_element_type=jnp.float32) / d
        usable = (square > 1e-30) & (square < 1e30)
        limit = jnp.float32(2.0**60) / jnp.maximum(scale, jnp.float32(2.0**-60))
        for _ in range(2):  # in units of the sample; unsigned, negative values can make it as large as they like
            square = jnp.minimum(square, limit) * scale
        square = jnp.where(usable, square, sample.squares[-1] / sample.sorted.size)
        wrong = jnp.float32(min(codec.error or DEFAULT_ERROR, _UNREACHED)) * square
        at = _first(lambda at: _error(codec, sample, _step(at)) > wrong, sample.sorted) - 1
    if bits is not None:
        bits = jnp.minimum(jnp.float32(bits), jnp.float32(_UNREACHED))
        coarse = _first(lambda at: _entropy(codec, sample, _step(at)) <= bits, sample.sorted)
        # The sample's bytes tell what single codes do not: what neighbours share, and what Huffman's code wastes.
        bits *= _entropy(codec, sample, _step(coarse)) / _sampled_bits(codec, values, _step(coarse), bytes_)
        rate = _first(lambda at: _entropy(codec, sample, _step(at)) <= bits, sample.sorted)
        if not codec.needs_key:
            # At the step `spread` all but fills the levels: so many larger ones leave the largest value its code.
            room_above = math.floor(_PER_OCTAVE * math.log2(codec._most / (0.5 + codec.dead_zone))) - 1
            rate = jnp.minimum(rate, spread + jnp.int32(room_above))
        at = jnp.maximum(at, rate)
    # Where the sample has met few values, the rest is spread over all levels.
    few = jnp.sum(sample.sorted > 0, dtype=jnp.int32) < _TELLING
    at = jnp.where(few & (n < bytes_), jnp.minimum(at, spread), at)
    at = jnp.maximum(at, _first(lambda at: ~crowded(at), sample.sorted))
    if codec.needs_key:
        at = jnp.maximum(at, _FINEST_WHOLE)
    # A normal number whose reciprocal is one, too.
    at = jnp.clip(at, (-126 - octave) * _PER_OCTAVE, (126 - octave) * _PER_OCTAVE)
    means = _means(codec, sample, _step(at), jnp.where((n == bytes_) | lonely, jnp.float32(0), jnp.float32(1)))
    step = jnp.where(largest > 0, _step(at + octave * _PER_OCTAVE), jnp.float32(0))
    return step, means, finite


def _bins(codec, sample, step):
    """(counts, sums, sums of squares) of the sample between the edges 0, first, …, last, ∞; each (m + 2,)."""
    edges = np.arange(1, codec._most + 2, dtype=np.float32)
    if not codec.needs_key:
        edges -= np.float32(0.5)
        edges[0] += np.float32(codec.dead_zone)
    at = _select.count_below(sample.sorted, edges * step)
    at = jnp.concatenate([at[:1] * 0, at, at[:1] * 0 + sample.sorted.size])
    counts = jnp.diff(at).astype(jnp.float32)
    return counts, jnp.diff(sample.sums[at]), jnp.diff(sample.squares[at])


def _shares(codec, sample, step):
    """The part of the sample that has each code 0 … m, and that of the outliers: (m + 2,)."""
    counts, sums, _ = _bins(codec, sample, step)
    if codec.needs_key:
        up = (sums / step - counts * np.arange(codec._most + 2, dtype=np.float32)).at[-1].set(0)
        counts = counts - up + jnp.roll(up, 1)
    return counts / sample.sorted.size


def _error(codec, sample, step):
    """The mean squared error of the sample."""
    counts, sums, squares = (part[:-1] for part in _bins(codec, sample, step))
    if codec.needs_key:
        j = np.arange(codec._most + 1, dtype=np.float32)
        errors = (2 * j + 1) * step * sums - squares - j * (j + 1) * step**2 * counts
        return jnp.sum(errors) / sample.sorted.size
    explained = sums**2 / jnp.maximum(counts, 1)
    errors = squares - (explained.at[0].set(0) if codec._zero_is_zero else explained)
    return jnp.sum(errors) / sample.sorted.size


def _entropy(codec, sample, step):
    """Bits an element, if codes were coded one by one at their entropy."""
    shares = _shares(codec, sample, step)
    signs = jnp.sum(shares[1:-1]) if codec.signed else 0
    return (
        -jnp.sum(jax.scipy.special.xlogy(shares, jnp.where(shares > 0, shares, jnp.float32(1)))) / np.float32(np.log(2))
        + signs
        + 16 * shares[-1]
    )


def _sampled_bits(codec, values, step, bytes_):
    """Bits an element of the sample's bytes in Huffman's code, and of its outliers."""
    # Any random numbers will do, the same ones every time.
    uniform = jax.random.uniform(jax.random.key(0), values.shape, jnp.float32) if codec.needs_key else None
    codes = codec._codes(codec._magnitude(values) / step, uniform)
    beyond = codes > codec._most
    codes = jnp.where(beyond, jnp.float32(codec.levels), codec._with_sign(codes, values))
    packed = codec._pack(codes.astype(jnp.uint8))
    outliers = jnp.mean(beyond.astype(jnp.float32))
    return _huffman.bits_a_byte(packed, of=bytes_) / codec._per_byte + 16 * outliers


def _means(codec, sample, step, weight):
    """float16 (m + 1,): the mean of the values that get each code, in steps."""
    codes = np.arange(codec._most + 1, dtype=np.float32)
    if codec.needs_key:
        return jnp.asarray(codes, jnp.float16) + 0 * step.astype(jnp.float16)
    counts, sums, _ = (part[:-1] for part in _bins(codec, sample, step))
    # Drawn to the middle where few values tell, unless these are all.
    weight = jnp.where(counts > 0, weight, jnp.float32(1))
    means = (sums / step + weight * codes) / (counts + weight)
    return (means.at[0].set(0) if codec._zero_is_zero else means).astype(jnp.float16)


class _Sample(NamedTuple):
    """Values in order, with the sums and the sums of squares of the first 0 … n of them."""

    sorted: jax.Array
    sums: jax.Array
    squares: jax.Array

    @classmethod
    def of(cls, values):
        """Of float32 values that are finite and not below 0."""
        # As integers, whose order is the same: XLA's CPU takes four to ten times as long to sort floats. −0 becomes 0.
        bits = lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
        values = lax.bitcast_convert_type(jnp.sort(bits), jnp.float32)
        sums = by_platform(jnp.stack([values, values**2]), cpu=_sums_by_blocks, default=_sums_as_tree)
        return cls(values, *jnp.concatenate([sums[:, :1] * 0, sums], axis=1))


def _sums_as_tree(terms):
    """Sums of the first 1 … n of each row, (rows, n)."""
    return lax.associative_scan(jnp.add, terms, axis=1)


def _sums_by_blocks(terms):
    """The same, in order within blocks and over these: on a CPU two thirds of a tree's time, of compiling a quarter."""

    def add(total, values):
        total += values
        return total, total

    rows, n = terms.shape
    blocks = jnp.pad(terms, ((0, 0), (0, -n % _BLOCK))).reshape(rows, -1, _BLOCK)
    zero = blocks[:, :, 0] * 0  # made of data, so that it varies over a mesh as the data does
    totals, within = lax.scan(add, zero, jnp.moveaxis(blocks, 2, 0))
    _, until = lax.scan(add, zero[:, 0], totals.T)
    before = jnp.concatenate([zero[:, :1], until.T[:, :-1]], axis=1)
    return jnp.moveaxis(within + before[None], 0, 2).reshape(rows, -1)[:, :n]


def _step(at):
    """2^(at/64), for at/64 from −126 to less than 128."""
    fractions = jnp.asarray(np.exp2(np.arange(_PER_OCTAVE) / _PER_OCTAVE), jnp.float32)
    return fractions[at % _PER_OCTAVE] * _power_of_two(at // _PER_OCTAVE)


def _power_of_two(exponent):
    """2^exponent, for −126 to 127. `jnp.ldexp` makes infinities on the way, as `jnp.frexp` does."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _octave(x):
    """The least power of two above a positive number; of smaller ones than float32's normal ones, −126."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 126


def _first(passes, like):
    """The first of the numbers of steps that passes, where those behind do, too; the last one if none does."""
    zero = (like[0] * 0).astype(jnp.int32)  # made of data, so that it varies over a mesh as the data does

    def halve(_, ends):
        low, high = ends
        middle = (low + high) // 2
        found = passes(middle)
        return jnp.where(found, low, middle), jnp.where(found, middle, high)

    return lax.fori_loop(0, (_COARSEST - _FINEST).bit_length(), halve, (zero + _FINEST, zero + _COARSEST))[1]

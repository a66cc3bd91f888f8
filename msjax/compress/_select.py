"""Which k of d values are the largest: exactly k, ties settled by position.

Values are ranked by `score`: NaN above +Inf, and −0 equal to +0, so that every input has one answer. Short arrays are
left to `lax.top_k`, the reference; longer ones take `select_by_threshold`, which keeps the same values and reads the
array about twice, with no sort.

What is kept is known by position alone. A comparison of every value with the smallest of the kept would read the array
anew, and in a program of its own XLA may compute a value twice and round it otherwise the second time: then one value
too few, or one too many, would be marked.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped, UInt32

from msjax.compress import _bits

DIRECT = 1 << 15
"""Below this length `lax.top_k` is at least as fast."""
_SAMPLE = 1 << 15  # values that the first guess of the threshold is taken from


class Selection(NamedTuple):
    """The k largest of d scores. What is not used of it costs nothing under `jit`."""

    kth: Float32[Array, ""]
    """The k-th largest score."""
    words: UInt32[Array, "w"]
    """The packed mask of the values that are kept: exactly k bits are 1."""
    positions: Int32[Array, "k"]
    """Where they are, ascending."""


def num_kept(ratio: float, d: int) -> int:
    """Returns k = ⌊(1 − ratio)·d⌋, at least 1 unless d = 0; `ratio` is read as the decimal it prints as.

    In binary (1 − 0.9)·10 is just under 1, so the decimal is what a user means. The paper allows k = 0, where no
    threshold exists and its program fails; one value is kept here, so that a small array never decodes to nothing but
    zeros.
    """
    return min(d, max(1, int((1 - Fraction(str(float(ratio)))) * d)))


def score(x: Float[Array, "d"], *, by_magnitude: bool) -> Float32[Array, "d"]:
    """What `x` is ranked by: its value or magnitude in float32, with one NaN and one zero."""
    x = x.astype(jnp.float32)
    x = jnp.abs(x) if by_magnitude else jnp.where(x == 0, jnp.float32(0), x)
    return jnp.where(jnp.isnan(x), jnp.float32(jnp.nan), x)


def select(x: Float[Array, "d"], k: int, *, by_magnitude: bool) -> Selection:
    """The k of `x` with the largest scores, 1 ≤ k ≤ d; among equals the first by position."""
    by = select_by_sorting if x.size < DIRECT else select_by_threshold
    return by(x, k, by_magnitude=by_magnitude)


def select_by_sorting(x: Float[Array, "d"], k: int, *, by_magnitude: bool) -> Selection:
    """`select` by `lax.top_k`: the reference."""
    scores = score(x, by_magnitude=by_magnitude)
    values, indices = _top_k(scores, k)
    kept = jnp.sort(indices)  # of equal scores the first by position come first
    return Selection(values[-1], _marked(kept, x.size), kept)


def select_by_threshold(x: Float[Array, "d"], k: int, *, by_magnitude: bool) -> Selection:
    """`select` without a sort: a threshold that leaves few more than k candidates, then the exact answer among them."""
    d = x.size
    scores = functools.partial(score, by_magnitude=by_magnitude)
    # Room for the guess to err: four standard deviations of the sample's at k = d/100.
    room = min(d - k, max(1, min(max(k // 2, d // 256), d // 64)))
    candidates = packed_positions(_candidates(x, scores, k, k + room), k + room, d)
    orders = jnp.where(candidates < d, _order(scores(x[jnp.minimum(candidates, d - 1)])), jnp.uint32(0))
    kth = _kth_largest(orders, k)
    above, tied = orders > kth, orders == kth
    among = above | (tied & (_cumulative_sum(tied) <= k - jnp.sum(above, dtype=jnp.int32)))
    kept = candidates[positions(among, k)]
    return Selection(_score(kth), _marked(kept, d), kept)


def positions(mask: Bool[Array, "d"], n: int) -> Int32[Array, "n"]:
    """Positions of the first n true entries of `mask`, ascending; d where there are fewer."""
    return packed_positions(_bits.pack_words(mask), n, mask.size)


def packed_positions(words: UInt32[Array, "w"], n: int, d: int) -> Int32[Array, "n"]:
    """`positions` of a mask of d entries in packed words."""
    if n == 0:
        return jnp.zeros(0, jnp.int32)
    counts = lax.population_count(words).astype(jnp.int32)
    ends = _cumulative_sum(counts)
    # The word of the i-th true entry is the number of words that end at or before i.
    word = _cumulative_sum(jnp.zeros(n, jnp.int32).at[ends].add(1, mode="drop", indices_are_sorted=True))
    word = jnp.minimum(word, words.size - 1)
    index = lax.iota(jnp.int32, n)
    # The barrier keeps XLA from gathering anew for each of the steps that follow.
    word, bits, rank = lax.optimization_barrier((word, words[word], index - (ends - counts)[word]))
    return jnp.where(index < ends[-1], word * 32 + _bits.nth_set(bits, rank), d)


def ends(x: Float[Array, "d"]) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(smallest, largest) of `x`, NaN if there is any; in one reduction, over the 16-bit input where it is one.

    Before a min and a max XLA's CPU would write what they read to memory.
    """
    start = (np.float32(np.inf), np.float32(-np.inf))
    x = x.astype(jnp.float32)
    return lax.reduce((x, x), start, lambda a, b: (lax.min(a[0], b[0]), lax.max(a[1], b[1])), (0,))


def spread(n: int, d: int) -> Int32[Array, "n"]:
    """Returns n ≤ d positions, spread evenly, in step with no regularity; all distinct from d = 3n on.

    Multiples of 1/φ of the way, rounded down, in the integers of 32 bits: the upper word of i·2³²/φ times d.
    """
    way = lax.iota(jnp.uint32, n) * jnp.uint32(2654435769)
    upper, lower = way >> 16, way & 0xFFFF
    d_upper, d_lower = jnp.uint32(d >> 16), jnp.uint32(d & 0xFFFF)
    middle = upper * d_lower + (lower * d_lower >> 16)
    carry = ((middle & 0xFFFF) + lower * d_upper) >> 16
    return (upper * d_upper + (middle >> 16) + carry).astype(jnp.int32)


def count_below(values: Float32[Array, "n"], x: Float32[Array, "..."], *, unroll: bool = False) -> Int32[Array, "..."]:
    """How many of n ≥ 1 ascending values, at most 2^30, are below each of `x`.

    As `jnp.searchsorted`, which JAX does not trace where some axes of a mesh are manual and others are not.
    """
    n = values.size

    def halve(_, state):
        found, half = state
        more = found + half
        return jnp.where((more <= n) & (values[jnp.minimum(more, n) - 1] < x), more, found), half >> 1

    # Made of both, so that it varies over a mesh as they do.
    none = ((x < x) | (values[0] < values[0])).astype(jnp.int32)
    start = none, jnp.int32(1 << n.bit_length() - 1)
    return lax.fori_loop(0, n.bit_length(), halve, start, unroll=unroll)[0]


def smallest(scores: Float32[Array, "k"]) -> Float32[Array, ""]:
    """The smallest of k ≥ 1 scores, any of which may be NaN: that ranks above +Inf."""
    return _score(jnp.min(_order(scores)))


def put(x: Shaped[Array, "d"], positions: Int32[Array, "n"], values: Shaped[Array, "n"]) -> Shaped[Array, "d"]:
    """`x` with `values` at ascending `positions`; those at d are left out."""
    dtype = x.dtype
    if dtype.itemsize == 2:  # as integers: XLA's CPU scatters 16-bit floats in float32
        x, values = (lax.bitcast_convert_type(v, jnp.uint16) for v in (x, values))
    x = x.at[positions].set(values, mode="drop", indices_are_sorted=True)
    return lax.bitcast_convert_type(x, dtype)


def _top_k(score, k):
    """`lax.top_k` behind a barrier: XLA turns one of which only the last value is used into a full sort."""
    values, indices = lax.top_k(score, k)
    # Swapped, since a barrier right behind the pair aborts XLA's compiler where it does decompose the top-k.
    return lax.optimization_barrier((indices, values))[::-1]


def _marked(positions, d):
    """The packed mask of d entries of which those at these positions, ascending and distinct, are 1."""
    bits = jnp.uint32(1) << (positions & 31).astype(jnp.uint32)
    return jnp.zeros(-(-d // 32), jnp.uint32).at[positions >> 5].add(bits, indices_are_sorted=True)


def _kept(order, threshold, last):
    """Which are above the threshold, or at it and not behind the position `last`."""
    return (order > threshold) | ((order == threshold) & (lax.iota(jnp.int32, order.size) <= last))


class _Search(NamedTuple):
    words: jax.Array
    """The packed mask of what the last try kept, and its number."""
    kept_count: jax.Array
    tries: jax.Array
    few: jax.Array
    """Fewer than k are at or above this order; at least k at or above `many`."""
    many: jax.Array
    few_last: jax.Array
    """The same of the position up to which those equal to `many` are kept, once nothing lies between the two."""
    many_last: jax.Array


def _candidates(x, scores, k, most):
    """The packed mask of at least k and at most `most` of `x`, all others being smaller, or equal and further back.

    The first guess at a threshold comes from a sample and is nearly always good. If not, a bisection of the orders, and
    then of the positions where too many are equal: in all at most 64 readings of the array.
    """
    d = x.size
    n = min(d, _SAMPLE)
    rank = max(1, min(n, round((k + most) / 2 / d * n)))
    guess = _order(_top_k(scores(x[spread(n, d)]), rank)[0][-1])

    def unfinished(search):
        return (search.kept_count < k) | (search.kept_count > most)

    def look(s):
        # The guess; if it keeps too many, the next number, since then they are probably equal; then the middle.
        middle = s.many + (s.few - s.many) // 2
        threshold = jnp.where(s.tries == 0, guess, jnp.where((s.tries == 1) & (s.many > 0), s.many + 1, middle))
        equal = s.few - s.many <= 1
        threshold = jnp.where(equal, s.many, jnp.minimum(threshold, s.few - 1))
        last = jnp.where(equal, s.few_last + (s.many_last - s.few_last) // 2, d - 1)
        # The barrier keeps what is computed from `x` in the loop, and so out of memory.
        values, threshold = lax.optimization_barrier((x, threshold))
        words = _bits.pack_words(_kept(_order(scores(values)), threshold, last))
        count = jnp.sum(lax.population_count(words).astype(jnp.int32), dtype=jnp.int32)
        enough = count >= k
        return _Search(
            words,
            count,
            s.tries + 1,
            few=jnp.where(equal | enough, s.few, threshold),
            many=jnp.where(equal | ~enough, s.many, threshold),
            few_last=jnp.where(equal & ~enough, last, s.few_last),
            many_last=jnp.where(equal & enough, last, s.many_last),
        )

    # Made of data, so that they vary over a mesh as the data does.
    zero = guess & jnp.uint32(0)
    none = zero.astype(jnp.int32)
    words = jnp.broadcast_to(zero, (-(-d // 32),))
    start = _Search(words, none, none, zero + jnp.uint32(2**32 - 1), zero, none - 1, none + (d - 1))
    # A loop rather than a condition: under vmap a condition takes both of its branches.
    return lax.while_loop(unfinished, look, start).words


def _kth_largest(order, k):
    """The k-th largest of few: on a GPU, where a round of the other way is several launches, by sorting."""
    by_sorting = functools.partial(_kth_by_sorting, k=k)
    return lax.platform_dependent(order, cuda=by_sorting, rocm=by_sorting, default=functools.partial(_kth_by_bits, k=k))


def _kth_by_sorting(order, k):
    return jnp.sort(order)[order.size - k]


def _kth_by_bits(order, k):
    def bit(i, kth):
        larger = kth | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(order >= larger, dtype=jnp.int32) >= k, larger, kth)

    return lax.fori_loop(0, 32, bit, order[0] & jnp.uint32(0))


def _cumulative_sum(x):
    """jnp.cumsum in int32, in rows of 256, which XLA runs better."""
    rows = jnp.pad(x.astype(jnp.int32), (0, -x.size % 256)).reshape(-1, 256)
    totals = jnp.sum(rows, axis=1, dtype=jnp.int32)
    before = jnp.cumsum(totals, dtype=jnp.int32) - totals
    return (jnp.cumsum(rows, axis=1, dtype=jnp.int32) + before[:, None]).reshape(-1)[: x.size]


def _order(score):
    """Unsigned integers in the same order as the scores, NaN last; none is 0."""
    bits = lax.bitcast_convert_type(score, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _score(order):
    """The inverse of `_order`."""
    bits = jnp.where(order >> 31 == 1, order & jnp.uint32(2**31 - 1), ~order)
    return lax.bitcast_convert_type(bits, jnp.float32)

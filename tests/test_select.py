"""Selection: by `lax.top_k`, by threshold and by a stable numpy sort, the same values are kept of every input."""

import functools
import math
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from msjax.compress import _bits, _select

from . import reference

SEEDED = settings(max_examples=150, deadline=None, derandomize=True, database=None)
D = 33  # one length, so that hypothesis compiles one program for each k
TINY = np.float32(2.0**-149)  # the smallest subnormal


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_count_below(size):
    rng = np.random.default_rng(size)
    values = np.sort(rng.integers(0, 40, size)).astype(np.float32)
    x = np.concatenate([values, values + np.float32(0.5), np.float32([-1, 1e9, np.inf, -np.inf])])
    for unroll in (False, True):
        found = jax.jit(functools.partial(_select.count_below, unroll=unroll))(values, x)
        np.testing.assert_array_equal(found, np.searchsorted(values, x))


@functools.partial(jax.jit, static_argnames=("k", "by_magnitude"))
def select(x, k, by_magnitude):
    """(by sorting, by threshold, positions from the latter's mask)."""
    fast = _select.select_by_threshold(x, k, by_magnitude=by_magnitude)
    return (
        _select.select_by_sorting(x, k, by_magnitude=by_magnitude),
        fast,
        _select.packed_positions(fast.words, k, x.size),
    )


def check(x, k, by_magnitude):
    x = np.asarray(x, np.float32)
    reference, fast, from_mask = jax.tree.map(np.asarray, select(jnp.asarray(x), k, by_magnitude))
    for name in _select.Selection._fields:
        np.testing.assert_array_equal(getattr(fast, name), getattr(reference, name), err_msg=name)
    expected = sort_positions(x, k, by_magnitude)
    np.testing.assert_array_equal(fast.positions, expected)
    np.testing.assert_array_equal(np.flatnonzero(_bits.unpack_words(jnp.asarray(fast.words), x.size)), expected)
    np.testing.assert_array_equal(from_mask, expected)
    ranked = np.abs(x) if by_magnitude else x
    np.testing.assert_array_equal(fast.kth, np.sort(ranked)[x.size - k])  # numpy sorts NaN last too


def sort_positions(x, k, by_magnitude):
    """The first k of a stable descending sort; numpy puts NaN last, as it must be first here."""
    x = np.abs(x) if by_magnitude else x
    return (
        np.sort(np.argsort(-np.where(np.isnan(x), np.inf, x), kind="stable")[:k])
        if not np.isnan(x).any()
        else reference.largest(x, k)
    )


INPUTS = {
    "all equal": np.full(D, 1.5),
    "all zero": np.zeros(D),
    "both zeros": np.where(np.arange(D) % 3 == 0, -0.0, 0.0),
    "zeros and signs": np.array([0.0, -0.0, 1, -1] * 8 + [0]),
    "two values": np.arange(D) % 2 * 2.0 - 1,
    "all negative": -1.0 - np.arange(D) % 5,
    "ascending": np.arange(D) - 9.0,
    "descending": 9.0 - np.arange(D),
    "duplicates at the threshold": np.array([5.0] * 3 + [2.0] * 15 + [7.0] + [2.0] * 14),
    "ties at both ends": np.array([2.0] + [1.0] * 31 + [2.0]),
    "neighbouring floats": np.nextafter(np.float32(1), np.float32(2)) * (np.arange(D) % 2) + (np.arange(D) % 2 == 0),
    "huge range": np.ldexp(1.0, (np.arange(D) * 37) % 250 - 125) * np.where(np.arange(D) % 2, 1, -1),
    "largest floats": np.finfo(np.float32).max * np.where(np.arange(D) % 4 == 1, -1, 1),
    "infinities": np.array([np.inf, 1, -np.inf] * 11),
    "NaN of both signs": np.where(np.arange(D) % 5 == 2, np.copysign(np.nan, (-1.0) ** np.arange(D)), np.arange(D)),
    "all NaN": np.full(D, np.nan),
    "NaN and infinities": np.array([-np.nan, np.inf, 0, -np.inf, np.nan, 3, np.inf, -0.0] * 4 + [np.nan]),
}


@pytest.mark.parametrize("by_magnitude", (False, True))
@pytest.mark.parametrize("k", (1, 17, *(pytest.param(k, marks=pytest.mark.slow) for k in (4, D - 1, D))))
def test_agree_on_adversarial_inputs(k, by_magnitude):
    for name, x in INPUTS.items():
        try:
            check(x, k, by_magnitude)
        except AssertionError as error:
            raise AssertionError(f"input {name!r}: {error}") from error


@pytest.mark.parametrize("by_magnitude", (False, True))
@pytest.mark.parametrize("value", (0.0, -3.0, np.inf, np.nan))
def test_one_value(value, by_magnitude):
    check([value], 1, by_magnitude)


@pytest.mark.parametrize("by_magnitude", (False, True))
@pytest.mark.parametrize("k", (17, pytest.param(1, marks=pytest.mark.slow)))
@SEEDED
@given(
    bits=st.lists(
        st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1 << 31, 0x3F800000, 0x7F800000, 0xFFC00001])),
        min_size=D,
        max_size=D,
    )
)
@example(bits=[0x7FC00000, 0x7FC00001, 0xFFFFFFFF] * 11)  # NaNs that differ
def test_agree_on_any_bits(k, by_magnitude, bits):
    x = np.array(bits, np.uint32).view(np.float32)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)  # subnormal numbers: below
    check(x, k, by_magnitude)


@pytest.mark.parametrize("by_magnitude", (False, True))
@pytest.mark.parametrize("k", (1, 17, pytest.param(4, marks=pytest.mark.slow)))
def test_subnormal_numbers(k, by_magnitude):
    """They may count as 0, but the mask and the positions count them alike, and above nothing larger."""
    x = np.array([TINY, 0, -TINY, 3 * TINY, 1e-38, 2e-38, -1e-39, 1] * 4 + [0], np.float32)
    reference, fast, from_mask = jax.tree.map(np.asarray, select(jnp.asarray(x), k, by_magnitude))
    np.testing.assert_array_equal(fast.positions, reference.positions)
    np.testing.assert_array_equal(np.flatnonzero(_bits.unpack_words(jnp.asarray(fast.words), x.size)), fast.positions)
    np.testing.assert_array_equal(from_mask, fast.positions)
    assert np.count_nonzero(x[fast.positions] == 1) == min(k, 4)


def test_vmap():
    x = jnp.asarray(np.stack([np.asarray(v, np.float32) for v in INPUTS.values()]))
    both = jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda row: select(row, k=17, by_magnitude=False)))(x))
    for i, row in enumerate(np.asarray(x)):
        one = select(row, 17, False)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda v, i=i: v[i], both), one)


LONG = 3 * 2**15 + 5
"""Longer than `_select.DIRECT` and than its sample, and no multiple of a word."""


def long_inputs():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(LONG)
    return {
        "normal": normal,
        "after a ReLU": np.maximum(normal, 0),
        "mostly zero": np.where(rng.random(LONG) < 0.003, normal, 0),
        "all equal": np.ones(LONG),
        "two values": (rng.random(LONG) < 0.5) * 1.0,
        "few values": rng.integers(0, 50, LONG),
        "largest at the end": np.arange(LONG) > LONG - 1500,
        "ascending": np.arange(LONG),
        "descending": -np.arange(LONG),
        "subnormal numbers": rng.integers(0, 2**23, LONG).astype(np.uint32).view(np.float32),
        "huge range": np.ldexp(normal, rng.integers(-100, 120, LONG)),
        "any bits": rng.integers(0, 2**32, LONG, np.uint64).astype(np.uint32).view(np.float32),
        "rounded to bfloat16": np.asarray(normal, jnp.bfloat16),
        "steps of the sample": np.where(np.arange(LONG) * 2654435769 % 2**32 % LONG < LONG // 3, 5 + normal, normal),
        "NaN": np.where(rng.random(LONG) < 0.02, np.nan, normal),
    }


@pytest.mark.parametrize(
    "k, by_magnitude",
    [
        (LONG // 100, False),
        (LONG // 100, True),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(LONG // 1000, True, marks=pytest.mark.slow),
        pytest.param(LONG // 3, False, marks=pytest.mark.slow),
        pytest.param(LONG, True, marks=pytest.mark.slow),
    ],
)
def test_long_adversarial_inputs(k, by_magnitude):
    """Where the threshold is guessed, wrongly for some of these, and ties fill many words.

    Magnitudes are another score of each value, and short arrays are tried with both at each k: here at one k.
    """
    for name, x in long_inputs().items():
        x = jnp.asarray(np.asarray(x, np.float32))
        reference, fast, from_mask = select(x, k, by_magnitude)
        for field in _select.Selection._fields:
            message = f"input {name!r}, {field}"
            np.testing.assert_array_equal(getattr(fast, field), getattr(reference, field), err_msg=message)
        np.testing.assert_array_equal(from_mask, fast.positions, err_msg=name)


@pytest.mark.slow
def test_more_values_than_float32_counts():
    """2²⁴ + 33 values, nearly all equal: a count or a position in float32 would be off by one."""
    d = 2**24 + 33
    x = jnp.where(lax.iota(jnp.int32, d) % (d - 1) == 0, jnp.float32(2), jnp.float32(1))
    k = d - 5
    fast = jax.jit(lambda x: _select.select(x, k, by_magnitude=False)[:2])(x)
    np.testing.assert_array_equal(_bits.unpack_words(fast[1], d), np.r_[np.ones(k - 1, bool), np.zeros(5, bool), True])
    assert fast[0] == 1


@pytest.mark.parametrize("ratio, d, k", [
        (0.9, 10, 1), (0.99, 4194304, 41943), (0.95875, 4194304, 173015), (0.95875, 800, 33), (0.7, 10, 3),
        (0.99, 99, 1), (0, 5, 5), (0.5, 0, 0), (0.999999, 3, 1),
    ])  # fmt: skip
def test_num_kept(ratio, d, k):
    assert _select.num_kept(ratio, d) == reference.num_kept(ratio, d) == k


@SEEDED
@given(numerator=st.integers(0, 10**5 - 1), d=st.integers(1, 2**40))
@example(numerator=99000, d=100)
def test_num_kept_is_exact_for_decimals(numerator, d):
    exact = math.floor((1 - Fraction(numerator, 10**5)) * d)
    assert _select.num_kept(float(Decimal(numerator) / 10**5), d) == max(1, exact)


@SEEDED
@given(ratio=st.floats(0, 1, exclude_max=True), d=st.integers(0, 10**9))
def test_num_kept_of_any_ratio(ratio, d):
    assert _select.num_kept(ratio, d) == reference.num_kept(ratio, d)


@pytest.mark.parametrize("d", (1 << 15, 40_000, 3 << 15, 10_000_019, 2**31 - 1))
def test_spread(d):
    n = 1 << 15
    found = np.asarray(_select.spread(n, d))
    ways = (np.arange(n, dtype=np.uint64) * np.uint64(2654435769)) % np.uint64(1 << 32)
    np.testing.assert_array_equal(found, (ways * np.uint64(d) >> np.uint64(32)).astype(np.int32))
    assert np.unique(found).size == n if d >= 3 * n else np.unique(found).size > 0.85 * n


def test_kth_by_sorting_as_by_bits():
    """What a GPU does of few values, and what the others do."""
    rng = np.random.default_rng(0)
    for orders in (rng.integers(0, 2**32, 301, np.uint32), rng.integers(5, 8, 300, np.uint32), np.full(7, 2**32 - 1)):
        orders = orders.astype(np.uint32)
        for k in (1, 3, orders.size):
            expected = np.sort(orders)[orders.size - k]
            assert _select._kth_by_sorting(jnp.asarray(orders), k) == expected
            assert _select._kth_by_bits(jnp.asarray(orders), k) == expected


@pytest.mark.parametrize(
    "platform, loops", (("cuda", 0), pytest.param("rocm", 0, marks=pytest.mark.slow), ("tpu", 1), ("cpu", 1))
)
def test_lowers_for_every_platform(platform, loops):
    """All of it; and the k-th of few is found by sorting, without a loop, on GPUs alone."""
    find = jax.jit(lambda x: _select.select(x, 300, by_magnitude=False))
    jax.export.export(find, platforms=[platform])(jax.ShapeDtypeStruct((2 * _select.DIRECT,), jnp.float32))
    kth = jax.jit(lambda orders: _select._kth_largest(orders, 300))
    exported = jax.export.export(kth, platforms=[platform])(jax.ShapeDtypeStruct((1000,), jnp.uint32))
    assert exported.mlir_module().count("stablehlo.while") == loops


@pytest.mark.parametrize("by", (_select.select_by_sorting, _select.select_by_threshold))
def test_exactly_k_are_marked_where_a_second_reading_differs(by, monkeypatch):
    """XLA may compute a value twice in a program and round it otherwise; here every reading of all of them is lower."""
    exact = _select.score

    def lower_for_all(x, *, by_magnitude):
        return exact(x, by_magnitude=by_magnitude) * jnp.float32(1 if x.size < D else 1 - 2**-20)

    monkeypatch.setattr(_select, "score", lower_for_all)
    x = jax.random.normal(jax.random.key(0), (D,))
    for k in (1, 5, 17):
        top = by(x, k, by_magnitude=True)
        np.testing.assert_array_equal(np.flatnonzero(_bits.unpack_words(top.words, D)), top.positions)
        np.testing.assert_array_equal(top.positions, sort_positions(np.asarray(x), k, True))

"""Selection: `lax.top_k` and a stable numpy sort keep the same values on every input."""

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

from msjax.compress import _select

from . import reference

SEEDED = settings(max_examples=150, deadline=None, derandomize=True, database=None)
D = 33  # one length, so that hypothesis compiles one program for each k
TINY = np.float32(2.0**-149)  # the smallest subnormal


@functools.partial(jax.jit, static_argnames=("k", "by_magnitude"))
def select(x, k, by_magnitude):
    score = _select.score(x, by_magnitude=by_magnitude)
    kth, mask = _select.top_mask(score, k)
    return score, kth, mask, _select.positions(mask, k), _select.top_positions(score, k)


def check(x, k, by_magnitude):
    x = np.asarray(x, np.float32)
    score, kth, mask, from_mask, positions = map(np.asarray, select(jnp.asarray(x), k, by_magnitude))
    expected = sort_positions(x, k, by_magnitude)
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(np.flatnonzero(mask), expected)
    np.testing.assert_array_equal(from_mask, expected)
    np.testing.assert_array_equal(kth, np.sort(score)[x.size - k])  # numpy sorts NaN last too


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
@pytest.mark.parametrize("k", (1, 4, 17, D - 1, D))
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
@pytest.mark.parametrize("k", (1, 9))
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
def test_subnormal_numbers(by_magnitude):
    """They may count as 0, but the mask and the positions count them alike, and above nothing larger."""
    x = np.array([TINY, 0, -TINY, 3 * TINY, 1e-38, 2e-38, -1e-39, 1] * 4 + [0], np.float32)
    for k in (1, 4, 17):
        _, _, mask, from_mask, positions = map(np.asarray, select(jnp.asarray(x), k, by_magnitude))
        np.testing.assert_array_equal(np.flatnonzero(mask), positions)
        np.testing.assert_array_equal(from_mask, positions)
        assert np.count_nonzero(x[positions] == 1) == min(k, 4)


def test_vmap():
    x = np.stack([np.asarray(v, np.float32) for v in INPUTS.values()])
    _, kth, mask, from_mask, positions = jax.jit(jax.vmap(lambda row: select(row, k=6, by_magnitude=False)))(
        jnp.asarray(x)
    )
    for i, row in enumerate(x):
        _, one_kth, one_mask, _, _ = select(jnp.asarray(row), 6, False)
        np.testing.assert_array_equal(mask[i], one_mask)
        np.testing.assert_array_equal(kth[i], one_kth)
        np.testing.assert_array_equal(positions[i], np.flatnonzero(one_mask))
        np.testing.assert_array_equal(from_mask[i], positions[i])


def test_large_input():
    """A length at which ties span many bytes of position, with many duplicates."""
    x = np.random.default_rng(0).integers(0, 50, 70_001).astype(np.float32)
    check(x, 700, False)


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

"""Random words, numbers and subsets: exact counts, and every outcome as likely as it should be."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.compress import RandK, RandTopK, StochasticUniform, _bits, _random

KEY = jax.random.key(0)
LONG = 32 * _random._LISTED
"""Entries of the shortest mask whose undecided are listed."""


@functools.partial(jax.jit, static_argnums=2)
def subset(key, mask, d, k):
    return _bits.unpack_words(_random.subset(key, _bits.pack_words(mask), k), d)


@functools.partial(jax.jit, static_argnums=0)
def roundtrip(codec, h, key):
    return codec.roundtrip(h, key)


def chi_square(counts, expected):
    """(counts − expected)²/expected, summed, in standard deviations above its mean."""
    counts = np.asarray(counts, np.float64).ravel()
    freedom = counts.size - 1
    return (np.square(counts - expected).sum() / expected - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "n", (1, _random._CHUNK, _random._CHUNK + 1, 3 * _random._CHUNK - 1, _random._CHUNKS * _random._CHUNK + 17)
)
def test_words_of_every_chunk_differ(n):
    drawn = np.asarray(jax.jit(_random.words, static_argnums=1)(KEY, n))
    assert drawn.shape == (n,) and drawn.dtype == np.uint32
    assert n - np.unique(drawn).size <= 10 + n**2 / 2**32  # twice the collisions expected of random words, and ten
    for shift in (0, 12, 24):
        counts = np.bincount(drawn >> np.uint32(shift) & np.uint32(255), minlength=256)
        assert n == 1 or chi_square(counts, n / 256) < 6


def test_uniform_numbers_are_uniform_to_their_last_bit():
    d = 2**18 + 5
    u = np.asarray(jax.jit(_random.uniform, static_argnums=1)(KEY, d))
    assert u.shape == (d,) and u.min() >= 0 and u.max() < 1
    integers = (u.astype(np.float64) * 2**24).astype(np.int64)
    assert (integers == u.astype(np.float64) * 2**24).all()
    assert chi_square(np.bincount(integers >> 16, minlength=256), d / 256) < 6  # a number's own bits
    groups = integers[::32] & 0xFFFF
    assert (integers & 0xFFFF == np.repeat(groups, 32)[:d]).all()  # its group's
    assert chi_square(np.bincount(groups >> 8, minlength=256), groups.size / 256) < 6
    assert chi_square(np.bincount(groups & 255, minlength=256), groups.size / 256) < 6


@pytest.mark.parametrize("p", (2.0**-11, 0.3, 0.5 + 2.0**-10))
def test_uniform_numbers_of_a_group_are_all_but_independent(p):
    below = np.asarray(jax.jit(_random.uniform, static_argnums=1)(KEY, 2**19)).reshape(-1, 32) < p
    assert abs(below.mean() - p) <= 5 * np.sqrt(1.125 * p / below.size)
    # The variance of 2¹⁴ sums is itself off by a few percent.
    assert below.sum(1).var() <= 32 * p * (1 - p) * 1.125 * 1.08


@pytest.mark.parametrize("d", (1, 33, LONG - 32, LONG - 31, 3 * LONG + 7))
def test_subset_has_exactly_k(d):
    rng = np.random.default_rng(d)
    for mask in (np.ones(d, bool), rng.random(d) < 0.04, np.arange(d) == d - 1):
        n = int(mask.sum())
        for k in sorted({0, min(1, n), n // 24, n // 2, max(n - 1, 0), n}):
            chosen = np.asarray(subset(KEY, jnp.asarray(mask), d, jnp.int32(k)))
            assert chosen.sum() == k and not (chosen & ~mask).any(), (n, k)


@pytest.mark.parametrize("k", (1, 2, 3, 5))
def test_subsets_are_equally_likely(k):
    n, among = 12000, np.array([0, 3, 4, 31, 32, 40])
    mask = jnp.zeros(41, bool).at[among].set(True)
    chosen = np.asarray(jax.vmap(lambda key: subset(key, mask, 41, jnp.int32(k)))(jax.random.split(KEY, n)))
    rows = [tuple(np.flatnonzero(row)) for row in chosen]
    subsets = list(itertools.combinations(among, k))
    assert set(rows) <= set(subsets)
    assert chi_square([rows.count(s) for s in subsets], n / len(subsets)) < 5


@pytest.mark.parametrize("k", (50, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 78))))
def test_subsets_of_listed_entries_are_equally_likely(k, monkeypatch):
    """With lists already of 2 words, twice over: each position, and each pair, as often as any other."""
    monkeypatch.setattr(_random, "_LISTED", 2)
    n, d = 6000, 80
    draw = jax.jit(lambda key: _bits.unpack_words(_random.subset(key, _bits.ones(d), jnp.int32(k)), d))
    chosen = np.asarray(jax.vmap(draw)(jax.random.split(KEY, n))).astype(np.float64)
    assert (chosen.sum(1) == k).all()
    # Counts of a position vary less than Poisson's, by 1 − k/d.
    assert (np.square(chosen.sum(0) - n * k / d).sum() / (n * k / d * (1 - k / d)) - d) / np.sqrt(2 * d) < 5
    together = (chosen.T @ chosen)[np.triu_indices(d, 1)]
    p = k * (k - 1) / (d * (d - 1))
    assert np.abs(together - n * p).max() <= 5.5 * np.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("d", (LONG - 33, 8 * LONG + 13))
def test_randk_positions_are_spread_evenly(d):
    codec = RandK(0.9)
    drawn = jax.jit(lambda key: codec.roundtrip(jnp.ones(d), key))
    counts = sum(np.histogram(np.flatnonzero(drawn(key)), 64, (0, d))[0] for key in jax.random.split(KEY, 4))
    assert counts.sum() == 4 * (d // 10)
    assert chi_square(counts, counts.sum() / 64) < 5
    bits = sum(np.bincount(np.flatnonzero(drawn(key)) % 32, minlength=32) for key in jax.random.split(KEY, 4))
    assert chi_square(bits, bits.sum() / 32) < 5


def test_randtopk_of_a_long_array_swaps_alpha():
    d = LONG + 77
    h = jax.random.normal(KEY, (d,))
    k = d // 10
    top = np.zeros(d, bool)
    top[np.argsort(-np.abs(np.asarray(h)))[:k]] = True
    for key in jax.random.split(KEY, 5):
        kept = np.asarray(roundtrip(RandTopK(0.9, alpha=0.2), h, key)) != 0
        assert kept.sum() == k
        assert abs((kept & ~top).sum() - 0.2 * k) <= 5 * np.sqrt(0.2 * 0.8 * k)
        for group in (top, ~top):  # evenly among the positions of a group
            ranks = np.flatnonzero(kept[group])
            assert chi_square(np.histogram(ranks, 16, (0, group.sum()))[0], ranks.size / 16) < 5


@pytest.mark.parametrize("bits", (1, 8))
def test_stochastic_uniform_is_unbiased_over_a_long_array(bits):
    """All values are alike, so the mean over them must be theirs, on both sides of a chunk's end."""
    d, top = 4 * _random._CHUNK + 100, 2**bits - 1
    for fraction in (0.0, 2.0**-10, 0.4, 1 - 2.0**-10):
        h = np.full(d, fraction / top, np.float32)
        h[0], h[-1] = 0, 1
        steps = np.asarray(roundtrip(StochasticUniform(bits), jnp.asarray(h), KEY), np.float64)[1:-1] * top
        assert set(np.rint(steps)) <= ({0.0, 1.0} if fraction else {0.0})
        error = 5 * np.sqrt(1.125 * fraction * (1 - fraction) / d) + 1e-4 * fraction
        assert abs(steps.mean() - fraction) <= error


@pytest.mark.parametrize(
    "codec, sharded",
    [
        (RandTopK(0.9), "key"),
        pytest.param(RandTopK(0.9), "h", marks=pytest.mark.slow),
        pytest.param(RandK(0.9), "key", marks=pytest.mark.slow),
        pytest.param(RandK(0.9), "h", marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_over_a_mesh_with_only_one_of_the_two_sharded(codec, sharded):
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("client",), axis_types=(jax.sharding.AxisType.Auto,))
    h, keys = jax.random.normal(KEY, (2, LONG + 3)), jax.random.split(KEY, 2)
    both = jax.shard_map(
        lambda h, key: codec.roundtrip(h[0], key[0])[None],
        mesh=mesh,
        in_specs=(P("client"), P()) if sharded == "h" else (P(), P("client")),
        out_specs=P("client"),
    )
    got = jax.jit(both)(h, keys)
    for i in range(2):
        one = roundtrip(codec, h[i if sharded == "h" else 0], keys[i if sharded == "key" else 0])
        np.testing.assert_allclose(got[i], one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codec", (RandK(0.5), StochasticUniform(1)), ids=repr)
def test_samples_draw_differently(codec):
    h = jnp.tile(jnp.linspace(1, 2, 64), (8, 1))
    decoded = np.asarray(roundtrip(dataclasses.replace(codec, granularity="sample"), h, KEY))
    assert len(np.unique(decoded, axis=0)) == 8


@pytest.mark.parametrize("codec", [RandK(), RandTopK()], ids=repr)
def test_as_many_values_as_int32_counts(codec):
    """Traced alone."""
    h = jax.ShapeDtypeStruct((2**31 - 1,), jnp.bfloat16)
    assert jax.eval_shape(codec.roundtrip, h, KEY).shape == h.shape

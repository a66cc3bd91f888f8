"""What one codec alone claims: the documented corners, the errors, unbiasedness, direction of bias, bounds."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from msjax import compress, wire
from msjax.compress import (
    Cast,
    Exact,
    Identity,
    MaskEncoded,
    Quantile,
    RandK,
    RandTopK,
    SmallFloat,
    StochasticUniform,
    TopK,
    Uniform,
)

from . import reference
from .helpers import encode

DEFAULTS = tuple(cls() for cls in compress.CODECS)
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def jitted(codec, h):
    return codec.decode(codec.encode(h), h), codec.roundtrip(h)


@functools.partial(jax.jit, static_argnums=0)
def decode(codec, payload, like):
    return codec.decode(payload, like)


CORNERS = [  # (MaskEncoded options, input, what it decodes to); k = 2 of 8 unless a ratio says otherwise
    ("ties", {}, [3, 3, 3, 3, 0, 0, 0, 3], [3, 3, 2, 2, 0, 0, 0, 2]),
    ("ties below the largest", {}, [1, 9, 1, 1, 0, 0, 0, 0], [1, 9, 2 / 3, 2 / 3, 0, 0, 0, 0]),
    ("constant", {"bits": 3}, [0.5] * 8, [0.5, 0.5] + [0.5 * 6 / 7] * 6),
    ("all zeros", {}, [0] * 8, [0] * 8),
    ("fewer than k positive", {}, [0, 0, 0, 5, 0, 0, 0, 0], [0, 0, 0, 5, 0, 0, 0, 0]),
    ("fewer than k positive, the rest negative", {}, [-1, -2, -1, 5, -1, -1, -1, -1], [-1, 0, 0, 5, 0, 0, 0, 0]),
    ("negative values, unsigned", {}, [-9, 3, -1, 6, -3, 1, 2, 0], [0, 3, 0, 6, 0, 1, 2, 0]),
    ("all negative, unsigned", {}, [-1, -2, -3, -4, -5, -6, -7, -8], [-1, -2, 0, 0, 0, 0, 0, 0]),
    ("negative values, signed", {"signed": True}, [-9, 3, -1, 6, -4, 1, 2, 0], [-9, 4, 0, 6, -4, 0, 2, 0]),
    ("signed ties", {"signed": True}, [3, -3, 3, -3, 0, 0, 0, -1], [3, -3, 2, -2, 0, 0, 0, -1]),
    ("negative values under half a step", {}, [-0.4, 3, -0.4, 6, -0.3, 1, 2, 0], [0, 3, 0, 6, 0, 1, 2, 0]),
    ("the same, signed", {"signed": True}, [-0.4, 3, -0.4, 6, -0.3, 1, 2, 0], [0, 3, 0, 6, 0, 1, 2, 0]),
    ("one bit is top-k", {"bits": 1}, [1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 0, 7, 8]),
    ("one bit, signed", {"bits": 1, "signed": True}, [-8, 2, 3, 4, 5, 6, -7, 1], [-8, 0, 0, 0, 0, 0, -7, 0]),
    ("k = 0 becomes 1", {"ratio": 0.99}, [0, 3, 2, 1, 0, 0, 1.4, 1.6], [0, 3, 2, 1, 0, 0, 1, 2]),
    ("ratio 0 keeps all", {"ratio": 0}, [0, -3, 2, 1, 5, 4, -np.inf, np.nan], [0, -3, 2, 1, 5, 4, -np.inf, np.nan]),
    ("half to even", {}, [6, 6, 1, 3, 0.99, 1.01, 0, 0], [6, 6, 0, 4, 0, 2, 0, 0]),
    ("floor", {"rounding": "floor"}, [6, 6, 1.99, 2, 3.99, 4, 5.99, 0], [6, 6, 0, 2, 2, 4, 4, 0]),
    ("clamped below the kept code", {}, [6, 6, 5.99, 0, 0, 0, 0, 0], [6, 6, 4, 0, 0, 0, 0, 0]),
    ("one NaN", {}, [3, np.nan, 1, 2, 0, 0, 0, 0], [3, np.nan, 1, 2, 0, 0, 0, 0]),
    ("-NaN above Inf", {"ratio": 0.625}, [np.inf, -np.nan, 1, 3, 0, 0, 2, 0], [np.inf, np.nan, 1, 3, 0, 0, 2, 0]),
    ("k not finite: τ is not", {}, [3, np.nan, 1, np.inf, 0, 0, 0, 0], [np.nan, np.nan, np.nan, np.inf] + [np.nan] * 4),
    ("more than k NaN", {}, [np.nan] * 3 + [1] * 5, [np.nan] * 8),
    ("more than k Inf", {}, [np.inf, 1, np.inf, np.inf, 0, 0, 0, 0], [np.inf, np.nan, np.inf] + [np.nan] * 5),
    ("-Inf is negative", {}, [3, -np.inf, 1, 6, 0, 0, 0, 0], [3, 0, 1, 6, 0, 0, 0, 0]),
    ("negative τ, -Inf", {}, [-np.inf] * 3 + [3] + [-np.inf] * 4, [-np.inf, 0, 0, 3, 0, 0, 0, 0]),
    ("-Inf, signed", {"signed": True}, [3, -np.inf, -1, 0, 0, 0, 0, 0], [3, -np.inf, -1, 0, 0, 0, 0, 0]),
    ("largest floats", {}, [3e38, 3e38, 2e38, 0, 0, 0, 0, 0], [3e38, 3e38, 2e38, 0, 0, 0, 0, 0]),
    ("subnormal", {}, [3, 3, 1e-40, -1e-40, 2, 0, 0, 0], [3, 3, 0, 0, 2, 0, 0, 0]),
    ("subnormal threshold", {}, [3, 1e-40, 1e-40, 0, 0, 0, 0, 0], [3, 1e-40, 0, 0, 0, 0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize("name, options, h, expected", CORNERS, ids=[corner[0] for corner in CORNERS])
def test_mask_encoded_corner(name, options, h, expected):
    codec = MaskEncoded(**{"ratio": 0.75} | options)
    decoded, roundtrip = jitted(codec, jnp.array(h, jnp.float32))
    for got in (decoded, roundtrip):
        np.testing.assert_allclose(got, np.float32(expected), rtol=3e-7, atol=1e-37)


@pytest.mark.parametrize(
    "codec",
    [pytest.param(codec, marks=[pytest.mark.slow] if codec.entropy_coded else []) for codec in DEFAULTS],
    ids=repr,
)
def test_scalar_and_one_sample_at_a_time(codec):
    def decoded(codec, h):
        return np.asarray(decode(codec, encode(codec, jnp.asarray(h), KEY), h))

    h = np.float32(2.5)
    got = decoded(codec, h)
    np.testing.assert_allclose(got, h, rtol=2**-11 if codec.entropy_coded else 0)  # that one's outliers are halves
    assert got.shape == ()
    if isinstance(codec, Cast | Identity) or codec.needs_key:
        return
    sample = dataclasses.replace(codec, granularity="sample")
    h = np.maximum(np.random.default_rng(0).normal(size=(3, 9)), 0).astype(np.float32)
    np.testing.assert_array_equal(decoded(sample, h), np.stack([decoded(codec, row) for row in h]))


@pytest.mark.parametrize("bits, tenths", [(8, 256), (3, 64)])
def test_multiplies_before_it_divides(bits, tenths):
    """Multiples of a step (255 of 25.5 in 8 bits) keep their code; x/τ·(2^b − 1) would floor 74 of them one too low."""
    h = np.arange(tenths, dtype=np.float32) / np.float32(10)
    codes = encode(MaskEncoded(0.999, bits=bits, rounding="floor"), jnp.asarray(h)).codes
    expected = reference.ms_codes(h, 0.999, bits, "floor", False)[1]
    assert reference.unpack(codes, bits, tenths) == expected
    assert bits != 8 or expected == list(range(256))


def test_uniform_corners():
    step = jax.jit(lambda h: Uniform(2).roundtrip(h))
    np.testing.assert_array_equal(step(jnp.array([0.1, 0.1, 0.1, 0.1])), np.float32([0.1] * 4))
    for bad in (np.nan, np.inf, -np.inf):
        assert jnp.isnan(step(jnp.array([1.0, bad, 2.0, 0.0]))).all()
    np.testing.assert_allclose(step(jnp.array([-3e38, 3e38, 0.9e38, 1.1e38])), [-3e38, 3e38, 1e38, 1e38], rtol=1e-6)
    np.testing.assert_array_equal(step(jnp.array([0.0, 0.5, 1.5, 3.0])), [0, 0, 2, 3])  # half to even


NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]  # appendix E of arXiv 2305.14314, in eight digits


def test_quantile_levels_and_corners():
    codec = Quantile(4)
    np.testing.assert_allclose(codec._levels(), NF4, atol=1e-6)
    h = jnp.asarray(NF4, jnp.float32) * 3
    np.testing.assert_allclose(codec.roundtrip(h), h, atol=4e-6)  # levels stay where they are
    np.testing.assert_array_equal(reference.unpack(encode(codec, h).codes, 4, 16), range(16))
    halfway = jnp.array([1.0, 0.5 * float(codec._levels()[8])])
    assert jitted(codec, halfway)[0][1] == 0, "the lower one of two"


@pytest.mark.parametrize("name", ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"))
def test_small_floats_are_those_of_others(name):
    """Where the largest magnitude is the largest number, so that nothing is scaled, equal to ml_dtypes to the bit."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    e, m = int(name[-5]), int(name[-3])
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    h = np.concatenate([[largest], np.random.default_rng(0).uniform(-largest, largest, 999)]).astype(np.float32)
    halves = np.arange(1 << (e + m), dtype=np.uint8).view(dtype).astype(np.float32)
    h = np.concatenate([h, (halves[1:] + halves[:-1]) / 2, halves, -halves])  # half to even
    codec = SmallFloat(e, m)
    np.testing.assert_allclose(codec.roundtrip(jnp.asarray(h)), h.astype(dtype).astype(np.float32), rtol=3e-7)
    negative_zero = (h.astype(dtype).view(np.uint8) == 1 << (e + m)) * np.uint8(1 << (e + m))
    codes = h.astype(dtype).view(np.uint8) - negative_zero
    np.testing.assert_array_equal(encode(codec, jnp.asarray(h)).codes, reference.pack(codes, 1 + e + m))


@pytest.mark.parametrize("codec", (Quantile(), SmallFloat(), SmallFloat(7, 0)), ids=repr)
def test_corners_of_fixed_levels(codec):
    for bad in (np.nan, np.inf, -np.inf):
        assert jnp.isnan(codec.roundtrip(jnp.array([1.0, bad, 0.0, 2.0]))).all()
    for h in ([0.3] * 4, [-0.3, 0.3, 0.0, -0.3], [0.0] * 4, [-3e38, 3e38, 0.0, 0.0], [1e-37, -1e-37, 0.0, 0.0]):
        np.testing.assert_array_equal(codec.roundtrip(jnp.array(h, jnp.float32)), np.float32(h))
    np.testing.assert_array_equal(np.signbit(codec.roundtrip(jnp.array([-0.0, 0.0, -0.0]))), False)
    subnormal = jnp.array([1e-40, -1e-40, 0.0])
    assert (jnp.abs(codec.roundtrip(subnormal) - subnormal) <= 1e-40).all()


@pytest.mark.parametrize("e, m", ((2, 1), (4, 3), (5, 2), (1, 2)))
def test_the_error_of_a_small_float(e, m):
    h = np.random.default_rng(1).normal(size=2000).astype(np.float32)
    codec, largest = SmallFloat(e, m), np.abs(h).max()
    smallest = largest / codec._largest
    error = np.abs(np.asarray(codec.roundtrip(jnp.asarray(h))) - h)
    assert (error <= np.maximum(np.abs(h) * 2.0 ** -(m + 1), smallest / 2) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Quantile(bits=1), "bits must be an integer in 2..8, got 1"),
        (lambda: SmallFloat(exponent_bits=0), "exponent_bits must be an integer in 1..7, got 0"),
        (lambda: SmallFloat(4, 4), "mantissa_bits must be an integer in 0..3, got 4"),
        (lambda: MaskEncoded(bits=9), "bits must be an integer in 1..8, got 9"),
        (lambda: MaskEncoded(bits=True), "bits must be an integer in 1..8, got True"),
        (lambda: Uniform(bits=0), "bits must be an integer in 1..8, got 0"),
        (lambda: StochasticUniform(bits=2.0), "bits must be an integer in 1..8, got 2.0"),
        (lambda: MaskEncoded(ratio=1), r"ratio must be a number in \[0, 1\), got 1"),
        (lambda: TopK(-0.1), r"ratio must be a number in \[0, 1\), got -0.1"),
        (lambda: RandK(math.nan), r"ratio must be a number in \[0, 1\), got nan"),
        (lambda: RandTopK("0.9"), r"ratio must be a number in \[0, 1\), got '0.9'"),
        (lambda: RandTopK(alpha=1.5), r"alpha must be a number in \[0, 1\], got 1.5"),
        (lambda: MaskEncoded(rounding="up"), "rounding must be one of 'nearest', 'floor', got 'up'"),
        (lambda: MaskEncoded(signed="no"), "signed must be one of False, True, got 'no'"),
        (lambda: TopK(granularity="row"), "granularity must be one of 'tensor', .* 'channel', got 'row'"),
        (lambda: TopK(granularity="sample").encode(jnp.float32(1)), "h must have a batch axis .* got a scalar"),
        (lambda: TopK(granularity="sample").payload_bytes(jnp.float32(1)), "h must have a batch axis .* got a scalar"),
        (lambda: TopK(granularity="channel").encode(jnp.float32(1)), "h must have a last axis .* got a scalar"),
        (lambda: compress.from_string("Gzip"), "codec must be one of Identity, .* got 'Gzip'"),
        (lambda: compress.from_string("TopK(ratio=__import__('os'))"), "codec must be one of .* got .TopK"),
        (lambda: compress.from_string("TopK(bits=3)"), "codec 'TopK.bits=3.': .*bits"),
        (lambda: compress.from_string("Uniform(bits=9)"), "bits must be an integer in 1..8, got 9"),
        (
            lambda: TopK(0.5).decode(encode(TopK(0.5), jnp.ones(4)), jnp.ones(8)),
            r"payload must be what TopK\(.*\) makes of float32\[8\], "
            r"got float32\[2\], uint8\[1\] instead of float32\[4\], uint8\[1\]",
        ),
        (lambda: compress.uniform_error_bound(jnp.ones(3), 0), "bits must be an integer in 1..8, got 0"),
        (lambda: compress.topk_error_bound(jnp.ones(3), 2.0), r"ratio must be a number in \[0, 1\), got 2.0"),
        (lambda: compress.mask_encoded_error_bound(jnp.ones(3), 0.5, 9), "bits must be an integer in 1..8, got 9"),
    ],
)
def test_value_errors_name_argument_rule_and_value(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("codec", DEFAULTS, ids=repr)
def test_dtype_and_key_errors(codec, unchecked):
    like = jax.ShapeDtypeStruct((3,), jnp.int32)
    calls = [lambda: codec.encode(jnp.arange(3)), lambda: codec.roundtrip(jnp.arange(3))]
    for call in [*calls, lambda: codec.decode((), like), lambda: codec.payload_bytes(like)]:
        with pytest.raises(TypeError, match="h must be one of float32, bfloat16, float16, got int32"):
            call()
    if codec.needs_key:
        for call in (codec.encode, codec.roundtrip):
            with pytest.raises(ValueError, match=f"key must be a JAX random key for {type(codec).__name__}, got None"):
                call(jnp.ones(3))


def over_keys(codec, h, n=4000):
    return np.asarray(
        jax.jit(jax.vmap(lambda key: codec.roundtrip(h, key)))(jax.random.split(jax.random.key(7), n)), np.float64
    )


H16 = jnp.asarray(np.random.default_rng(3).normal(size=16), jnp.float32)


@pytest.mark.parametrize("codec", [StochasticUniform(1), StochasticUniform(3), RandK(0.75), RandK(0.9)], ids=repr)
def test_unbiased(codec):
    """The mean over 4000 keys lies within five standard errors, with the stated variance, of every value."""
    h, draws = np.asarray(H16, np.float64), over_keys(codec, H16)
    if isinstance(codec, RandK):
        d, k = h.size, reference.num_kept(codec.ratio, h.size)
        variance = (d / k - 1) * h**2
        np.testing.assert_allclose(np.square(draws - h).sum(1).mean(), variance.sum(), rtol=0.1)
    else:
        variance = np.full(h.shape, ((h.max() - h.min()) / (2**codec.bits - 1)) ** 2 / 4)
        assert (draws.var(0) <= variance * 1.01).all()
    assert (np.abs(draws.mean(0) - h) <= 5 * np.sqrt(variance / len(draws)) + 1e-6).all()
    assert len(np.unique(draws, axis=0)) > 10


@pytest.mark.parametrize("ratio, alpha", [(0.75, 0.3), (0.25, 0.3)])
def test_randtopk_swaps_a_binomial_number_uniformly(ratio, alpha):
    n, d = 4000, 16
    k = reference.num_kept(ratio, d)
    kept = over_keys(RandTopK(ratio, alpha=alpha), H16, n) != 0
    assert (kept.sum(1) == k).all()
    top = reference.largest(np.abs(np.asarray(H16)), k)
    rest = np.setdiff1d(np.arange(d), top)
    swapped = kept[:, rest].sum(1)
    probability = np.array([math.comb(k, s) * alpha**s * (1 - alpha) ** (k - s) for s in range(k + 1)])
    if rest.size < k:
        probability[rest.size] = probability[rest.size :].sum()  # at most d − k
    for s in range(min(k, rest.size) + 1):
        assert abs((swapped == s).mean() - probability[s]) <= 5 * np.sqrt(probability[s] / n) + 1e-9
    mean = sum(s * probability[s] for s in range(min(k, rest.size) + 1))
    for group, expected in ((top, 1 - mean / k), (rest, mean / rest.size)):
        assert (np.abs(kept[:, group].mean(0) - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


@jax.jit
def errors_and_bounds(h):
    def error(codec):
        return jnp.sum(jnp.square(codec.roundtrip(h) - h))

    pairs = [(error(Uniform(bits)), compress.uniform_error_bound(h, bits)) for bits in (1, 3)]
    pairs += [(error(TopK(0.9)), compress.topk_error_bound(h, 0.9))]
    for options in ({"bits": 2}, {"bits": 2, "rounding": "floor"}, {"bits": 4, "rounding": "floor"}):
        pairs.append((error(MaskEncoded(0.9, **options)), compress.mask_encoded_error_bound(h, 0.9, options["bits"])))
    pairs.append((error(MaskEncoded(0.9, signed=True)), compress.mask_encoded_error_bound(h, 0.9, 2)))
    return pairs, MaskEncoded(0.9, rounding="floor").roundtrip(h), MaskEncoded(0.9).roundtrip(h)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(
        np.float32,
        37,
        elements=st.one_of(st.floats(0, 2.0**20, width=32, allow_subnormal=False), st.sampled_from([0, 0.5, 1])),
    ),
    st.sampled_from(["any", "normal", "lognormal", "uniform", "sparse"]),
    st.integers(0, 2**31),
)
def test_error_bounds_and_direction_of_bias(values, kind, seed):
    rng = np.random.default_rng(seed)
    h = {
        "any": values,
        "normal": np.abs(rng.normal(size=37)),
        "lognormal": rng.lognormal(0, 3, 37),
        "uniform": rng.uniform(0.5, 1, 37),
        "sparse": np.maximum(rng.normal(-1, 1, 37), 0),
    }[kind].astype(np.float32)
    pairs, floored, rounded = errors_and_bounds(jnp.asarray(h))
    for error, bound in pairs:
        assert error <= bound * (1 + 1e-5) + 1e-30
    assert (floored <= h * (1 + 3e-7) + 1e-37).all(), "floor is biased toward 0"
    assert (np.abs(rounded - h) <= h * (1 + 3e-7) + 1e-37).all(), "an error is at most the value"
    k = reference.num_kept(0.9, 37)
    tau = np.sort(h)[-k]
    assert (np.abs(np.asarray(floored) - h) <= tau / 3 * (1 + 1e-6) + 1e-37).all()


def test_bounds_are_the_formulas():
    h = np.abs(np.random.default_rng(0).normal(size=(5, 8))).astype(np.float32)
    norm2, dropped = np.square(h).sum(), np.sort(h.ravel())[:-4]
    np.testing.assert_allclose(compress.uniform_error_bound(jnp.asarray(h), 3), np.sqrt(40) / 7 * norm2, rtol=1e-5)
    np.testing.assert_allclose(compress.topk_error_bound(jnp.asarray(h), 0.9), 36 / 40 * norm2, rtol=1e-5)
    alpha = np.linalg.norm(dropped) / np.sqrt(norm2)
    np.testing.assert_allclose(
        compress.mask_encoded_error_bound(jnp.asarray(h), 0.9, 2), alpha * 6 / 3 * norm2, rtol=1e-5
    )
    for bound in (
        compress.uniform_error_bound,
        compress.topk_error_bound,
        functools.partial(compress.mask_encoded_error_bound, bits=2),
    ):
        assert bound(jnp.zeros((0, 3)), 0.5 if bound is not compress.uniform_error_bound else 1) == 0


class Named(np.ndarray):
    """A subclass, as other libraries have them."""


class Tensor:
    """What PyTorch's tensors are to NumPy: shape, a dtype of their own, and `__array__`."""

    dtype = "torch.float32"

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)


def test_arrays_from_elsewhere_are_taken_for_their_numbers(unchecked, tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    frozen = x.copy()
    frozen.flags.writeable = False
    same = [x.astype(">f4"), np.asfortranarray(x), x[::-1, ::-1].copy()[::-1, ::-1], frozen, x.view(np.matrix)]
    same += [np.load(tmp_path / "x.npy", mmap_mode="r"), x.view(Named), Tensor(x)]
    for codec in (TopK(0.5), Exact()):
        wanted = codec.encode(jnp.asarray(x if codec == TopK(0.5) else x.astype(np.int32)))
        expected = codec.decode(wanted, x if codec == TopK(0.5) else x.astype(np.int32))
        for h in same:
            if codec != TopK(0.5):
                if isinstance(h, Tensor):
                    continue
                h = h.astype(h.dtype.str.replace("f", "i"))
            for payload in (codec.encode(h), codec.encode_numpy(h)):
                assert [leaf.dtype for leaf in payload] == [leaf.dtype for leaf in wanted]
                assert wire.encode(payload, codec, h) == wire.encode(wanted, codec, jnp.asarray(expected))
                np.testing.assert_array_equal(codec.decode(payload, h), expected)
            np.testing.assert_array_equal(codec.roundtrip(h), expected)
            np.testing.assert_array_equal(compress.straight_through(codec, h), expected)
            message = wire.encode(wanted, codec, h)
            np.testing.assert_array_equal(wire.decode(message, expect=(codec, h)).payload[0], wanted[0])
            assert codec.payload_like(h) == codec.payload_like(expected)
    payload = TopK(0.5).encode_numpy(x)
    for foreign in ((Tensor(payload.values), payload.mask), (np.asarray(payload.values).view(Named), payload.mask)):
        np.testing.assert_array_equal(TopK(0.5).decode(foreign, x), TopK(0.5).decode(payload, x))
        assert wire.encode(foreign, TopK(0.5), x) == wire.encode(payload, TopK(0.5), x)
    other = payload._replace(values=payload.values.astype(">f4"))
    np.testing.assert_array_equal(TopK(0.5).decode(other, x), TopK(0.5).decode(payload, x))
    assert TopK(0.5).encode_numpy(x[:0].astype(">f4")).values.dtype == np.float32


def test_arrays_from_elsewhere_that_say_something_else_are_refused(unchecked):
    x = np.ones((3, 4), np.float32)
    codec, masked = TopK(0.5), np.ma.masked_array(x, x > 3)
    payload = codec.encode_numpy(x)
    hidden = payload._replace(values=np.ma.masked_array(payload.values))
    calls = [codec.encode, codec.encode_numpy, codec.roundtrip, lambda h: compress.straight_through(codec, h)]
    for call in calls:
        with pytest.raises(TypeError, match=r"h must have no mask: fill it first, .* got a masked array"):
            call(masked)
        for wrong, name in ((x.tolist(), "list"), (1.0, "float")):
            with pytest.raises(TypeError, match=f"h must be an array, got {name}"):
                call(wrong)
        with pytest.raises(TypeError, match=r"h must be one of float32, .* got float64"):
            call(np.zeros(4))
        with pytest.raises(TypeError, match=r"h must be one of float32, .* got key<fry>"):
            call(KEY)
    for call in (lambda: codec.decode(hidden, x), lambda: wire.encode(hidden, codec, x)):
        with pytest.raises(TypeError, match=r"payload must have no mask: fill it first"):
            call()


def test_tensors_of_pytorch(unchecked):
    torch = pytest.importorskip("torch")
    x = torch.arange(12.0).reshape(3, 4)
    for h in (x, x.T.contiguous().T, x.bfloat16(), x.half()):
        expected = np.asarray(TopK(0.5).roundtrip(jnp.asarray(h.float().numpy())))
        np.testing.assert_array_equal(np.asarray(TopK(0.5).roundtrip(h), np.float32), expected)
        np.testing.assert_array_equal(np.asarray(TopK(0.5).encode_numpy(h).values, np.float32).size, 6)
    with pytest.raises(TypeError, match=r"h must be an array, got Tensor: .*requires grad"):
        TopK(0.5).encode(x.requires_grad_())

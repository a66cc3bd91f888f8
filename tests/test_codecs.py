"""The contract that every codec keeps, against `reference.py`; then Figure 1 and the golden bytes.

If a change was meant: raise the wire version, then UPDATE_GOLDEN=1 python -m pytest tests/test_codecs.py -k golden
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from msjax import compress, wire
from msjax.compress import (
    Cast,
    EntropyMask,
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
from .helpers import case_id, encode

GOLDEN = pathlib.Path(__file__).parent / "golden" / "payloads.json"
SHAPES = ((1,), (7,), (3, 5, 7), (2, 8, 8, 4), (0,), (0, 3))
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
DEFAULTS = tuple(cls() for cls in compress.CODECS)
OTHERS = (
    MaskEncoded(0.75, bits=1),
    MaskEncoded(0.75, bits=2, rounding="floor"),
    MaskEncoded(0.9, bits=3, signed=True),
    MaskEncoded(0.9, bits=4, granularity="sample"),
    MaskEncoded(0.5, bits=5, rounding="floor", signed=True, granularity="sample"),
    MaskEncoded(0.9, bits=8, signed=True),
    MaskEncoded(0, bits=6),
    MaskEncoded(0.9, bits=7),
    MaskEncoded(0.75, bits=1, signed=True),
    TopK(0.7, granularity="sample"),
    RandTopK(0.7, alpha=0, granularity="sample"),
    RandTopK(0.4, alpha=1.0),
    Uniform(1),
    Uniform(8, granularity="sample"),
    StochasticUniform(2, granularity="sample"),
    Quantile(2, granularity="sample"),
    Quantile(8),
    SmallFloat(4, 3, granularity="sample"),
    SmallFloat(1, 0),
    SmallFloat(5, 2),
    SmallFloat(7, 0),
    RandK(0.7, granularity="sample"),
    EntropyMask(bits=2.0, signed=True),
    EntropyMask(error=0.01, levels=4, ratio=0.9, granularity="sample"),
    EntropyMask(bits=1.0, levels=31, signed=True, rounding="stochastic", ratio=0.8),
    EntropyMask(bits=1.0, levels=5, keep_zeros=True),
    Quantile(3, granularity="token"),
    SmallFloat(granularity="channel"),
    Uniform(3, granularity="channel"),
    MaskEncoded(0.8, bits=2, signed=True, granularity="token"),
    MaskEncoded(0.8, bits=3, granularity="channel"),
    StochasticUniform(2, granularity="channel"),
    RandTopK(0.7, granularity="token"),
    TopK(0.7, granularity="channel"),
    EntropyMask(bits=2.0, signed=True, granularity="channel"),
)
QUICK_SHAPES = ((1,), (3, 5, 7), (0,))
CASES = [(codec, shape, jnp.float32) for codec in DEFAULTS for shape in SHAPES]
CASES += [(codec, (3, 5, 7), dtype) for codec in DEFAULTS for dtype in DTYPES[1:]]
CASES += [(codec, (3, 5, 7), DTYPES[i % 3]) for i, codec in enumerate(OTHERS)]
CASES += [(codec, (0, 3), jnp.float32) for codec in OTHERS if codec.granularity != "tensor"]
KEY = jax.random.key(0)


def is_slow(codec, shape=(3, 5, 7), dtype=jnp.float32):
    """Quick are some shapes and types of each codec as it is by default, and MS in most of its ways.

    EntropyMask takes as long as all others: one case.
    """
    if codec not in DEFAULTS:
        return not isinstance(codec, MaskEncoded) or codec.bits in (6, 7)
    if isinstance(codec, EntropyMask):
        return (shape, dtype) != ((3, 5, 7), jnp.float32)
    return shape not in QUICK_SHAPES or dtype == jnp.float16


def marked(cases, slow=is_slow):
    """`cases`, single codecs or tuples, as parameters, marked where they are slow."""
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] if slow(*case) else []) for case in tuples]


LONG = (3, 40_001)
TOLERANCE = {"float32": 3e-7, "bfloat16": 2**-7, "float16": 2**-10}
traces = collections.Counter()


def is_other(codec):
    return codec not in DEFAULTS


def is_slow_eagerly(codec):
    return codec not in (Identity(), MaskEncoded(), Uniform())


def is_random(codec):
    """Or takes as long."""
    return codec.needs_key or codec.entropy_coded


def has_numpy(codec):
    return not is_random(codec)


def fields_of(codec):
    return {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}


def program(codec, h, key):
    """All of a codec in one program."""
    payload = codec.encode(h, key)
    return payload, codec.decode(payload, jax.ShapeDtypeStruct(h.shape, h.dtype)), codec.roundtrip(h, key)


@functools.partial(jax.jit, static_argnums=0)
def jitted(codec, h, key):
    """The same; the counter says how often JAX traces it."""
    traces[codec, h.shape, h.dtype] += 1
    return program(codec, h, key)


@functools.cache
def inputs(shape, dtype):
    rng = np.random.default_rng(len(shape))
    normal = rng.normal(size=shape)
    wild = rng.choice([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -2.0, 60000.0], shape)
    most, least = (float(getattr(jnp.finfo(dtype), name)) for name in ("max", "tiny"))
    return {
        name: jnp.asarray(x, dtype)
        for name, x in {
            "relu": np.maximum(normal, 0),
            "signed": normal,
            "wide": rng.lognormal(0, 2, shape),
            "ties": rng.integers(-3, 4, shape) / 2,
            "zeros": np.zeros(shape),
            "constant": np.full(shape, 0.3),
            "negative": -1 - np.abs(normal),
            "wild": wild,
            "extreme": rng.choice([most, -most, most / 3, least, -least, 1.0, -0.0], shape),
            "both zeros": rng.choice([0.0, -0.0], shape),
            "one largest": np.where(np.arange(math.prod(shape)).reshape(shape), most / 218, most),
        }.items()
    }


def check(codec, h, payload, decoded, roundtrip):
    name, fields = type(codec).__name__, fields_of(codec)
    assert decoded.shape == roundtrip.shape == h.shape and decoded.dtype == roundtrip.dtype == h.dtype
    assert same(decoded, roundtrip)
    leaves = [np.asarray(leaf) for leaf in payload]
    expected_bytes = reference.payload_bytes(name, h.shape, h.dtype.itemsize, fields)
    assert codec.payload_bytes(h) == sum(leaf.nbytes for leaf in leaves) == expected_bytes
    assert [(leaf.shape, leaf.dtype) for leaf in codec.payload_like(h)] == [(leaf.shape, leaf.dtype) for leaf in leaves]
    reference.check_encoded(name, np.asarray(h), leaves, fields)
    expected = reference.decode_array(name, leaves, h.shape, np.asarray(h).dtype, fields)
    # Relative for MS and the sparsifiers; min–max levels are relative to the ends, which may cancel.
    scale = np.abs(np.asarray(h, np.float32)).max(initial=0) if isinstance(codec, Uniform) else 0
    assert close(decoded, expected, h, scale if np.isfinite(scale) else 0)
    if np.isfinite(np.asarray(h, np.float32)).all():
        assert (
            np.isfinite(np.asarray(decoded, np.float32)).all() and np.isfinite(np.asarray(roundtrip, np.float32)).all()
        )
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves)


def same(a, b):
    """Equal to the bit, any NaN equal to any other."""
    a, b = np.array(a), np.array(b)
    if a.dtype != np.uint8:
        a[np.isnan(a)], b[np.isnan(b)] = np.nan, np.nan
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def all_same(some, others):
    return all(same(a, b) for a, b in zip(some, others, strict=True))


def close(a, b, h, scale=None):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    rtol = TOLERANCE[h.dtype.name]
    tiny = 1e-37 if h.dtype != jnp.float16 else 2.0**-24  # subnormal numbers
    scale = np.nan_to_num(np.abs(np.asarray(h, np.float32)), posinf=0).max(initial=0) if scale is None else scale
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(scale) + tiny)
    return True


@pytest.mark.parametrize("codec, shape, dtype", marked(CASES), ids=case_id)
def test_contract_jit(codec, shape, dtype):
    for name, h in inputs(shape, dtype).items():
        equal_codec = compress.from_string(repr(codec))  # another object: a static argument is compared by value
        try:
            check(codec, h, *jitted(equal_codec, h, KEY))
        except AssertionError as error:
            raise AssertionError(f"input {name!r}: {error}") from error
    assert traces[codec, shape, jnp.dtype(dtype)] == 1, "one compilation for all inputs and equal codecs"


@pytest.mark.parametrize("codec", marked(DEFAULTS + OTHERS[2:3], slow=is_slow_eagerly), ids=case_id)
def test_contract_eager(codec):
    """Each operation its own program, the same payload: client and server may be compiled apart."""
    h = inputs((3, 5, 7), jnp.float32)["signed"]
    payload, decoded, roundtrip = program(codec, h, KEY)
    check(codec, h, payload, decoded, roundtrip)
    jit_payload, jit_decoded, _ = jitted(codec, h, KEY)
    assert all_same(payload, jit_payload), "same key, same payload"
    assert same(decoded, jit_decoded)


@pytest.mark.parametrize(
    "codec, dtype",
    marked(
        [(codec, jnp.float32) for codec in DEFAULTS + OTHERS[22:23]]
        + [(codec, dtype) for codec in (RandK(), EntropyMask()) for dtype in DTYPES[1:]],
        slow=lambda codec, dtype: codec not in (Identity(), Uniform()),
    ),
    ids=case_id,
)
def test_no_nan_or_inf_comes_of_finite_numbers(codec, dtype):
    """Not even one that is not used: each operation is looked at by itself, under `vmap` that of every branch, too.

    Not of codecs that select: the NaN that they name as a constant would be found.
    """
    kinds = inputs((24,), dtype)
    odd, limits = np.arange(24) % 2 == 1, jnp.finfo(dtype)
    more = [np.arange(24), np.where(odd, -1, float(limits.tiny)), np.where(odd, -float(limits.max), 1)]
    h = jnp.stack([x for name, x in kinds.items() if name != "wild"] + [jnp.asarray(x, dtype) for x in more])
    codec = codec if isinstance(codec, Identity | Cast) else dataclasses.replace(codec, granularity="sample")
    selects = isinstance(codec, MaskEncoded | TopK | RandTopK | EntropyMask)
    with jax.debug_nans(True), jax.debug_infs(True), contextlib.nullcontext() if selects else jax.disable_jit():
        decoded = codec.decode(codec.encode(h, KEY), h)
        down = dataclasses.replace(codec, signed=True) if hasattr(codec, "signed") else codec
        _, pull = jax.vjp(lambda h: compress.straight_through(codec, h, KEY, down), h)
        pull(decoded)


@pytest.mark.parametrize("codec, shape, dtype", marked(case for case in CASES if has_numpy(case[0])), ids=case_id)
def test_numpy_encodes_the_same(codec, shape, dtype):
    for name, h in inputs(shape, dtype).items():
        payload = codec.encode_numpy(np.asarray(h))
        try:
            reference.check_encoded(type(codec).__name__, np.asarray(h), payload, fields_of(codec))
            expected = jitted(codec, h, KEY)[0]
            assert type(payload) is type(expected) and all_same(payload, expected)
        except AssertionError as error:
            raise AssertionError(f"input {name!r}: {error}") from error


@pytest.mark.parametrize(
    "codec",
    marked(
        (c for c in DEFAULTS + OTHERS if getattr(c, "granularity", "tensor") == "tensor" and has_numpy(c)),
        slow=is_other,
    ),
    ids=case_id,
)
@pytest.mark.parametrize("kind", ("relu", "wide", "ties", "wild"))
def test_numpy_encodes_long_arrays_the_same(codec, kind):
    """Longer than a piece, and than what is selected by sorting."""
    h = inputs(LONG, jnp.float32)[kind]
    assert all_same(codec.encode_numpy(np.asarray(h)), encode(codec, h))


def test_numpy_encoding_of_what_it_does_not_do():
    for codec in (codec for codec in DEFAULTS if codec.needs_key):
        with pytest.raises(
            ValueError, match=f"codec must not be random to encode with NumPy, got {type(codec).__name__}"
        ):
            codec.encode_numpy(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="codec must be one that has a NumPy encoder, got EntropyMask"):
        EntropyMask().encode_numpy(np.zeros(4, np.float32))
    with pytest.raises(TypeError, match="h must be one of float32, bfloat16, float16, got float64"):
        Identity().encode_numpy(np.zeros(4))


@pytest.mark.parametrize("codec", marked(DEFAULTS + OTHERS[4:5] + OTHERS[21:25], slow=is_random), ids=case_id)
def test_contract_vmap(codec):
    """A codec under `vmap`, and under `vmap` within `shard_map`, gives what it gives one by one."""
    h = jax.random.normal(jax.random.key(1), (8, 3, 7))
    keys = jax.random.split(KEY, 8)
    one = functools.partial(program, codec)
    rows, payload, decoded, roundtrip = jax.tree.map(np.asarray, (h, *jax.jit(jax.vmap(one))(h, keys)))
    for i in range(8):
        check(codec, rows[i], jax.tree.map(lambda leaf: leaf[i], payload), decoded[i], roundtrip[i])  # noqa: B023
    if codec not in DEFAULTS and not codec.entropy_coded:
        return
    mesh = jax.make_mesh((4,), ("client",), axis_types=(jax.sharding.AxisType.Auto,))
    client = jax.sharding.PartitionSpec("client")
    sharded = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=client, out_specs=client)
    for got, want in zip(
        jax.tree.leaves(jax.jit(sharded)(h, keys)), jax.tree.leaves((payload, decoded, roundtrip)), strict=True
    ):
        assert same(got, want)


@pytest.mark.parametrize("codec", [Cast(), Quantile(), MaskEncoded(), EntropyMask()], ids=case_id)
def test_what_has_16_bits_is_rounded_within_one_program(codec):
    """Without a barrier XLA may keep more bits on a GPU or TPU; a CPU, where tests run, does not show it."""
    h = jax.ShapeDtypeStruct((4, 6), jnp.float32 if isinstance(codec, Cast) else jnp.bfloat16)
    traced = str(jax.make_jaxpr(lambda h: codec.decode(codec.encode(h), h))(h))
    is_narrow = any(leaf.dtype in (jnp.bfloat16, jnp.float16) for leaf in jax.tree.leaves(codec.payload_like(h)))
    assert ("optimization_barrier" in traced) == is_narrow
    if not isinstance(codec, MaskEncoded | Quantile):  # which make no payload there
        assert ("optimization_barrier" in str(jax.make_jaxpr(codec.roundtrip)(h))) == is_narrow


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "codec",
    marked((RandTopK(0.7), Quantile(8), EntropyMask(bits=2.0, signed=True)), slow=lambda codec: codec.entropy_coded),
    ids=case_id,
)
def test_some_axes_of_a_mesh_are_manual(codec, kind):
    """As on pods: `shard_map` divides the batch, XLA or the types the rest. Traced alone, as nothing else can fail."""
    mesh = jax.make_mesh((2, 2), ("client", "model"), axis_types=(kind, kind))

    def one(h, key):
        payload = codec.encode(h, key)
        gradient = jax.grad(lambda h: compress.straight_through(codec, h, key).sum())(h)
        return gradient, codec.decode(payload, h), wire.estimate_bytes(payload, codec, h)[None]

    own = jax.sharding.PartitionSpec("client")
    h = jax.ShapeDtypeStruct((2, 3, 64), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, own))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(one, in_specs=(own, None), out_specs=own, axis_names={"client"})
        assert jax.eval_shape(mapped, h, KEY)[0].shape == h.shape


@pytest.mark.slow
def test_one_key_for_all_devices():
    """A key that does not vary over the mesh, for values that do."""
    codec = EntropyMask(bits=1.5, signed=True, rounding="stochastic")
    mesh = jax.make_mesh((2,), ("client",), axis_types=(jax.sharding.AxisType.Auto,))
    client = jax.sharding.PartitionSpec("client")
    h = jax.random.normal(jax.random.key(1), (2, 300))
    one = jax.vmap(lambda h: codec.roundtrip(h, KEY))
    got = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=client, out_specs=client))(h)
    assert same(got, jax.jit(one)(h))


@pytest.mark.parametrize(
    "codec",
    marked((TopK(0.7), Quantile(3, granularity="sample"), EntropyMask(bits=2.0, signed=True)), slow=is_random),
    ids=case_id,
)
def test_on_a_mesh_with_explicit_axes(codec):
    """As `jax.make_mesh` makes it: an array that is sharded by samples gives what it gives on one device."""
    mesh = jax.make_mesh((2,), ("data",))
    h = jax.random.normal(jax.random.key(1), (4, 50))
    spread = jax.device_put(h, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None)))
    roundtrip = codec.roundtrip(spread)
    assert roundtrip.sharding == spread.sharding
    payload = codec.encode(spread)
    for got, want in zip(payload, codec.encode(h), strict=True):
        assert same(got, want)
    assert same(wire.estimate_bytes(payload, codec, spread), wire.estimate_bytes(payload, codec, h))
    want = codec.roundtrip(h)
    assert same(roundtrip, want) and same(codec.decode(payload, spread), want)
    if codec.entropy_coded:
        at_bits = codec.encode_at_bits
        assert all_same(at_bits(spread, jnp.float32(1.5)), at_bits(h, jnp.float32(1.5)))
    kept = codec.put_kept(payload, codec.take_kept(payload, spread), spread)
    assert same(kept, codec.put_kept(payload, codec.take_kept(payload, h), h))
    loss = lambda h, g: (compress.straight_through(codec, h, grad_codec=codec) * g).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(spread, spread)
    assert gradient.sharding == spread.sharding and same(gradient, want)


@pytest.mark.parametrize("codec", marked((*DEFAULTS, Uniform(4), Quantile(2)), slow=is_random), ids=case_id)
def test_what_is_lost_is_the_difference_from_what_comes(codec):
    """To the bit, also where both are computed in one program: nothing is fused across the codec."""

    @jax.jit
    def both(h):
        decoded = codec.decode(codec.encode(h, KEY), h)
        return decoded, h - decoded

    h = jax.random.normal(jax.random.key(7), (24,))
    decoded, lost = both(h)
    assert same(lost, h - decoded)


@pytest.mark.parametrize("codec", DEFAULTS + OTHERS, ids=case_id)
def test_is_its_configuration(codec):
    again = compress.from_string(repr(codec))
    assert again == codec and hash(again) == hash(codec) and repr(again) == repr(codec) and type(again) is type(codec)
    assert codec == dataclasses.replace(codec) and codec != "codec"
    assert len({codec, again}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        codec.ratio = 0.5
    assert isinstance(codec.at_inference(), TopK if isinstance(codec, RandTopK) else type(codec))
    like = jax.ShapeDtypeStruct((6, 7), jnp.bfloat16)  # shapes alone are enough
    assert codec.payload_bytes(like) == reference.payload_bytes(type(codec).__name__, (6, 7), 2, fields_of(codec))


def test_numpy_scalars_and_ints_are_taken_for_what_they_are(unchecked):
    """So that the text of every codec can be read back, and equal codecs have equal texts."""
    made = compress.MaskEncoded(ratio=np.float32(0.75), bits=np.int64(3), signed=np.bool_(True))
    assert made == compress.from_string(repr(made)) and repr(made) == repr(compress.MaskEncoded(0.75, 3, signed=True))
    assert repr(compress.TopK(ratio=0)) == repr(compress.TopK(ratio=0.0))
    for kind in (np.float16, np.float32, np.float64, np.longdouble):
        assert TopK(kind(0.99)) == TopK(0.99) and RandTopK(0.9, alpha=kind(0.3)) == RandTopK(0.9, alpha=0.3)
        options = {"error": 0.07, "ratio": 0.9, "dead_zone": 0.2}
        assert EntropyMask(**{name: kind(value) for name, value in options.items()}) == EntropyMask(**options)
        assert EntropyMask(bits=kind(1.3)) == EntropyMask(bits=1.3)
    assert TopK(jnp.bfloat16(0.5).dtype.type(0.5)) == TopK(0.5)
    assert MaskEncoded(0.9, np.uint8(3), np.str_("floor"), granularity=np.str_("sample")) == MaskEncoded(
        0.9, 3, "floor", granularity="sample"
    )
    assert TopK(np.float32(0.99)).payload_like(jnp.zeros(1000)).values.size == 10
    assert repr(compress.EntropyMask(bits=2)) == repr(compress.EntropyMask(bits=np.float64(2.0)))


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_64_bits():
    """Each way to draw numbers, those for the rate control too."""
    h = jax.random.normal(jax.random.key(1), (8, 64), jnp.float32)
    codecs = [EntropyMask(bits=1.5, signed=True, rounding="stochastic"), RandTopK(0.7, granularity="sample")]
    codecs += [StochasticUniform(2), RandK(0.7), EntropyMask(error=0.01, signed=True, rounding="stochastic")]

    def all_of():
        return [(codec.encode(h, KEY), codec.roundtrip(h, KEY)) for codec in codecs]

    expected = all_of()
    with jax.enable_x64(True):
        found = all_of()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(expected)]


@pytest.mark.parametrize("codec", marked(DEFAULTS, slow=is_random), ids=case_id)
def test_with_64_bits_switched_on(codec):
    """The payload is the same, of an array that is long enough for every algorithm."""
    h = inputs(LONG, jnp.float32)["signed"]
    key = KEY if codec.needs_key else None
    expected = encode(codec, h, key) if codec.needs_key else encode(codec, h)  # of which there is a program already
    with jax.enable_x64(True):
        payload, decoded, estimate = jax.jit(
            lambda h, key: (p := codec.encode(h, key), codec.decode(tuple(p), h), wire.estimate_bytes(p, codec, h))
        )(h, key)
    assert decoded.dtype == estimate.dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, payload, expected)


def test_an_array_of_numpy_within_jit(unchecked):
    h = np.ones(1000, np.float32)
    payload = jax.jit(lambda key: compress.RandK().encode(h, key))(KEY)
    jax.tree.map(np.testing.assert_array_equal, payload, encode(compress.RandK(), jnp.asarray(h), KEY))


def test_sizes_that_are_not_known_or_too_large(unchecked):
    (batch,) = export.symbolic_shape("b")
    encode = export.export(jax.jit(compress.Cast().encode))
    with pytest.raises(ValueError, match=r"h must have a shape of numbers, .* got the size b"):
        encode(jax.ShapeDtypeStruct((batch, 4), jnp.float32))
    with pytest.raises(ValueError, match=r"h must have fewer than 2\^31 values, got shape \[65536, 32768\]"):
        jax.eval_shape(compress.Cast().encode, jax.ShapeDtypeStruct((1 << 16, 1 << 15), jnp.float32))


def test_figure_1():
    h = jnp.array([[2.2, 0.8, 1.2, 0.4], [1.8, 0.2, 3.1, 2.0], [2.1, 0.2, 1.1, 1.7], [0.3, 2.8, 1.4, 0.9]])
    floor, nearest, topk = MaskEncoded(0.75, rounding="floor"), MaskEncoded(0.75), TopK(0.75)
    found = jax.jit(lambda h: [codec.roundtrip(h) for codec in (floor, nearest, topk)])(h)
    errors = [np.linalg.norm(np.asarray(decoded) - h).item() for decoded in found]
    assert [round(error, 2) for error in errors] == [1.18, 1.02, 4.06]
    assert [codec.payload_bytes(h) for codec in (Identity(), floor, nearest)] == [64, 20, 20]
    payload = encode(floor, h)
    np.testing.assert_array_equal(payload.values, np.float32([2.2, 3.1, 2.1, 2.8]))
    codes = reference.unpack(payload.codes, 2, 16)  # 1.4·3/2.1 is the 2 in the last row
    assert codes == [3, 1, 1, 0, 2, 0, 3, 2, 3, 0, 1, 2, 0, 3, 2, 1]
    assert reference.ms_codes(np.asarray(h).ravel(), 0.75, 2, "floor", False)[1] == codes


@pytest.mark.parametrize("slow", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("quick", "slow"))
def test_golden_payloads(slow):
    """Payload bytes never change by accident: a peer of another version could not read them."""
    h = np.float32([(i * 37 % 23) / 4 - 1 for i in range(105)]).reshape(3, 5, 7)
    cases = {f"{case[0]!r} {jnp.dtype(case[2]).name}": case for case in CASES if case[1] == h.shape}
    found = {}
    for name, (codec, _, dtype) in cases.items():
        if is_slow(codec, h.shape, dtype) == slow:
            payload = jitted(codec, jnp.asarray(h.astype(dtype)), KEY)[0]
            found[name] = {part: np.asarray(leaf).tobytes().hex() for part, leaf in payload._asdict().items()}
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("UPDATE_GOLDEN"):
        golden = {name: (golden | found).get(name) for name in cases}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    changed = [name for name in found if found[name] != golden.get(name)] + sorted(cases.keys() ^ golden.keys())
    assert not changed, f"payload bytes changed of {changed}. {__doc__.split(chr(10))[-2]}"


@dataclasses.dataclass(frozen=True)
class Lies(compress.Codec):
    """A user's codec that sends more than it says, or decodes to another dtype."""

    how: str

    def _encode(self, h, key=None):
        return (h.reshape(-1),)

    def _payload_like(self, like):
        return (jax.ShapeDtypeStruct((1 if self.how == "encode" else like.size,), like.dtype),)

    def _decode(self, payload, like):
        return payload[0].reshape(like.shape).astype(jnp.float16)


@dataclasses.dataclass(frozen=True)
class LiesOfVectors(compress.VectorCodec):
    """The same, of vectors: four bytes a value where it says one."""

    def _encode_vector(self, x, key):
        return (jnp.round(x).astype(jnp.int32),)

    def _vector_like(self, d, dtype):
        return (jax.ShapeDtypeStruct((d,), jnp.int8),)

    def _decode_vector(self, payload, like):
        return payload[0].astype(like.dtype)


def test_a_codec_whose_options_nobody_sees_is_refused():
    """Two of unlike options would be equal, and share a compiled program and a text in messages."""

    class Scaled(compress.Identity):
        def __init__(self, scale):
            self.scale = scale

    with pytest.raises(TypeError, match=r"Scaled must be decorated with @dataclasses\.dataclass\(frozen=True\), as a"):
        Scaled(2.0)

    @dataclasses.dataclass(frozen=True, eq=False)
    class Alike(compress.Identity):
        scale: float

    with pytest.raises(TypeError, match="Alike must be decorated"):
        Alike(2.0)

    class Renamed(compress.TopK):
        """Without options of its own."""

    assert Renamed(0.9) == Renamed(0.9) != Renamed(0.8)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "encode",
            r"_encode of Lies\(how='encode'\) must return what its _payload_like says, float32\[1\], got float32",
        ),
        (
            "decode",
            r"_decode of Lies\(how='decode'\) must return shape and dtype of `like`, float32\[2, 3\], got float16",
        ),
    ],
)
def test_a_codec_that_is_not_what_it_says_is_refused(how, message):
    codec, h = Lies(how), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=message):
        codec.roundtrip(h)
    with pytest.raises(ValueError, match=r"_encode of LiesOfVectors.* must return what its _payload_like says, int8"):
        jax.grad(lambda h: compress.straight_through(Identity(), h, None, LiesOfVectors()).sum())(h)
    with pytest.raises(ValueError, match=message):
        codec.decode(codec.encode(h), h)

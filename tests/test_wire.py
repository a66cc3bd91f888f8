"""Messages: what comes back, and the bytes of the format.

If a change was meant: raise `wire.VERSION`, then UPDATE_GOLDEN=1 python -m pytest tests/test_wire.py -k golden
"""

import dataclasses
import functools
import json
import os
import pathlib
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax import wire
from msjax.compress import (
    Cast,
    EntropyMask,
    Identity,
    MaskEncoded,
    RandTopK,
    TopK,
    Uniform,
    _buffers,
    _contexts,
    _deflate,
)

from . import helpers
from .helpers import (
    CODECS,
    DTYPES,
    KEY,
    MASK,
    MIB,
    assert_same,
    case_id,
    decode_or_refuse,
    form_of,
    message,
    payload_of,
    traced_peak,
)

GOLDEN = pathlib.Path(__file__).parent / "golden" / "messages.json"
SHAPES = ((), (0,), (7,), (2, 3, 5, 4))
CASES = [
    (codec, shape, dtype)
    for codec in CODECS
    for shape in SHAPES
    for dtype in DTYPES
    if shape or getattr(codec, "granularity", "tensor") == "tensor"  # a scalar has no samples
]


@pytest.mark.parametrize("compression", wire.COMPRESSIONS)
@pytest.mark.parametrize(
    "codec, shape, dtype",
    [pytest.param(*case, marks=[] if case[2] == np.float32 or case[1] == (7,) else pytest.mark.slow) for case in CASES],
    ids=case_id,
)
def test_round_trip(codec, shape, dtype, compression):
    like, payload = jax.ShapeDtypeStruct(shape, dtype), payload_of(codec, shape, dtype)
    data = wire.encode(payload, codec, like, compression=compression)
    for options in ({}, {"expect": (codec, like)}):
        found = decode_or_refuse(data, **options)
        assert type(found.payload) is type(payload)
        assert_same(found.payload, payload)
        assert found.codec == codec and repr(found.codec) == repr(codec)
        assert found.like.shape == shape and found.like.dtype == dtype
        raw = sum(leaf.nbytes for leaf in jax.tree.leaves(payload))
        assert found.nominal_bytes == codec.payload_bytes(like) == raw
        assert found.wire_bytes == len(data)
        if compression is None and not codec.entropy_coded:
            whole = np.frombuffer(data, np.uint8)
            assert all(np.shares_memory(leaf, whole) for leaf in jax.tree.leaves(found.payload) if leaf.size)

    bare = wire.encode_bare(payload, codec, like, compression=compression)
    found = wire.decode_bare(bare, codec, like)
    assert_same(found.payload, payload)
    assert (found.codec, found.like, found.wire_bytes) == (codec, like, len(bare)) and len(bare) < len(data) - 16


BARE_LIKE = jax.ShapeDtypeStruct((1, 1, 64), np.float32)


def test_a_bare_message_is_four_bytes_and_one_a_buffer_longer_than_its_payload():
    for codec, buffers in ((Identity(), 1), (TopK(ratio=0.9), 2), (MaskEncoded(ratio=0.9, bits=4, signed=True), 3)):
        data = wire.encode_bare(codec.encode(jnp.ones((1, 1, 64))), codec, BARE_LIKE)
        assert len(data) == codec.payload_bytes(BARE_LIKE) + 4 + buffers


def test_a_bare_message_of_something_else_is_refused():
    codec, h = EntropyMask(), jax.random.normal(KEY, (1, 1, 64))
    data = wire.encode_bare(codec.encode(h), codec, BARE_LIKE)
    for other in ((EntropyMask(bits=2.0), BARE_LIKE), (codec, jax.ShapeDtypeStruct((1, 64), np.float32))):
        with pytest.raises(wire.WireError, match="checksum is wrong: the message was damaged, or is not EntropyMask"):
            wire.decode_bare(data, *other)
    with pytest.raises(wire.WireError, match="the payload must have at most 8 bytes"):
        wire.decode_bare(data, codec, BARE_LIKE, max_bytes=8)
    head = zlib.crc32(wire._form(codec, BARE_LIKE))
    body, refused = data[4:], 0
    damaged = [body[:at] for at in range(len(body))] + [body + b"0"]
    damaged += [body[:at] + bytes([body[at] ^ bit]) + body[at + 1 :] for at in range(len(body)) for bit in (1, 128)]
    for one in damaged:  # with a checksum that fits
        try:
            wire.decode_bare(struct.pack("<I", zlib.crc32(one, head)) + one, codec, BARE_LIKE)
        except wire.WireError:
            refused += 1
    assert refused > len(body)  # other values may be a message


@pytest.mark.parametrize("kind", (bytes, bytearray, memoryview))
def test_any_buffer_is_decoded(kind):
    data = kind(message(shape=(2,), buffers=((0, struct.pack("<2f", 1.5, -2)),)))
    np.testing.assert_array_equal(wire.decode(data).payload.values, np.float32([1.5, -2]))


@functools.partial(jax.jit, static_argnums=(0, 2))
def decode(codec, payload, like):
    return codec.decode(payload, like)


@pytest.mark.parametrize("compression", wire.COMPRESSIONS)
@pytest.mark.parametrize("codec", (Identity(), MaskEncoded(0.9), TopK(0.9), RandTopK(0.9), Uniform(3)), ids=case_id)
def test_features_come_back(codec, compression):
    """The views, which start at any byte, are as good to `codec.decode` as the arrays that were sent."""
    h = jnp.maximum(jax.random.normal(jax.random.key(1), (4, 32, 9)), 0)
    payload = helpers.encode(codec, h, KEY)
    found = wire.decode(wire.encode(payload, codec, h, compression=compression), expect=(codec, h))
    like = jax.ShapeDtypeStruct(h.shape, h.dtype)
    decoded = jax.jit(lambda: codec.decode(found.payload, like))()  # of the views themselves, not of arguments
    np.testing.assert_array_equal(decoded, decode(codec, payload, like))


def lengths(codes):
    """Of a buffer without neighbours, by coding."""
    return {1: len(_deflate.huffman(codes)), 3: len(_deflate.runs(codes)), 4: len(_contexts.coded(codes, None))}


def test_huffman_shortens_codes_only():
    codec, shape = MaskEncoded(), (64, 1024)
    like, payload = jax.ShapeDtypeStruct(shape, np.float32), payload_of(codec, shape, np.float32)
    plain, coded = (wire.encode(payload, codec, like, compression=c) for c in (None, "huffman"))
    header = 4 + 1 + 4 + 2 + len(MASK) + 2 + 4 * 2 + 1 + 9 * 3
    assert len(plain) == header + codec.payload_bytes(like)
    codes = min(lengths(payload.codes).values())
    assert len(coded) == header + payload.values.nbytes + codes < 0.6 * len(plain)
    # Codes that no code shortens stay as they are.
    noise = payload._replace(codes=np.frombuffer(np.random.default_rng(0).bytes(payload.codes.size), np.uint8))
    assert wire.encode(noise, codec, like, compression="huffman") == wire.encode(noise, codec, like)


@pytest.mark.parametrize(
    "codec, least, most", ((Identity(), 0.8, 0.86), (Cast(), 0.62, 0.7), (Cast("float16"), 0.8, 0.9))
)
def test_weights_are_shorter_by_their_exponents(codec, least, most):
    """As `compression="all"` has them, and as `estimate_bytes` says."""
    weights = jnp.concatenate([jax.random.normal(jax.random.key(n), (30_000,)) * 0.5**n for n in range(4)])
    payload = codec.encode(weights)
    plain, coded = (wire.encode(payload, codec, weights, compression=c) for c in ("huffman", "all"))
    assert (plain[4], coded[4]) == (1, 4) and least < len(coded) / len(plain) < most
    assert_same(wire.decode(coded).payload, payload)
    estimate = jax.jit(functools.partial(wire.estimate_bytes, codec=codec, like=weights, compression="all"))
    assert float(estimate(payload)) == pytest.approx(len(coded), rel=0.02)
    # Noise stays as it is, and so do the floats of a codec whose zeros are cut.
    noise = type(payload)(np.frombuffer(np.random.default_rng(0).bytes(payload[0].nbytes), payload[0].dtype))
    assert wire.encode(noise, codec, weights, compression="all") == wire.encode(noise, codec, weights)
    entropy = EntropyMask(bits=2.0, signed=True)
    payload = entropy.encode(weights)
    assert wire.encode(payload, entropy, weights, compression="all") == wire.encode(payload, entropy, weights)


def test_huffmans_best_case_is_within_the_decoders_bound():
    """All codes equal: a bit a byte, the least that the decoder believes. Through several of its pieces."""
    codec, like = MaskEncoded(), jax.ShapeDtypeStruct((1 << 23,), jnp.bfloat16)
    form = form_of(codec, like.shape, like.dtype)
    payload = jax.tree.map(lambda f: np.zeros(f.shape, f.dtype), form)
    buffers = ((0, payload.values.tobytes()), (1, _deflate.huffman(payload.codes.tobytes())), (0, b""))
    data = message(repr(codec).encode(), 1, like.shape, buffers)
    assert len(data) < payload.values.nbytes + payload.codes.nbytes / 7.9
    peak = traced_peak(lambda: assert_same(wire.decode(data).payload.codes, payload.codes))
    # The comparison above takes two copies more.
    assert peak < 3 * payload.codes.nbytes + 2 * MIB


def test_encode_is_the_table_in_the_docstring():
    payload = payload_of(MaskEncoded(), (2, 3), np.float16)
    buffers = [(0, leaf.tobytes()) for leaf in payload]
    assert wire.encode(payload, MaskEncoded(), jax.ShapeDtypeStruct((2, 3), np.float16)) == message(
        MASK, 2, (2, 3), buffers
    )


def test_golden_messages():
    """The bytes of a message never change by accident: a peer of another version could not read them."""
    h = np.float32([(i * 37 % 23) / 4 - 1 for i in range(24)]).reshape(2, 3, 4)
    found, payloads = {}, {}
    for codec in (Identity(), MaskEncoded(0.75), MaskEncoded(0.75, bits=3, signed=True), TopK(0.75), Uniform(3)):
        for dtype in DTYPES if codec == MaskEncoded(0.75) else DTYPES[:1]:
            name = f"{codec!r} {dtype.name}"
            payloads[name] = helpers.encode(codec, jnp.asarray(h.astype(dtype)))
            found[name] = wire.encode(payloads[name], codec, jax.ShapeDtypeStruct(h.shape, dtype)).hex()
    # zlib's bytes may differ from one of its versions to another: here, only that one example is read.
    huffman = payload_of(MaskEncoded(), (40, 8), np.float32)
    data = wire.encode(huffman, MaskEncoded(), jax.ShapeDtypeStruct((40, 8), np.float32), compression="huffman")
    if os.environ.get("UPDATE_GOLDEN"):
        classes = json.loads(GOLDEN.read_text())["classes"]
        GOLDEN.write_text(json.dumps(found | {"huffman": data.hex(), "classes": classes}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    stored = bytes.fromhex(golden.pop("huffman"))
    golden.pop("classes")  # tests/test_wire_classes.py
    changed = [name for name in found.keys() | golden.keys() if found.get(name) != golden.get(name)]
    assert not changed, f"messages changed of {sorted(changed)}. {__doc__.split(chr(10))[-2]}"
    for name, payload in payloads.items():
        assert_same(wire.decode(bytes.fromhex(golden[name])).payload, payload)
    message = wire.decode(stored)
    assert len(stored) < len(wire.encode(message.payload, message.codec, message.like)), "it is compressed"
    assert_same(message.payload, huffman)


def test_payloads_in_any_order_of_bytes():
    codec, like = Uniform(), jax.ShapeDtypeStruct((2, 3), np.float32)
    payload = payload_of(codec, (2, 3), np.float32)
    other = type(payload)(*(np.asarray(leaf).astype(np.asarray(leaf).dtype.newbyteorder(">")) for leaf in payload))
    assert wire.encode(other, codec, like) == wire.encode(payload, codec, like)
    assert_same(codec.decode(other, like), codec.decode(payload, like))


@pytest.mark.parametrize("shape", ((4, 6), (64, 8, 8, 16)))
def test_estimates_where_no_dtype_is_promoted(shape):
    h = jax.nn.relu(jax.random.normal(jax.random.key(0), shape))
    with jax.numpy_dtype_promotion("strict"):
        payload = MaskEncoded().encode(h)
        assert all(wire.estimate_bytes(payload, MaskEncoded(), h, compression=c) > 0 for c in (None, "huffman", "all"))


def test_estimates_refuse_what_encode_refuses(unchecked):
    codec, h = Uniform(), jnp.ones((4, 6))
    payload = codec.encode(h)
    with pytest.raises(ValueError, match="compression must be one of None, 'huffman', 'all', got 'zip'"):
        wire.estimate_bytes(payload, codec, h, compression="zip")
    with pytest.raises(ValueError, match=r"payload must be what Uniform.* makes of float32"):
        wire.estimate_bytes(payload, codec, h[:2])


def test_what_is_expected_is_a_pair(unchecked):
    message = wire.encode((np.zeros(2, np.float32),), Identity(), np.zeros(2, np.float32))
    with pytest.raises(TypeError, match=r"expect must be a pair of codec and features .*, got Identity\(\)"):
        wire.decode(message, expect=Identity())


def test_encode_refuses(unchecked):
    like, payload = jax.ShapeDtypeStruct((2, 3), np.float32), payload_of(MaskEncoded(), (2, 3), np.float32)
    for compression in ("zlib", "", "Huffman", 0, True):
        with pytest.raises(ValueError, match="compression must be one of None, 'huffman', 'all', got"):
            wire.encode(payload, MaskEncoded(), like, compression=compression)
    for wrong in (
        (),
        payload[:2],
        (*payload, payload.signs),
        payload._replace(values=np.zeros(payload.values.shape, np.float16)),
        payload._replace(values=payload.values[None]),
        payload._replace(codes=payload.codes[:-1]),
        payload._replace(codes=payload.codes.view(np.int8)),
        payload_of(TopK(), (2, 3), np.float32),
    ):
        with pytest.raises(ValueError, match=r"payload must be what MaskEncoded\(.*\) makes of float32\[2, 3\], got"):
            wire.encode(wrong, MaskEncoded(), like)
    for shape in ((1,) * 33, (0, 1 << 32)):
        with pytest.raises(ValueError, match="at most 32 axes"):
            wire.encode((np.zeros(0, np.float32),), Identity(), jax.ShapeDtypeStruct(shape, np.float32))
    with pytest.raises(ValueError, match="float64"):
        wire.encode((np.zeros(2),), Identity(), np.zeros(2))
    long = dataclasses.make_dataclass("L" * 1025, [], bases=(Identity,), frozen=True)()
    with pytest.raises(ValueError, match="codec must have a repr of at most 1024 bytes, got 1027"):
        wire.encode((np.zeros(2, np.float32),), long, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="batch axis"):
        wire.encode(payload, MaskEncoded(granularity="sample"), jax.ShapeDtypeStruct((), np.float32))


def test_only_zeros_are_cut_and_only_what_is_shorter_is_coded():
    codec, like = EntropyMask(), jax.ShapeDtypeStruct((300,), np.float32)
    payload = payload_of(codec, like.shape, like.dtype)
    for word in (0x2020, 0x2000, 0x0020, 0x0D0A, 0xFF00):
        ends = payload._replace(outliers=np.full(3, word, np.uint16).view(np.float16))
        assert_same(wire.decode(wire.encode(ends, codec, like)).payload, ends)
    for n in range(1, 20):
        zeros = np.zeros(n, np.uint8)
        found = {0: n} | lengths(zeros)
        coding, buffer = _buffers.code(zeros, "huffman", cut=False)
        assert len(buffer) == found[coding] == min(found.values())


@pytest.mark.parametrize("size", (7, 1000, 1 << 20))
@pytest.mark.parametrize("share", (0.001, 0.05, 0.5))
def test_runs(size, share):
    """Where codes are zero runs are shorter, or flags; the message is of the first version that has what it needs."""
    rng = np.random.default_rng(0)
    codes = np.where(rng.random(size) < share, rng.integers(1, 256, size), 0).astype(np.uint8)
    like = jax.ShapeDtypeStruct((2 * size,), np.float32)
    codec = EntropyMask(error=0.07)
    payload = payload_of(codec, like.shape, like.dtype)._replace(codes=codes)
    data = wire.encode(payload, codec, like)
    assert_same(wire.decode(data, expect=(codec, like)).payload, payload)
    found = {0: size} | lengths(codes)
    assert data[4] == {0: 1, 1: 1, 3: 2, 4: 3}[min(found, key=found.get)]
    if size > 7:
        estimate = float(jax.jit(functools.partial(wire.estimate_bytes, codec=codec, like=like))(payload))
        assert estimate == pytest.approx(len(data), rel=0.1, abs=30)


@pytest.mark.parametrize("size", (524_296, 524_297, 524_400, 524_525, 1_048_700))
def test_runs_that_end_anywhere_behind_a_piece_are_read(size):
    """All of a stream can be read before all of its last run is written."""
    for raw in (np.zeros(size, np.uint8), np.where(np.arange(size) < size // 100, 255, 0).astype(np.uint8)):
        coded = _deflate.runs(raw)
        found, used = _deflate.inflated(memoryview(coded), size)
        assert used == len(coded)
        np.testing.assert_array_equal(found, raw)


def test_arrays_that_are_not_contiguous_are_sent_in_order():
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T[::-1]
    data = wire.encode((values,), Identity(), values)
    np.testing.assert_array_equal(wire.decode(data).payload.values, values)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(CASES), st.sampled_from(wire.COMPRESSIONS), st.data())
def test_any_contents_come_back_to_the_bit(case, compression, draw):
    codec, shape, dtype = case
    special = [np.array(x, dtype).tobytes() for x in (np.nan, -np.nan, np.inf, -np.inf, -0.0)]

    def array(form):
        size = form.size * form.dtype.itemsize
        pattern = draw.draw(st.one_of(st.sampled_from(special), st.binary(min_size=1, max_size=32)))
        return np.frombuffer((pattern * (size // len(pattern) + 1))[:size], form.dtype).reshape(form.shape)

    payload, like = jax.tree.map(array, form_of(*case)), jax.ShapeDtypeStruct(shape, dtype)
    data = wire.encode(payload, codec, like, compression=compression)
    assert_same(wire.decode(data, expect=(codec, like)).payload, payload)

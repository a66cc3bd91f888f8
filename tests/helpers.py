"""What several files of tests use."""

import contextlib
import functools
import random
import socket
import struct
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from msjax import compress, wire
from msjax.compress import MaskEncoded, Uniform

KEY = jax.random.key(0)
MIB = 1 << 20


@functools.partial(jax.jit, static_argnums=0)
def encode(codec, h, key=None):
    return codec.encode(h, key)


def case_id(value):
    """A codec, a shape or a dtype as a part of a test's name."""
    return repr(value).replace(" ", "") if isinstance(value, compress.Codec | tuple) else jnp.dtype(value).name


def assert_same(a, b):
    """Two trees of arrays have the same shapes, dtypes and bits."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]
    assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True))


def assert_close(a, b, tolerance):
    """Every leaf of two trees, which have some, agrees to `tolerance` of its norm."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert pairs
    for left, right in pairs:
        left, right = np.float64(left), np.float64(right)
        assert left.shape == right.shape
        assert np.linalg.norm(left - right) <= tolerance * max(1e-3, np.linalg.norm(right)), (left, right)


def assert_same_change(a, b, before, tolerance):
    """What two trainings have changed of the same parameters agrees: the parameters alone do after few steps anyway."""
    changes = [jax.tree.map(np.subtract, after, before) for after in (a, b)]
    assert all(np.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(changes))
    assert_close(*changes, tolerance)


def free_port():
    """A port for a server that another process starts later.

    It is below those that the system gives to whoever asks for any, so that nobody gets it in between.
    """
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("localhost", random.SystemRandom().randrange(20_000, 30_000)))
            return s.getsockname()[1]


def traced_peak(call):
    """Most bytes that Python, zlib and NumPy had at once in `call`, beyond what was there before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- Messages. ----------------------------------------------------------------------------------------------------

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
CODECS = (
    *(cls() for cls in compress.CODECS),
    MaskEncoded(0.75, bits=3, signed=True),
    MaskEncoded(0.9, granularity="sample"),
    Uniform(8, granularity="sample"),
)
MASK = repr(MaskEncoded()).encode()


@functools.cache
def form_of(codec, shape, dtype):
    """What the payload looks like, from shapes alone."""
    return jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(shape, dtype), KEY)


def payload_of(codec, shape, dtype, seed=0):
    """A payload of any bits (so of NaN and Inf too) in the floats, and of few symbols in what Huffman's code is for."""
    rng = np.random.default_rng(seed)

    def array(form):
        if form.dtype == np.uint8:
            return rng.choice(np.uint8([0, 1, 255]), form.shape, p=[0.9, 0.07, 0.03])
        return np.frombuffer(rng.bytes(form.size * form.dtype.itemsize), form.dtype).reshape(form.shape)

    return jax.tree.map(array, form_of(codec, shape, dtype))


def message(
    text=b"Identity()",
    dtype=0,
    shape=(2,),
    buffers=((0, bytes(8)),),
    *,
    magic=b"MSJX",
    version=1,
    text_length=None,
    axes=None,
    count=None,
    lengths=None,
    tail=b"",
    checksum=None,
):
    """A message made by the table in the docstring of `msjax.wire`, with any of it changed."""
    lengths = [len(buffer) for _, buffer in buffers] if lengths is None else lengths
    body = struct.pack("<H", len(text) if text_length is None else text_length) + text
    body += struct.pack("<BB", dtype, len(shape) if axes is None else axes) + struct.pack(f"<{len(shape)}I", *shape)
    body += struct.pack("<B", len(buffers) if count is None else count)
    body += b"".join(struct.pack("<BQ", coding, n) for (coding, _), n in zip(buffers, lengths, strict=True))
    body += b"".join(buffer for _, buffer in buffers) + tail
    return magic + struct.pack("<BI", version, zlib.crc32(body) if checksum is None else checksum) + body


def sealed(data):
    """`data` with the checksum that it should have."""
    return data[:5] + struct.pack("<I", zlib.crc32(data[9:])) + data[9:]


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def deflated(data, level=9, strategy=zlib.Z_DEFAULT_STRATEGY):
    coder = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def refused(data, match=None, **options):
    with pytest.raises(wire.WireError, match=match) as info:
        wire.decode(data, **options)
    assert info.type is wire.WireError
    assert len(str(info.value)) < 4096


def decode_or_refuse(data, **options):
    """The message, a payload of the promised layout, or None where `WireError` was raised; else the test fails."""
    try:
        found = wire.decode(data, **options)
    except wire.WireError:
        return None
    leaves, structure = jax.tree.flatten(found.payload)
    forms, promised = jax.tree.flatten(form_of(found.codec, found.like.shape, found.like.dtype))
    assert structure == promised
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(form.shape, form.dtype) for form in forms]
    assert found.nominal_bytes == found.codec.payload_bytes(found.like) == sum(leaf.nbytes for leaf in leaves)
    assert found.wire_bytes == len(data)
    again = wire.decode(wire.encode(found.payload, found.codec, found.like), expect=(found.codec, found.like))
    assert_same(again.payload, found.payload)
    return found


SMALL = {
    "raw": message(MASK, 0, (2, 3), [(0, bytes(range(1, 5))), (0, b"\x1b\x02"), (0, b"")]),
    "huffman": message(MASK, 1, (40,), [(0, b"\x80\x3f"), (1, deflated(bytes(10))), (0, b"")]),
    "scalar": message(b"Identity()", 0, (), [(0, bytes(4))]),
    "planes": message(
        b"Cast()", 0, (9,), [(5, b"\x09\0\0\0" + bytes(9) + b"\x05\0\0\x80" + deflated(b"?" * 9))], version=4
    ),
}
"""Messages with every byte of the format, of few bytes."""

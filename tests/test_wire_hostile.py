"""Messages that no peer of ours sends are refused, with `WireError` alone and little memory."""

import functools
import sys
import warnings
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from msjax import compress, wire
from msjax.compress import Identity, MaskEncoded, TopK, _deflate

from .helpers import (
    CODECS,
    MIB,
    case_id,
    decode_or_refuse,
    deflated,
    form_of,
    message,
    payload_of,
    refused,
    traced_peak,
)


def planes(*parts):
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def with_planes(*parts):
    return message(buffers=((5, planes(*parts)),), version=4)


HOSTILE = {
    "empty": (b"", "the message ends"),
    "magic": (message(magic=b"MSJY"), "must begin with b'MSJX', got b'MSJY'"),
    "version 0": (message(version=0), "version must be 1 to 4, got 0"),
    "version 5": (message(version=5), "version must be 1 to 4, got 5"),
    "a later version than needed": (message(version=3), "the first that has the buffers' codings, 1, got 3"),
    "runs in version 1": (message(buffers=((3, _deflate.runs(bytes(8))),)), "the buffers' codings, 2, got 1"),
    "checksum": (message(checksum=0), "checksum"),
    "text too long": (message(b"Identity()" + b" " * 1015), "at most 1024 bytes, got 1025"),
    "text longer than the message": (message(text_length=1000), "the message ends"),
    "text of no bytes": (message(b""), "codec"),
    "dtype": (message(dtype=12), r"dtype must be in 0\.\.11, got 12"),
    "33 axes": (message(shape=(1,) * 33, buffers=((0, bytes(4)),)), "at most 32 axes, got 33"),
    "255 axes": (message(axes=255), "at most 32 axes"),
    "axes that are not there": (message(axes=32), "the message ends"),
    "huge shape": (message(shape=(2**32 - 1,) * 32), "at most 2147483648 bytes"),
    "just too much": (message(shape=(2**29 + 1,)), "at most 2147483648 bytes"),
    "huge and empty": (message(shape=(0, 2**32 - 1, 2**32 - 1), buffers=((0, b""),)), "at most 2147483648 bytes"),
    "huge in halves": (message(dtype=1, shape=(2**30,)), "must have 2147483648 bytes, got 8"),
    "payload above its features": (
        message(b"Uniform(bits=1, granularity='sample')", 2, (2**30, 1), ((0, b""),) * 3),
        "the payload must have at most",
    ),
    "shape x dtype is more": (message(shape=(3,)), "must have 12 bytes, got 8"),
    "shape x dtype is less": (message(shape=(1,)), "must have 4 bytes, got 8"),
    "dtype's bytes": (message(dtype=1), "must have 4 bytes, got 8"),
    "length 2**63": (message(lengths=[1 << 63]), "the message ends"),
    "length 2**64 - 8": (message(lengths=[2**64 - 8]), "the message ends"),
    "length one more": (message(lengths=[9]), "the message ends"),
    "length one less": (message(lengths=[7]), "must have 8 bytes, got 7"),
    "coding": (message(buffers=((2, bytes(8)),)), "2 where zeros may be cut, 4 of codes, or 5 of whole floats, got 2"),
    "coding 255": (
        message(buffers=((255, bytes(8)),)),
        "4 of codes, or 5 of whole floats, got 255",
    ),
    "classes of floats": (message(buffers=((4, bytes(8)),), version=3), "4 of codes, or 5 of whole floats, got 4"),
    "planes of codes": (
        message(b"Uniform(bits=8)", 0, (2,), ((5, planes(b"ab")), (0, bytes(4)), (0, bytes(4))), version=4),
        "or 5 of whole floats, got 5",
    ),
    "planes where zeros may be cut": (
        message(b"EntropyMask()", 0, (0,), ((0, b""), (5, b""), (0, bytes(2 * 15)), (0, bytes(4))), version=4),
        "or 5 of whole floats, got 5",
    ),
    "a plane less": (with_planes(b"ab", b"cd", b"ef"), "a plane of 2 values must have as many bytes, got 0 of 0"),
    "a plane more": (with_planes(b"ab", b"cd", b"ef", b"gh", b"ij"), "6 bytes behind the last plane"),
    "a plane too short": (
        with_planes(b"ab", b"cd", b"ef", b"g"),
        "a plane of 2 values must have as many bytes, got 1 of 1",
    ),
    "a plane too long": (
        with_planes(b"abc", b"cd", b"ef", b"gh"),
        "a plane of 2 values must have as many .*, got 3",
    ),
    "a plane longer than the buffer": (
        message(buffers=((5, (1 << 30).to_bytes(4, "little") + b"abcd"),), version=4),
        "a plane of 2 values must have as many bytes, got 4",
    ),
    "a plane that is no deflate": (
        message(
            buffers=((5, (2 | 1 << 31).to_bytes(4, "little") + b"\xff\xff" + planes(b"cd", b"ef", b"gh")),), version=4
        ),
        "damaged",
    ),
    "a plane of more than can be": (
        message(dtype=1, shape=(1 << 29,), buffers=((5, (9 | 1 << 31).to_bytes(4, "little") + bytes(9)),), version=4),
        "a plane of 536870912 values must have as many bytes, got 9 of 9",
    ),
    "planes in version 3": (
        message(buffers=((5, planes(b"ab", b"cd", b"ef", b"gh")),), version=3),
        "the buffers' codings, 4, got 3",
    ),
    "no buffer": (message(buffers=()), "Identity has 1 buffers, got 0"),
    "a buffer more": (message(buffers=((0, bytes(8)), (0, b""))), "Identity has 1 buffers, got 2"),
    "255 buffers": (message(count=255), "Identity has 1 buffers, got 255"),
    "trailing byte": (message(tail=b"\0"), "1 bytes behind"),
    "no deflate": (message(buffers=((1, b"\xff" * 8),)), "damaged"),
    "deflate of nothing": (message(shape=(0,), buffers=((1, b""),)), "must end after 0 bytes"),
    "deflate cut short": (message(buffers=((1, deflated(b"abcdefgh")[:-2]),)), "must end after 8 bytes"),
    "deflate of less": (message(buffers=((1, deflated(b"abcdefg")),)), "must end after 8 bytes"),
    "deflate of more": (message(buffers=((1, deflated(b"abcdefghi")),)), "must end after 8 bytes"),
    "deflate and more": (message(buffers=((1, deflated(b"abcdefgh") + b"x"),)), "must end after 8 bytes"),
    "zlib's header": (message(buffers=((1, zlib.compress(b"abcdefgh")),)), "damaged|must end"),
    "scalar by sample": (message(b"TopK(granularity='sample')", 0, (), ((0, b""),) * 2), "batch axis"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_refused(name):
    refused(*HOSTILE[name])


HOSTILE_TEXTS = (
    "",
    " ",
    "()",
    "Codec()",
    "VectorCodec()",
    "Sparsifier()",
    "identity()",
    "compress.TopK()",
    "os.system('true')",
    "__import__('os')",
    "__import__('os').system('true')",
    "Identity(__import__('os'))",
    "TopK(ratio=__import__('os'))",
    "TopK(*[0.5])",
    "TopK(**{'ratio': 0.5})",
    "TopK(**{1: 2})",
    "TopK(ratio=(lambda: 0.5)())",
    "TopK(ratio=[0.5 for _ in range(9)][0])",
    "TopK(f'{1}')",
    "TopK({[]: 1})",
    "TopK(x := 1)",
    "TopK(); TopK()",
    "TopK()\nTopK()",
    "TopK(\0)",
    "TopK('\\d')",
    "TopK('\\N{x}')",
    "TopK(1is 2)",
    "TopK(0x1for x in y)",
    "TopK(1.2.3)",
    "TopK(ratio=01)",
    "TopK(for=1)",
    "TopK(0.5, 0.5, 0.5)",
    "TopK(ratio=0.5, ratio=0.6)",
    "TopK(bits=2)",
    "TopK(unknown=1)",
    "TopK(ratio=1)",
    "TopK(ratio=1.0)",
    "TopK(ratio=-0.1)",
    "TopK(ratio=1e999)",
    "TopK(ratio=-1e999)",
    "TopK(ratio=1e999-1e999)",
    "TopK(ratio=True)",
    "TopK(ratio=None)",
    "TopK(ratio='x')",
    "TopK(ratio=b'x')",
    "TopK(ratio=0.5j)",
    "TopK(ratio=[0.5])",
    "TopK(ratio={})",
    "TopK(ratio=...)",
    "TopK(ratio=" + "9" * 900 + ")",
    "TopK(granularity='batch')",
    "TopK(granularity=0)",
    "TopK(granularity=[])",
    "MaskEncoded(bits=0)",
    "MaskEncoded(bits=9)",
    "MaskEncoded(bits=-1)",
    "MaskEncoded(bits=2.0)",
    "MaskEncoded(bits=True)",
    "MaskEncoded(bits=10**30)",
    "MaskEncoded(bits=1" + "0" * 30 + ")",
    "MaskEncoded(rounding='up')",
    "MaskEncoded(rounding={})",
    "MaskEncoded(signed='yes')",
    "MaskEncoded(signed=2)",
    "RandTopK(alpha=1.5)",
    "RandTopK(alpha=1e999)",
    "RandTopK(alpha='x')",
    "Uniform(bits='3')",
    "(" * 1024,
    "[" * 1024,
    "(" * 500 + "1" + ")" * 500,
    "TopK(" + "[" * 190 + "]" * 190 + ")",
    "TopK(" + "-" * 1000 + "1)",
    "TopK(" + "not " * 240 + "1)",
    "TopK(" + "{1:" * 150 + "1" + "}" * 150 + ")",
    "TopK(" + "lambda:" * 140 + "1)",
    "TopK(1" + "+1j" * 300 + ")",
    "TopK" + "()" * 500,
    "TopK" + ".a" * 500,
)


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: ascii(text[:24]))
def test_hostile_codec_texts_are_refused(text, unchecked):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refused(message(text.encode()), "codec")
    assert not said, "a peer must not be able to fill the log"
    with pytest.raises(ValueError):
        compress.from_string(text)


@pytest.mark.parametrize("text", (b"\xff\xfe", b"Identity\xc3()", b"TopK(granularity='\xe9')", "TöpK()".encode()))
def test_text_that_is_not_ascii_is_refused(text):
    refused(message(text), "codec")


@pytest.mark.parametrize("depth", (50, 120, 190))
def test_nested_text_on_a_deep_stack_is_a_value_error(depth, unchecked):
    """As in a server whose frames are many: Python's parser then raises `RecursionError`."""
    frames, frame = 0, sys._getframe()
    while frame:
        frames, frame = frames + 1, frame.f_back
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(frames + 40)
    try:
        with pytest.raises(ValueError) as info:
            compress.from_string("TopK(" + "[" * depth + "]" * depth + ")")
    finally:
        sys.setrecursionlimit(limit)
    assert info.type is ValueError


@pytest.mark.parametrize("codec", CODECS, ids=case_id)
def test_a_promise_of_much_takes_no_memory(codec):
    shape = (4, 1 << 27)
    count = len(form_of(codec, (4, 8), np.float32))
    data = message(repr(codec).encode(), 0, shape, ((0, b"12345678"),) * count)
    assert traced_peak(lambda: refused(data, "must have .* bytes, got 8")) < 8 * MIB
    # Beyond what JAX's 32-bit positions reach: any answer but another exception.
    for axis in (2**31 - 1, 2**31, 2**32 - 1):
        for shape in ((axis,), (0, axis), (axis, 0), (axis, axis)):
            data = message(repr(codec).encode(), 2, shape, ((0, b""),) * count)
            assert traced_peak(functools.partial(decode_or_refuse, data, max_bytes=1 << 80)) < 8 * MIB
            assert traced_peak(functools.partial(decode_or_refuse, data)) < 8 * MIB


@functools.cache
def bomb():
    """About a megabyte that inflates to a gigabyte of zeros, made without doing so."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    coder.compress(bytes(MIB))
    coder.flush(zlib.Z_FULL_FLUSH)
    block = coder.compress(bytes(MIB)) + coder.flush(zlib.Z_FULL_FLUSH)
    return block * 1024 + coder.flush()


@pytest.mark.parametrize("coding", (1, 3))
@pytest.mark.parametrize("values", (1, 1 << 20, "most", 1 << 26))
def test_bombs_do_not_go_off(values, coding):
    """Without runs no more than eight bytes are believed of each; with them, no more than is asked for."""
    coded = bomb()
    assert len(coded) < 1.2 * MIB
    values = 2 * len(coded) if values == "most" else values
    data = message(shape=(values,), buffers=((coding, coded),), version=1 if coding == 1 else 2)
    allowed = min(4 * values, 8 * len(coded) if coding == 1 else 4 * values)
    assert traced_peak(lambda: refused(data, "must end after|cannot hold")) < allowed + 2 * MIB
    assert traced_peak(lambda: refused(data, max_bytes=4 * values - 1)) < 2 * MIB


def test_a_reader_that_knows_what_comes_takes_any_size(monkeypatch):
    """Averages of large models have more than the 2 GiB that a stranger's message may take."""
    values = jnp.arange(4, dtype=jnp.float32)
    data = wire.encode((values,), Identity(), values)
    monkeypatch.setattr(wire, "_MOST_OF_STRANGERS", 15)
    refused(data, "at most 15 bytes")
    np.testing.assert_array_equal(wire.decode(data, expect=(Identity(), values)).payload.values, values)


def test_max_bytes():
    data = message()
    assert wire.decode(data, max_bytes=8).nominal_bytes == 8
    refused(data, "at most 7 bytes", max_bytes=7)
    codec, like = Identity(), jax.ShapeDtypeStruct((2,), np.float32)
    refused(data, "at most 7 bytes", max_bytes=7, expect=(codec, like))
    # Floats' codes take more than the features: bits=8, nothing dropped.
    data = wire.encode(payload_of(MaskEncoded(0, bits=8), (8,), np.float16), MaskEncoded(0, bits=8), np.zeros(8, "f2"))
    assert wire.decode(data, max_bytes=24).nominal_bytes == 24
    refused(data, "payload must have at most 23 bytes, got 24", max_bytes=23)


def test_expect():
    codec, like = MaskEncoded(0.75), jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    data = wire.encode(payload_of(codec, like.shape, like.dtype), codec, like)
    assert wire.decode(data, expect=(codec, np.zeros((2, 3), ml_dtypes.bfloat16))).codec == codec
    for other in (
        (MaskEncoded(0.76), like),
        (MaskEncoded(0.75, signed=True), like),
        (TopK(0.75), like),
        (codec, jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)),
        (codec, jax.ShapeDtypeStruct((6,), jnp.bfloat16)),
        (codec, jax.ShapeDtypeStruct((2, 3), jnp.float16)),
        (codec, jax.ShapeDtypeStruct((2, 3), jnp.float32)),
    ):
        refused(data, r"expected .* got MaskEncoded\(ratio=0.75.* of bfloat16\[2, 3\]", expect=other)
    for text in ("__import__('os')", "(" * 1024):
        refused(message(text.encode()), "expected", expect=(codec, like))

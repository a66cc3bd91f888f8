"""Payloads as bytes: what a codec makes, with a header that says what it is; no pickle, nothing is executed.

    data = wire.encode(payload, codec, like, compression="huffman")
    message = wire.decode(data, expect=(codec, like))
    h = codec.decode(message.payload, like)

All integers are little-endian, unsigned:

| bytes | |
|---|---|
| 4 | "MSJX" |
| 1 | version: 4 where a buffer has planes, else 3 where one has classes, else 2 where one has runs, else 1 |
| 4 | CRC-32 of everything behind it |
| 2, then as many | the codec's text, as `repr` gives it and `compress.from_string` reads it |
| 1 | dtype of the features: 0 float32, 1 bfloat16, 2 float16; of arrays that travel beside them by `Exact`: 3 bool, |
| | 4 int8, 5 int16, 6 int32, 7 int64, 8 uint8, 9 uint16, 10 uint32, 11 uint64 |
| 1, then 4 each | their number of axes, at most 32, and their shape |
| 1, then 9 each | number of buffers; of each its coding (0 raw, 1 Huffman, 2 cut, 3 runs, 4 classes, 5 planes) in 1 |
| | byte, its length in 8 |
| the rest | the buffers: the arrays of the payload in order, C-contiguous |

Huffman's code is a raw deflate stream (RFC 1951) of literals alone; "runs" is one in which bytes that repeat the byte
before them are coded by their number (a decoder takes any such stream), which is shorter where most codes are zero, as
those of gradients. The length of a buffer before coding follows from codec, shape and dtype. Huffman's code spends at
least a bit on a byte and runs two bits on 258, so a header cannot promise what is not there, and memory is taken as
bytes come out. "Cut" buffers lack their zeros at the end; only codecs with `entropy_coded` may have them, beside codes
that are there.

A buffer with "classes" is one whose bytes have Huffman codes of their own by what their neighbours are, or whose
commonest byte has a flag of one bit:

| bytes | |
|---|---|
| 1 | number of levels, 1 to 4; with 1 there is one class, in the order of memory |
| 1 | the commonest byte |
| levels − 1 | thresholds that increase: a sum of sizes is of the level that is the number of thresholds below it |
| 4 each | of each class (levels², or levels where a byte holds one code) its number of bytes, below 2^31; the highest |
| | bit is set where flags say which of them are not the commonest byte |
| the rest | deflate streams, one behind the other, of each class: where it has flags these, eight in a byte, the |
| | first one highest, and zeros behind the last; then its bytes, with flags the others alone; none where there are no |
| | bytes |

With more than one level the bytes are those of a map. The last three axes are height, width and channels (of three
axes the middle one is height, and the width is 1), and all before are samples. A byte's *size* tells how large its
codes are. A code's magnitude is the code, or |code − m| of `EntropyMask` with `signed`, where m stands for zero. Where
a byte holds one code, the size is its magnitude, at most 127. Where it holds g codes, the size has the first ⌈g/2⌉ of
them in the low four bits and the others in the high four, each as how many of 1, 2, 3, 4, 6, 9, 13 the sum of their
magnitudes reaches. To a byte's size on the left is added that of the same byte of the pixel above; at the edges the
neighbour that is there counts twice, and for the first pixel the sum is 0. The level of a sum, or of each of its
halves, is the number of thresholds below it. The class is that level, or that of the low half + levels · that of the
high half; classes come in the order of their numbers. Within a class the bytes are in the order of their pixels,
diagonal by diagonal from the upper left, in a diagonal from the top down, and within a pixel sample by sample. Only
codes of `EntropyMask`, and of `MaskEncoded` with 1, 2, 4 or 8 bits, have such classes, where a byte's codes are of one
pixel, there are at least two pixels, a pixel of all samples has at least 16 bytes, and a diagonal has 256 on average;
not with granularity "channel".

A buffer with "planes" has the first bytes of all its floats, then the second ones and so on, each plane behind 4 bytes
with its length; the highest bit is set where it is coded as Huffman's buffers are. Only buffers whose zeros may not be
cut have planes. Parts that are handed on become 28 to 31 % shorter in bfloat16, 10 to 13 % in float16 and 14 to 15 % in
float32, as exponents are alike (`experiments.handed_parts`).

Of a few values, as those of one token, most of a message would be its head. Where both ends know codec, dtype and
shape beforehand, a bare message (`encode_bare`, `decode_bare`) leaves them out:

| bytes | |
|---|---|
| 4 | CRC-32 of what is left out, from the codec's text to the shape, and of everything behind it |
| 1, or 5 each | of each buffer its coding and, unless it is raw, its length |
| | the buffers, as above |

The checksum finds what a bad line does, not what an attacker does: for that there is TLS.
"""

import functools
import math
import re
import struct
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float32

from msjax import compress
from msjax.compress import _buffers, _contexts
from msjax.compress._arrays import form_of, payload_arrays
from msjax.compress._class_bytes import plane_bytes, shortest_bytes
from msjax.compress._codec import check_payload, on_any_mesh
from msjax.compress._exact import EXACT_DTYPES

VERSION = 4
COMPRESSIONS = (None, "huffman", "all")
_MAGIC = b"MSJX"
_PREFIX = struct.Struct("<4sBI")
_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), *map(np.dtype, EXACT_DTYPES))
_VERSIONS = {_buffers.RUNS: 2, _buffers.CLASSES: 3, _buffers.PLANES: 4}  # others have been there from the first
_MOST_OF_STRANGERS = 1 << 31
"""Bytes that a message may make its reader allocate, where that does not know what it will be."""
_MAX_AXES = 32
_MAX_CODEC_TEXT = 1024
# What else could be written there, Python's parser would answer with warnings and deep recursion.
_CODEC_TEXT = re.compile(rb"\w+(\((\w+=('\w*'|True|False|None|-?[\d.]+(e[+-]?\d+)?)(, |(?=\))))*\))?")


class WireError(ValueError):
    """The bytes are not a message of this version, are damaged, or say what cannot be."""


class Message(NamedTuple):
    """A decoded message."""

    codec: compress.Codec
    like: jax.ShapeDtypeStruct
    """Shape and dtype of the features."""
    payload: Any
    """What `codec.decode` takes, of NumPy arrays: views of the message where it was not compressed."""
    nominal_bytes: int
    """Of the payload's arrays: `codec.payload_bytes(like)`."""
    wire_bytes: int
    """Of the whole message."""


def encode(payload: Any, codec: compress.Codec, like: Any, *, compression: str | None = None) -> bytes:
    """Returns the message of `payload`, which `codec` made of an array like `like`.

    Args:
      payload: arrays of NumPy or JAX, as `codec.encode` returns them.
      like: shape and dtype of the features.
      compression: "huffman" codes packed codes, masks and signs by zlib's Huffman coder, with runs or in classes where
        these are shorter, without loss, where that makes them shorter; "all" does so with floats, too, byte by byte;
        None leaves all as they are. A codec with `entropy_coded` is always coded, its floats only cut.

    Raises:
      TypeError: an array of the payload has a mask.
      ValueError: `compression` is none of `COMPRESSIONS`, or the payload is not what the codec makes of such an array.
    """
    like, coded = _coded(payload, codec, like, compression)
    codings = [(coding, len(buffer)) for coding, buffer in coded]
    body = [_header(codec, like, codings), *(buffer for _, buffer in coded)]
    checksum = functools.reduce(lambda crc, part: zlib.crc32(part, crc), body, 0)
    return b"".join([_PREFIX.pack(_MAGIC, _version(codings), checksum), *body])


def decode(
    data: bytes | bytearray | memoryview,
    *,
    expect: tuple[compress.Codec, Any] | None = None,
    max_bytes: int | None = None,
) -> Message:
    """Returns the message in `data`.

    Args:
      expect: codec and shape and dtype that the message must have. Without it the message's own are taken, whatever
        they are.
      max_bytes: most bytes that the payload's arrays may take and, without `expect`, the features, decoded. By default
        2^31, or with `expect`, which says how many there are, any number.

    Raises:
      TypeError: `data` is no bytes, or `expect` no pair.
      WireError: anything about these bytes is wrong; and no more than `max_bytes` is allocated,
        but for classes, which take up to eight bytes for each byte of codes while they are put in order, and planes,
        which take half as much again.
    """
    if expect is not None and not (isinstance(expect, tuple) and len(expect) == 2):
        raise TypeError(f"expect must be a pair of codec and features or their shape and dtype, got {expect!r}")
    data = memoryview(data).cast("B")
    reader = _Reader(data)
    magic, version, checksum = reader.unpack(_PREFIX.format)
    if magic != _MAGIC:
        raise WireError(f"a message must begin with {_MAGIC!r}, got {magic!r}")
    if not 1 <= version <= VERSION:
        raise WireError(f"version must be 1 to {VERSION}, got {version}")
    if zlib.crc32(reader.rest()) != checksum:
        raise WireError("checksum is wrong: the message was damaged or cut short")
    if max_bytes is None and expect is None:
        max_bytes = _MOST_OF_STRANGERS
    codec, like = _read_form(reader, expect, max_bytes)
    layout = _layout(codec, like)
    nominal = sum(math.prod(form.shape) * form.dtype.itemsize for form in layout)
    if max_bytes is not None and nominal > max_bytes:
        raise WireError(f"the payload must have at most {max_bytes} bytes, got {nominal}")
    (count,) = reader.unpack("<B")
    if count != len(layout):
        raise WireError(f"{type(codec).__name__} has {len(layout)} buffers, got {count}")
    codings = [reader.unpack("<BQ") for _ in layout]
    if version != _version(codings):
        raise WireError(f"version must be the first that has the buffers' codings, {_version(codings)}, got {version}")
    return _message(reader, codec, like, layout, codings, nominal, len(data))


def encode_bare(payload: Any, codec: compress.Codec, like: Any, *, compression: str | None = None) -> bytes:
    """Returns a message of `payload` without codec, dtype and shape, which whoever reads it must know.

    Arguments and errors are those of `encode`.
    """
    like, coded = _coded(payload, codec, like, compression)
    table = [struct.pack("<B", c) if c == _buffers.RAW else struct.pack("<BI", c, len(buffer)) for c, buffer in coded]
    body = [*table, *(buffer for _, buffer in coded)]
    checksum = functools.reduce(lambda crc, part: zlib.crc32(part, crc), body, zlib.crc32(_form(codec, like)))
    return b"".join([struct.pack("<I", checksum), *body])


def decode_bare(
    data: bytes | bytearray | memoryview, codec: compress.Codec, like: Any, *, max_bytes: int | None = None
) -> Message:
    """Returns the message that `encode_bare` made of features like `like` by this codec.

    Raises:
      WireError: as `decode`; also where the message was made by another codec, or of features of another form.
    """
    data, like = memoryview(data).cast("B"), form_of(like)
    reader = _Reader(data)
    (checksum,) = reader.unpack("<I")
    if zlib.crc32(reader.rest(), zlib.crc32(_form(codec, like))) != checksum:
        form = f"{like.dtype}{list(like.shape)}"
        raise WireError(f"checksum is wrong: the message was damaged, or is not {codec} of {form}")
    layout = _layout(codec, like)
    nominal = sum(math.prod(form.shape) * form.dtype.itemsize for form in layout)
    if max_bytes is not None and nominal > max_bytes:
        raise WireError(f"the payload must have at most {max_bytes} bytes, got {nominal}")
    codings = []
    for form in layout:
        (coding,) = reader.unpack("<B")
        raw = math.prod(form.shape) * form.dtype.itemsize
        codings.append((coding, raw if coding == _buffers.RAW else reader.unpack("<I")[0]))
    return _message(reader, codec, like, layout, codings, nominal, len(data))


def most_bytes(codec: compress.Codec, like: Any) -> int:
    """Returns the most bytes that `encode` can return, from shape and dtype alone: those without coding."""
    buffers = len(codec.payload_like(like))
    return _PREFIX.size + len(_header(codec, like, [(_buffers.RAW, 0)] * buffers)) + codec.payload_bytes(like)


def estimate_bytes(
    payload: Any, codec: compress.Codec, like: Any, *, compression: str | None = None
) -> Float32[Array, ""]:
    """Returns about how many bytes `encode` would return, inside `jit`.

    Within about 2 % on feature maps whose message has ten thousand bytes or more, and on gradients and smaller ones
    within about 7 %; within about 12 % where a tenth of hundreds of samples has nearly all of the gradients' energy, as
    it meets but some of these. Where 99 % of the codes or more are zero, and a message is a hundredth of its payload,
    it may be half as much again or twice. Uncompressed to the rounding of a float32. Arguments and errors are those of
    `encode`; the payload's arrays are JAX's.
    """
    arrays, like = _checked(payload, codec, like, compression)
    compression = _compression(codec, compression)
    coded = [array for array in arrays if _is_estimated(array, codec, compression)]
    nbytes = sum(array.nbytes for array in arrays) - sum(array.nbytes for array in coded)
    nbytes += _PREFIX.size + len(_header(codec, like, [(_buffers.RAW, 0)] * len(arrays)))
    return jnp.float32(nbytes) + (_estimated(coded, codec, like) if coded else jnp.float32(0))


def _is_estimated(array, codec, compression):
    """Whether the bytes of a buffer depend on what is in it."""
    codes = array.dtype == jnp.uint8 and compression is not None
    floats = codec.entropy_coded or (compression == "all" and _buffers.has_planes(array.dtype))
    return array.size > 0 and (codes or floats)


@functools.partial(jax.jit, inline=True, static_argnames=("codec", "like"))
def _estimated(arrays, codec, like):
    """About the bytes of all buffers that are coded."""
    return sum(on_any_mesh(functools.partial(_estimated_buffer, codec, like), array) for array in arrays)


def _estimated_buffer(codec, like, array):
    if array.dtype == jnp.uint8:
        return shortest_bytes(array.reshape(-1), _buffers.grid_for(array.nbytes, _contexts.grid_of(codec, like)))
    if codec.entropy_coded:
        last = jnp.max(jnp.where(array.reshape(-1) != 0, jnp.arange(1, array.size + 1, dtype=jnp.int32), 0))
        return (last * array.dtype.itemsize).astype(jnp.float32)
    return jnp.minimum(jnp.float32(array.nbytes), plane_bytes(array))


def _coded(payload, codec, like, compression):
    """(like as shape and dtype, the coding and the buffer of each array) of a payload, which is checked."""
    arrays, like = _checked(payload, codec, like, compression)
    compression = _compression(codec, compression)
    grid = _contexts.grid_of(codec, like)
    return like, [_buffers.code(np.asarray(array), compression, cut=codec.entropy_coded, grid=grid) for array in arrays]


def _checked(payload, codec, like, compression):
    """The payload's arrays, and `like` as shape and dtype, once all that `encode` is given is checked."""
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression must be one of {', '.join(map(repr, COMPRESSIONS))}, got {compression!r}")
    like = form_of(like)
    if len(like.shape) > _MAX_AXES or max(like.shape, default=0) >= 1 << 32:
        raise ValueError(f"like must have at most {_MAX_AXES} axes of less than 2^32, got shape {list(like.shape)}")
    arrays = payload_arrays(payload)
    check_payload(codec, like, _layout(codec, like), arrays)
    return arrays, like


def _message(reader, codec, like, layout, codings, nominal, size):
    """The message whose buffers are what is left in `reader`."""
    grid = _contexts.grid_of(codec, like)
    arrays = [
        _read_array(reader, form, *coding, may_cut=codec.entropy_coded, grid=grid)
        for form, coding in zip(layout, codings, strict=True)
    ]
    if len(reader.rest()):
        raise WireError(f"{len(reader.rest())} bytes behind the last buffer")
    return Message(codec, like, type(layout)(*arrays), nominal, size)


def _version(codings):
    """The first version that has them, so that as many peers as can may read a message."""
    return max((_VERSIONS.get(coding, 1) for coding, _ in codings), default=1)


def _compression(codec, compression):
    return "huffman" if codec.entropy_coded else compression


def _header(codec, like, codings):
    """What is between the checksum and the buffers."""
    buffers = [struct.pack("<BQ", *coding) for coding in codings]
    return b"".join([_form(codec, like), struct.pack("<B", len(codings)), *buffers])


def _form(codec, like):
    """Codec, dtype and shape as bytes."""
    text = repr(codec).encode()
    if len(text) > _MAX_CODEC_TEXT:
        raise ValueError(f"codec must have a repr of at most {_MAX_CODEC_TEXT} bytes, got {len(text)}")
    shape = struct.pack(f"<BB{len(like.shape)}I", _DTYPES.index(_dtype(like.dtype)), len(like.shape), *like.shape)
    return struct.pack("<H", len(text)) + text + shape


def _read_form(reader, expect, max_bytes):
    """(codec, like) of a message, checked before anything is made of them."""
    (length,) = reader.unpack("<H")
    if length > _MAX_CODEC_TEXT:
        raise WireError(f"the codec's text must have at most {_MAX_CODEC_TEXT} bytes, got {length}")
    text = bytes(reader.take(length))
    code, axes = reader.unpack("<BB")
    if code >= len(_DTYPES):
        raise WireError(f"dtype must be in 0..{len(_DTYPES) - 1}, got {code}")
    if axes > _MAX_AXES:
        raise WireError(f"there must be at most {_MAX_AXES} axes, got {axes}")
    shape, dtype = reader.unpack(f"<{axes}I"), _DTYPES[code]
    if expect is not None:
        codec, like = expect[0], form_of(expect[1])
        if (text, shape, dtype) != (repr(codec).encode(), tuple(like.shape), _dtype(like.dtype)):
            got = f"{text.decode(errors='replace')} of {dtype}{list(shape)}"
            raise WireError(f"expected {codec} of {like.dtype}{list(like.shape)}, got {got}")
        return codec, jax.ShapeDtypeStruct(shape, dtype)
    # Without its zeros: NumPy refuses an empty array whose other axes overflow.
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > max_bytes:
        raise WireError(f"the features must have at most {max_bytes} bytes, got shape {list(shape)}")
    if math.prod(max(n, 1) for n in shape) >= 1 << 31:
        raise WireError(f"the features must be fewer than 2^31, got shape {list(shape)}")
    return read_codec(text), jax.ShapeDtypeStruct(shape, dtype)


def read_codec(text: bytes) -> compress.Codec:
    """Returns the codec whose `repr` a stranger has sent; raises WireError for any other text."""
    if not _CODEC_TEXT.fullmatch(text) or len(text) > _MAX_CODEC_TEXT:
        raise WireError(f"the codec's text must be as `repr` gives it, got {text[:80]!r}")
    try:
        return compress.from_string(text.decode())
    except (ValueError, TypeError) as error:
        raise WireError(f"unknown codec {text[:80]!r}: {error}") from None


def _read_array(reader, form, coding, length, *, may_cut, grid):
    try:
        buffer = _buffers.decode_buffer(reader.take(length), form, coding, may_cut=may_cut, grid=grid)
    except ValueError as error:
        raise error if isinstance(error, WireError) else WireError(str(error)) from None
    return np.frombuffer(buffer, form.dtype).reshape(form.shape)


def _dtype(dtype):
    return np.dtype(dtype)


def _layout(codec, like):
    """The payload's shapes and dtypes; not traced by JAX, which would remember every shape that a stranger sends."""
    try:
        return codec.payload_like(like)
    except (ValueError, TypeError) as error:
        raise WireError(f"{codec} takes no {like.dtype}{list(like.shape)}: {error}") from None


class _Reader:
    """Takes a message apart from its beginning."""

    def __init__(self, data):
        self._data, self._at = data, 0

    def take(self, length):
        if length > len(self._data) - self._at:
            raise WireError(f"the message ends after {len(self._data)} bytes, in the middle")
        self._at += length
        return self._data[self._at - length : self._at]

    def unpack(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def rest(self):
        return self._data[self._at :]

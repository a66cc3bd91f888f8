"""zlib's raw deflate streams (RFC 1951), made without matches but of a byte with itself, and read with bounds."""

import zlib

import numpy as np

MOST_WITHOUT_RUNS, MOST = 8, 1032
"""The most bytes that one byte of a stream stands for: a literal takes a bit at least, a run of 258 two."""
BLOCK = (1 << 15) - 1
"""Bytes that zlib collects before it ends a block, at its largest memory level."""
_CHUNK = 1 << 16
_PIECE = 8 * _CHUNK + 8
"""Bytes that are read of a stream at a time, in and out."""


def huffman(raw: bytes | memoryview | np.ndarray) -> bytes:
    """Returns `raw` as a raw deflate stream (RFC 1951) without matches: Huffman codes alone."""
    return _deflated(raw, zlib.Z_HUFFMAN_ONLY)


def runs(raw: bytes | memoryview | np.ndarray) -> bytes:
    """Returns `raw` as a raw deflate stream in which a byte's repetitions are coded by their number."""
    return _deflated(raw, zlib.Z_RLE)


def _deflated(raw, strategy):
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(raw) + coder.flush()


def inflated(coded: memoryview, raw_bytes: int, most: int = MOST) -> tuple[np.ndarray, int]:
    """Returns the `raw_bytes` bytes of the stream that `coded` begins with, and how many bytes the stream has.

    It is read in pieces: zlib would make all of it twice. Of an empty array's untouched pages no memory is taken.

    Raises:
      ValueError: there is no such stream.
    """
    if raw_bytes > most * len(coded):
        raise ValueError(f"a compressed buffer of {len(coded)} bytes cannot hold {raw_bytes}")
    out, at, used, decoder = np.empty(raw_bytes, np.uint8), 0, 0, zlib.decompressobj(-15)
    try:
        for start in range(0, len(coded), _CHUNK):
            left: bytes | memoryview = coded[start : start + _CHUNK]
            used, more = start + len(left), True
            while more and not decoder.eof:
                piece = decoder.decompress(left, _PIECE)
                if at + len(piece) > raw_bytes:
                    raise ValueError(f"a compressed buffer must end after {raw_bytes} bytes, and does not")
                out[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at, left = at + len(piece), decoder.unconsumed_tail
                more = bool(left) or len(piece) == _PIECE  # all of it is read, and not yet all of a run written
            if decoder.eof:
                break
    except zlib.error as error:
        raise ValueError(f"a compressed buffer is damaged: {error}") from None
    if at != raw_bytes or not decoder.eof:
        raise ValueError(f"a compressed buffer must end after {raw_bytes} bytes, and does not")
    return out, used - len(decoder.unused_data)

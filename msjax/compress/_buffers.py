"""The buffers of a message: one array of a payload each, in the coding that makes the fewest bytes of it."""

import math
from typing import Any

import jax
import numpy as np

from msjax.compress import _coding_costs, _contexts, _deflate

RAW, HUFFMAN, CUT, RUNS, CLASSES, PLANES = 0, 1, 2, 3, 4, 5
"""Codings, as messages number them; see `msjax.wire`."""
_CODED = 1 << 31
"""Set in the length of a plane that is coded."""
_NEAR = 0.04  # an estimate may be off by so much
_SHORT = 1 / 16  # of a buffer: what becomes shorter is coded fast, and estimates of it are worse


def code(
    array: np.ndarray, compression: str | None, *, cut: bool, grid: _contexts.Grid | None = None
) -> tuple[int, Any]:
    """Returns (coding, buffer) of one array.

    Args:
      compression: "huffman" to code bytes where that makes them fewer; "all" to do so with floats, too.
      cut: leave out zeros at the end of what is no bytes.
      grid: where the array's codes have neighbours.
    """
    array = np.ascontiguousarray(array)
    raw = array.reshape(-1).view(np.uint8).data
    if compression is not None and array.dtype == np.uint8 and array.size:
        coding, coded = shortest(array.reshape(-1), grid_for(array.size, grid))
        if len(coded) < len(raw):
            return coding, coded
    if cut and array.dtype != np.uint8:
        short = bytes(raw).rstrip(b"\0")
        if len(short) < len(raw):
            return CUT, short
    if compression == "all" and not cut and has_planes(array.dtype) and 0 < array.size < _CODED:
        coded = _planes(array)
        if len(coded) < len(raw):
            return PLANES, coded
    return RAW, raw


def has_planes(dtype: Any) -> bool:
    """Whether arrays of this dtype are coded byte by byte of their values: those of floats."""
    return jax.dtypes.issubdtype(dtype, np.floating)


def _planes(array):
    """The first bytes of all values, then the second ones, and so on, each as they are or coded.

    The highest byte of a weight has its sign and most of its exponent, which is of few sizes. Others are nearly noise.
    """
    parts = []
    for plane in array.reshape(-1, 1).view(np.uint8).T:
        raw = plane.tobytes()
        coded = _deflate.huffman(raw)
        shorter = len(coded) < len(raw)
        part = coded if shorter else raw
        parts += [(len(part) | shorter * _CODED).to_bytes(4, "little"), part]
    return b"".join(parts)


def _from_planes(buffer, form):
    """The bytes of an array of floats from its planes."""
    size, planes = math.prod(form.shape), []
    for _ in range(form.dtype.itemsize):
        length = int.from_bytes(buffer[:4], "little")
        coded, length = length & _CODED, length % _CODED
        part, buffer = buffer[4 : 4 + length], buffer[4 + length :]
        if len(part) < length or (size > _deflate.MOST_WITHOUT_RUNS * length if coded else size != length):
            raise ValueError(f"a plane of {size} values must have as many bytes, got {len(part)} of {length}")
        planes.append((coded, part))
    if len(buffer):
        raise ValueError(f"{len(buffer)} bytes behind the last plane")
    # Not before all that could be seen of them is right.
    out = np.empty((size, len(planes)), np.uint8)
    for byte, (coded, part) in enumerate(planes):
        plane = _whole(part, size, _deflate.MOST_WITHOUT_RUNS) if coded else np.frombuffer(part, np.uint8)
        out[:, byte] = plane
    return out.reshape(-1)


def decode_buffer(
    buffer: Any, form: jax.ShapeDtypeStruct, coding: int, *, may_cut: bool, grid: _contexts.Grid | None
) -> Any:
    """Returns the bytes of an array of shape and dtype `form` from a buffer that may come from anybody.

    Raises:
      ValueError: the buffer is not what this coding makes of such an array.
    """
    raw = math.prod(form.shape) * form.dtype.itemsize
    if coding == HUFFMAN:
        buffer = _whole(buffer, raw, _deflate.MOST_WITHOUT_RUNS)
    elif coding == RUNS:
        buffer = _whole(buffer, raw, _deflate.MOST)
    elif coding == CLASSES and form.dtype == np.uint8:
        buffer = _contexts.decoded(buffer, raw, grid_for(raw, grid))
    elif coding == CUT and may_cut and form.dtype != np.uint8:
        buffer = bytes(buffer).ljust(raw, b"\0")
    elif coding == PLANES and not may_cut and has_planes(form.dtype):
        buffer = _from_planes(buffer, form)
    elif coding != RAW:
        rule = "0, 1 or 3, 2 where zeros may be cut, 4 of codes, or 5 of whole floats"
        raise ValueError(f"coding must be {rule}, got {coding}")
    if len(buffer) != raw:
        raise ValueError(f"a buffer of {form.dtype}{list(form.shape)} must have {raw} bytes, got {len(buffer)}")
    return buffer


def grid_for(raw_bytes: int, grid: _contexts.Grid | None) -> _contexts.Grid | None:
    """Returns the grid of a buffer of so many bytes; a payload may have others than that of the codes."""
    return grid if grid is not None and grid.buffer_bytes == raw_bytes else None


def shortest(raw: np.ndarray, grid: _contexts.Grid | None) -> tuple[int, bytes]:
    """Returns (coding, buffer) of the coding that makes the least of bytes of codes; of long ones by an estimate.

    All whose estimate is near the least are tried, and all of what becomes very short.
    """
    coders = {
        "huffman": (HUFFMAN, _deflate.huffman),
        "runs": (RUNS, _deflate.runs),
        "flags": (CLASSES, lambda raw: _contexts.coded(raw, None)),
    }
    if grid is not None:
        coders["classes"] = CLASSES, lambda raw: _contexts.coded(raw, grid)
    if raw.size > _coding_costs.ALWAYS_WHOLE:
        found = _coding_costs.costs(raw, grid)
        least = min(found.values())
        if least > raw.size * _SHORT:
            coders = {name: coder for name, coder in coders.items() if found[name] <= least * (1 + _NEAR)}
    return min(((coding, coder(raw)) for coding, coder in coders.values()), key=lambda made: len(made[1]))


def _whole(coded, raw, most):
    """The `raw` bytes of the deflate stream that `coded` is."""
    out, used = _deflate.inflated(coded, raw, most)
    if used != len(coded):
        raise ValueError(f"a compressed buffer must end after {raw} bytes, and does not")
    return out

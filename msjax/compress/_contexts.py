"""Bytes of codes in classes by their neighbours: what lets zlib code a feature map as a map (coding 4 of `msjax.wire`).

Codes are alike where they are next to each other, and a channel's neighbours lie far apart in memory: `EntropyMask` and
others hold g codes of one pixel in a byte, the channels of a pixel before the next pixel. So the class of a byte is
taken from the bytes of the same channels in the pixels to its left and above, and each class gets Huffman codes of its
own (as the contexts of JPEG-LS, Weinberger et al., IEEE Trans. IP 9, 2000, with zlib in place of an adaptive coder).

A byte's *size* is that of its codes: in the low four bits that of the sum of their first half, in the high four that of
the others', from 0 to 7 each. Of a byte that holds one code it is the code, to 127, or its magnitude. The sizes of two
neighbours can be added without a carry. The class follows from the sum by thresholds, the same for both halves.

Pixels are taken diagonal by diagonal, from the upper left, so that a pixel's neighbours are on the diagonal before and
NumPy decodes all samples of a whole diagonal at once. At the edges the neighbour that is there counts twice.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from msjax.compress import _deflate
from msjax.compress._entropy_mask import EntropyMask
from msjax.compress._mask_encoded import MaskEncoded

MOST_LEVELS = 4
"""Levels of a half's size; there are at most their square of classes."""
_STEP_BYTES = 256
"""Bytes that a diagonal must have on average: each is some calls of NumPy, however few they are."""
_ROW_BYTES = 16
"""Bytes that a pixel of all samples must have: its place takes as many."""
_SIZES = np.array([1, 2, 3, 4, 6, 9, 13])
"""The sums of codes at which the sizes 1 to 7 begin: as they are at first, then by their logarithm."""
_MOST_WHOLE = 127
_MOST_BYTES = (1 << 31) - 1
_FACTORS = tuple(3.5 * (level / MOST_LEVELS) ** 1.5 for level in range(1, MOST_LEVELS))
"""Thresholds against the mean; measured on features and gradients, where they are flat: see experiments.contexts."""
_IN_PAIRS = 1 << 17  # bytes that are quicker counted two by two
_PIECE = 1 << 13  # bytes that are sorted at once, within a core's cache


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the bytes of codes lie in space."""

    samples: int
    height: int
    width: int
    pixel_bytes: int
    sizes: tuple[int, ...]
    """Of each of the 256 bytes."""
    halves: bool
    """Whether a size has two halves."""

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def row_bytes(self) -> int:
        """Bytes of a pixel, of all samples."""
        return self.samples * self.pixel_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all."""
        return self.pixels * self.row_bytes

    def classes(self, levels: int) -> int:
        """How many classes there are with so many levels."""
        return levels**2 if self.halves else levels

    def mean_size(self, counts: np.ndarray) -> float:
        """The mean of the halves of the sizes of bytes with this histogram, twice: of a sum of two."""
        sizes = np.array(self.sizes)
        halves = sizes % 16 + sizes // 16 if self.halves else 2 * sizes
        return float(counts @ halves / max(1, counts.sum()))

    def class_table(self, thresholds: tuple[int, ...]) -> np.ndarray:
        """uint8 (256,): the class of each sum of two sizes."""
        sums, levels = np.arange(256), len(thresholds) + 1

        def level(size):
            return (size[:, None] > np.array(thresholds, int)[None]).sum(1)

        found = level(sums % 16) + levels * level(sums // 16) if self.halves else level(sums)
        return found.astype(np.uint8)


def grid_of(codec: Any, like: Any) -> Grid | None:
    """Returns where the codes of an array like `like` lie, or None where the codec's bytes have no neighbours.

    The last three axes are height, width and channels, and all before are samples; of three axes the middle one is
    height, and the width is 1. Arrays of two axes have no neighbours; nor have bytes that hold codes of two pixels, as
    those of a channel that is compressed by itself.
    """
    form = _form(codec)
    if form is None or codec.granularity == "channel" or len(like.shape) < 3 or not math.prod(like.shape):
        return None
    base, per_byte, zero = form
    *samples, height, width, channels = like.shape if len(like.shape) > 3 else (*like.shape[:2], 1, like.shape[2])
    pixel_bytes, rest = divmod(channels, per_byte)
    if rest or height * width == 1:
        return None
    grid = Grid(math.prod(samples), height, width, pixel_bytes, _sizes(base, per_byte, zero), per_byte > 1)
    enough = grid.buffer_bytes >= _STEP_BYTES * (height + width - 1) and grid.row_bytes >= _ROW_BYTES
    return grid if enough else None


def _form(codec):
    """(base, codes in a byte, the code of zero) of a codec whose bytes hold whole codes, else None."""
    if isinstance(codec, EntropyMask):
        return codec.levels + 1, codec._per_byte, codec._most if codec.signed else 0
    if isinstance(codec, MaskEncoded) and 8 % codec.bits == 0:
        return 2**codec.bits, 8 // codec.bits, 0
    return None


@functools.lru_cache(maxsize=64)
def _sizes(base, per_byte, zero):
    digits = np.arange(256)[:, None] // base ** np.arange(per_byte)[None] % base
    magnitude = np.abs(digits - zero)
    if per_byte == 1:
        return tuple(np.minimum(magnitude[:, 0], _MOST_WHOLE).tolist())
    first = (per_byte + 1) // 2
    low, high = magnitude[:, :first].sum(1), magnitude[:, first:].sum(1)

    def narrowed(total):
        return np.searchsorted(_SIZES, total, side="right")

    return tuple((narrowed(low) + 16 * narrowed(high)).tolist())


class Order(NamedTuple):
    """Pixels by diagonals."""

    pixels: np.ndarray
    """int32 (P,): their places in memory."""
    left: np.ndarray
    """int32 (P,): places in this order of their left neighbours; where there is none, of the upper one."""
    above: np.ndarray
    """int32 (P,): of their upper ones, or of the left. Both of the first pixel are the pixel itself."""
    ends: tuple[int, ...]
    """(D + 1,): where diagonals begin, and the last one ends."""


def order_of(height: int, width: int) -> Order:
    """Returns the order of an image's pixels."""
    # What strangers ask for is not kept, if it is large.
    return (_kept_order if height * width <= 1 << 14 else _order)(height, width)


def _order(height, width):
    y, x = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    pixels = np.argsort(x + y, kind="stable").astype(np.int32)
    place = np.empty_like(pixels)
    place[pixels] = np.arange(pixels.size, dtype=np.int32)
    y, x = y[pixels], x[pixels]
    before, over = (pixels - np.int32(1)), (pixels - np.int32(width))
    left, above = np.where(x > 0, before, over), np.where(y > 0, over, before)
    left[0] = above[0] = 0
    return Order(pixels, place[left], place[above], tuple(np.searchsorted(x + y, np.arange(height + width)).tolist()))


_kept_order = functools.lru_cache(maxsize=16)(_order)


# -- Coding. -----------------------------------------------------------------------------------------------------------


def coded(raw: np.ndarray, grid: Grid | None) -> bytes:
    """Returns the bytes of a buffer by classes; without a grid all of them are one class. See `msjax.wire`."""
    counts = histogram(raw)
    commonest = int(counts.argmax())
    thresholds: tuple[int, ...] = ()
    if grid is None:
        streams = [raw]
    else:
        thresholds = tuple(map(int, thresholds_of(np.float32(grid.mean_size(counts)))))
        streams = _split(raw, thresholds, grid)
    head = bytes([len(thresholds) + 1, commonest, *thresholds])
    numbers, parts = [], []
    for stream in streams:
        other = stream != commonest
        sparse = 2 * int(np.count_nonzero(other)) < stream.size
        numbers.append(stream.size | sparse << 31)
        if sparse:
            flags = np.packbits(other)
            parts.append(min(_deflate.huffman(flags), _deflate.runs(flags), key=len))
            stream = stream.compress(other)
        if stream.size:
            parts.append(_deflate.huffman(stream))
    return b"".join([head, np.array(numbers, "<u4").tobytes(), *parts])


def histogram(raw: np.ndarray) -> np.ndarray:
    """Returns how often each byte occurs in `raw`, uint8 (n,): int64 (256,)."""
    if raw.size < _IN_PAIRS or raw.size % 2 or not raw.flags.c_contiguous:
        return np.bincount(raw, minlength=256)
    # In pairs, since NumPy makes eight bytes of each number that it counts.
    pairs = np.bincount(raw.view(np.uint16), minlength=1 << 16).reshape(256, 256)
    return pairs.sum(0) + pairs.sum(1)


def decoded(data: memoryview, raw_bytes: int, grid: Grid | None) -> np.ndarray:
    """Returns the `raw_bytes` bytes of a buffer that `coded` made, uint8.

    Raises:
      ValueError: it made none that are these.
    """
    if len(data) < 2 or not 1 <= data[0] <= (1 if grid is None else MOST_LEVELS):
        raise ValueError(f"levels must be 1, or to {MOST_LEVELS} where bytes have neighbours, got {bytes(data[:1])!r}")
    levels, commonest = data[0], data[1]
    thresholds, data = tuple(data[2 : levels + 1]), data[levels + 1 :]
    if len(thresholds) != levels - 1 or any(a >= b for a, b in itertools.pairwise(thresholds)):
        raise ValueError(f"thresholds must be {levels - 1} that increase, got {thresholds}")
    classes = 1 if grid is None or levels == 1 else grid.classes(levels)
    if len(data) < 4 * classes:
        raise ValueError(f"there must be {classes} classes, got {len(data)} bytes")
    numbers, data = np.frombuffer(data[: 4 * classes], "<u4").astype(np.int64), data[4 * classes :]
    lengths, sparse = numbers & _MOST_BYTES, numbers >> 31
    if lengths.sum() != raw_bytes:
        raise ValueError(f"the classes must have {raw_bytes} bytes, got {lengths.sum()}")
    streams = []
    for length, with_flags in zip(lengths.tolist(), sparse.tolist(), strict=True):
        stream, used = _stream(data, length, commonest, with_flags)
        streams.append(stream)
        data = data[used:]
    if len(data):
        raise ValueError(f"{len(data)} bytes behind the last class")
    return streams[0] if levels == 1 else _placed(streams, thresholds, grid)


def _stream(data, length, commonest, with_flags):
    """(the bytes of a class, how many bytes of `data` they took)."""
    if not length:
        return np.empty(0, np.uint8), 0
    if not with_flags:
        return _deflate.inflated(data, length)
    flags, used = _deflate.inflated(data, -(-length // 8))
    other = np.unpackbits(flags)
    if other[length:].any():
        raise ValueError("a flag stands for no byte")
    other = other[:length].view(bool)
    others = int(np.count_nonzero(other))
    stream = np.full(length, commonest, np.uint8)
    if others:
        stream[other], more = _deflate.inflated(data[used:], others)
        used += more
    return stream, used


def thresholds_of(mean_size: Any) -> tuple:
    """Sums of sizes above which each next level begins, by the mean of the sums: int32, of NumPy or JAX."""
    found: list[Any] = []
    for place, factor in enumerate(_FACTORS):
        least = found[-1] + 1 if found else 0
        found.append((np.float32(factor) * mean_size).astype(np.int32).clip(least, 255 - len(_FACTORS) + place))
    return tuple(found)


def _by_diagonals(raw, grid):
    """uint8 (pixels, samples · bytes of a pixel)."""
    pixels = raw.reshape(grid.samples, grid.pixels, grid.pixel_bytes)[:, order_of(grid.height, grid.width).pixels]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2)).reshape(grid.pixels, -1)


def _split(raw, thresholds, grid):
    """The bytes of each class, by diagonals."""
    rows = _by_diagonals(raw, grid)
    order = order_of(grid.height, grid.width)
    sizes, table = np.array(grid.sizes, np.uint8).take(rows), grid.class_table(thresholds)
    edges = np.arange(1, grid.classes(len(thresholds) + 1), dtype=np.uint8)
    step, pieces = max(1, _PIECE // rows.shape[1]), []
    for start in range(0, grid.pixels, step):
        sums = sizes.take(order.left[start : start + step], axis=0)
        sums += sizes.take(order.above[start : start + step], axis=0)
        if not start:
            sums[0] = 0
        classes = table.take(sums.reshape(-1))
        by_class = classes.argsort(kind="stable")
        piece = rows[start : start + step].reshape(-1).take(by_class)
        ends = classes.take(by_class).searchsorted(edges).tolist()
        pieces.append([piece[a:b] for a, b in itertools.pairwise([0, *ends, piece.size])])
    return [np.concatenate(of_class) for of_class in zip(*pieces, strict=True)]


def _placed(streams, thresholds, grid):
    """The bytes in memory order, of those of each class; the inverse of `_split`."""
    order = order_of(grid.height, grid.width)
    sizes, table = np.array(grid.sizes, np.uint8), grid.class_table(thresholds)
    rows = np.empty((grid.pixels, grid.row_bytes), np.uint8)
    known = np.empty_like(rows)
    known[0] = 0  # the first pixel's neighbours are said to be itself
    lengths, taken = np.array([stream.size for stream in streams]), np.zeros(len(streams), np.int64)
    for start, end in itertools.pairwise(order.ends):
        sums = known[order.left[start:end]]
        sums += known[order.above[start:end]]
        classes = table.take(sums.reshape(-1))
        until = taken + np.bincount(classes, minlength=len(streams))
        if (until > lengths).any():
            raise ValueError("a class ends before all its bytes are placed")
        spans = zip(streams, taken.tolist(), until.tolist(), strict=True)
        row = rows[start:end].reshape(-1)  # of whole rows a view
        row[classes.argsort(kind="stable")] = np.concatenate([stream[a:b] for stream, a, b in spans])
        known[start:end] = sizes.take(rows[start:end])
        taken = until
    if (taken != lengths).any():
        raise ValueError("a class has bytes without a place")
    out = np.empty((grid.samples, grid.pixels, grid.pixel_bytes), np.uint8)
    out[:, order.pixels] = rows.reshape(grid.pixels, grid.samples, -1).transpose(1, 0, 2)
    return out.reshape(-1)

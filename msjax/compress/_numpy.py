"""Encoding by NumPy alone: the bits of the JAX encoders, for hosts on which JAX should not be in the way.

Passes go over pieces that stay in the processor's cache; NumPy writes every intermediate result to memory.
"""

from collections.abc import Iterator

import numpy as np

from msjax.compress import _finite

PIECE = 1 << 15
_SAMPLE = 1 << 15  # values that the first guess of the threshold is taken from


def pieces(d: int) -> Iterator[slice]:
    """Slices that cover d elements; each begins at a whole byte of packed codes, of however many bits."""
    return (slice(start, min(d, start + PIECE)) for start in range(0, d, PIECE))


def score(x: np.ndarray, *, by_magnitude: bool) -> np.ndarray:
    """`_select.score`, with two zeros and many NaNs: comparisons do not tell them apart."""
    x = x.astype(np.float32, copy=False)
    return np.abs(x) if by_magnitude else x


def largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.float32]:
    """(positions of the k largest scores, ascending; the smallest of these), with the order of `_select`."""
    kth = _kth_largest(_likely(scores, k), k)
    if np.isnan(kth):
        return np.flatnonzero(np.isnan(scores))[:k], kth
    kept = np.flatnonzero(~(scores < kth))
    tied = np.flatnonzero(scores[kept] == kth)
    return np.delete(kept, tied[tied.size - (kept.size - k) :]), kth


def _likely(scores, k):
    """All scores from a guess of the k-th on; NumPy's selection slows down on many equal ones, as zeros are."""
    sample = scores[:: max(1, scores.size // _SAMPLE)]
    guess = _kth_largest(sample, min(sample.size, 8 + 3 * k * sample.size // (2 * scores.size)))
    likely = scores[~(scores < guess)]
    return likely if likely.size >= k else scores


def _kth_largest(scores, k):
    return np.partition(scores, scores.size - k)[scores.size - k]  # NumPy has NaN last, above +Inf


def scale(largest: np.float32) -> np.float32:
    """What numbers are multiplied by before they are divided, as `_finite.lowered` does."""
    return np.float32(_finite.DOWN if largest > _finite.LARGE else 1)


def to_codes(steps: np.ndarray, most: int, rounding: str = "nearest") -> np.ndarray:
    """uint8 codes 0 … most of float32 `steps`, which are overwritten; NaN becomes 0."""
    steps = np.rint(steps, out=steps) if rounding == "nearest" else np.floor(steps, out=steps)
    steps = np.fmax(steps, np.float32(0), out=steps)
    return np.minimum(steps, np.float32(most), out=steps).astype(np.uint8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """`_bits.pack` of uint8 codes."""
    if bits == 8 or not codes.size:
        return codes
    return np.concatenate([_pack(codes[piece], bits) for piece in pieces(codes.size)])


def _pack(codes, bits):
    if 8 % bits:
        spread = np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little")
        return np.packbits(spread.reshape(-1), bitorder="little")
    if bits == 1:
        return np.packbits(codes, bitorder="little")
    # The codes of one byte of the result, read as one number, and shifted onto each other at its low end.
    count = 8 // bits
    words = np.pad(codes, (0, -codes.size % count)).view(f"<u{count}")
    packed = words.copy()
    for i in range(1, count):
        packed |= words >> packed.dtype.type((8 - bits) * i)
    return packed.astype(np.uint8)  # which drops all but the low byte

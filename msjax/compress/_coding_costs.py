"""About how many bytes each coding of `msjax.wire` makes of a long buffer, from a sample of it.

What depends on the order of bytes, runs and flags, is coded by zlib itself, in pieces from everywhere; classes are
estimated from the histogram of each, as `_class_bytes` does inside `jit`.
"""

import numpy as np

from msjax.compress import _contexts, _deflate, _huffman
from msjax.compress._grid_sample import grid_sample

ALWAYS_WHOLE = 1 << 16
"""Bytes up to which all codings are made as quickly as estimates of them."""
_SAMPLE = 1 << 15
_PIECES, _PIECE_BYTES = 256, 127  # prime, so that pieces meet all columns of an array
_RUNS_FACTOR = 1.45  # of flags coded by runs, against their entropy


def costs(raw: np.ndarray, grid: _contexts.Grid | None) -> dict[str, float]:
    """Returns the bytes that each coding would make of all of `raw`, uint8 (n,), with n above `ALWAYS_WHOLE`.

    "huffman" and "runs" are zlib's, "flags" is one class, and "classes", which needs a grid, are those by neighbours.
    """
    starts = np.arange(_PIECES) * (raw.size - _PIECE_BYTES) // (_PIECES - 1)
    pieces = np.concatenate([raw[at : at + _PIECE_BYTES] for at in starts.tolist()])
    scale, counts = raw.size / pieces.size, np.bincount(pieces, minlength=256)
    found = {
        "huffman": _scaled_bytes(_deflate.huffman(pieces), counts, scale),
        "runs": _scaled_bytes(_deflate.runs(pieces), counts, scale),
    }
    commonest = int(counts.argmax())
    if 2 * counts[commonest] > pieces.size:
        flags = np.packbits(pieces != commonest)
        flag_counts = np.bincount(flags, minlength=256)
        flags_coded = (_scaled_bytes(coder(flags), flag_counts, scale) for coder in (_deflate.huffman, _deflate.runs))
        counts[commonest] = 0
        found["flags"] = min(flags_coded) + float(_huffman_bits(counts[None], scale)[0]) / 8
    else:
        found["flags"] = found["huffman"] + 6  # without flags the head is all that differs
    return found if grid is None else found | {"classes": _class_bytes(raw, grid)}


def _scaled_bytes(coded, counts, scale):
    """Bytes of a stream of which `coded` is that of a sample, with these counts of its bytes."""
    described = (_huffman.CODE_BITS + _huffman.SYMBOL_BITS * np.count_nonzero(counts)) / 8
    blocks = max(1.0, counts.sum() * scale / _deflate.BLOCK)
    return scale * max(1.0, len(coded) - described) + blocks * described


def _class_bytes(raw, grid):
    """Of classes by neighbours, from a sample of pixels and their neighbours."""
    some = grid_sample(grid, _SAMPLE)
    values, left, above = some.values_and_neighbours(raw)
    sizes = np.array(grid.sizes, np.uint8)
    sums = np.where((some.places > 0)[..., None], sizes.take(left) + sizes.take(above), np.uint8(0))
    all_counts = np.bincount(values.reshape(-1), minlength=256)
    thresholds = tuple(map(int, _contexts.thresholds_of(np.float32(grid.mean_size(all_counts)))))
    classes = grid.classes(len(thresholds) + 1)
    joint = grid.class_table(thresholds).take(sums).astype(np.int32) * 256 + values
    counts = np.bincount(joint.reshape(-1), minlength=classes * 256).reshape(classes, 256).astype(np.float64)
    scale = raw.size / values.size
    return _coded_bytes(counts, int(all_counts.argmax()), scale) + 5 + 4 * classes


def _coded_bytes(counts, commonest, scale):
    """Of classes with these histograms, (classes, 256), each of whose numbers stands for `scale` bytes."""
    total, most = counts.sum(1), counts[:, commonest]
    sparse = 2 * most > total
    coded = np.where(sparse[:, None] & (np.arange(256) == commonest)[None], 0, counts)
    bits = _huffman_bits(coded, scale)
    other, groups = 1 - most[sparse] / total[sparse], total[sparse] * scale / 8
    in_runs = _RUNS_FACTOR * 8 * _huffman.binary_entropy(other, np)
    flags = groups * np.minimum(_huffman.flag_code_bits(other, np), in_runs)
    flags += _huffman.flag_description_bits(other, groups, np)
    return float(bits.sum() + flags.sum()) / 8


def _huffman_bits(counts, scale):
    """Bits of zlib's codes of each row of counts, (rows, 256), every number of which stands for `scale` bytes."""
    once, twice = np.count_nonzero(counts == 1, axis=1), np.count_nonzero(counts == 2, axis=1)
    # With those that the sample has not met (Chao, Scand. J. Statist. 11, 1984), if there is more than the sample.
    unseen = (1 - 1 / scale) * once * np.maximum(once - 1, 0) / (2 * (twice + 1))
    total, used = counts.sum(1), np.minimum(np.count_nonzero(counts, axis=1) + unseen, 256)
    # A sample's own code is better for it than for the rest: by half of log2(e) bits a symbol (Miller & Madow, 1955).
    bits = scale * _entropy_bits(counts) + (scale - 1) / (2 * np.log(2)) * np.maximum(used - 1, 0)
    blocks = np.ceil(total * scale / _deflate.BLOCK)
    longer = _huffman.redundancy(counts.max(axis=1) / np.maximum(total, 1)) * scale * total
    return bits + longer + blocks * (_huffman.CODE_BITS + _huffman.SYMBOL_BITS * used)


def _entropy_bits(counts):
    """Bits of all symbols of each row of counts at their entropy."""
    total = counts.sum(1)
    return total * np.log2(np.maximum(total, 1)) - (counts * np.log2(np.maximum(counts, 1))).sum(1)

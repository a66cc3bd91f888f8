"""How many bytes the codings of `msjax.wire` make of a buffer of codes, computed inside `jit`; see `_contexts`.

From histograms alone: within a class its flags are taken to be independent of each other, which on features and
gradients is within a percent of what zlib makes of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8

from msjax.compress import _bits, _contexts, _huffman
from msjax.compress._grid_sample import grid_sample

_SAMPLE = 1 << 15


def shortest_bytes(buffer: UInt8[Array, "b"], grid: _contexts.Grid | None) -> Float32[Array, ""]:
    """An estimate of the bytes that `buffer` takes, in the coding that makes the fewest of them."""
    raw = jnp.float32(buffer.size)
    if not buffer.size:
        return raw
    sample, scale = _pieces(buffer)
    counts = _huffman.histogram(sample.astype(jnp.int32), 256)
    found = [raw, _huffman.coded_bytes(buffer), _flat_bytes(buffer, counts, scale)]
    if buffer.size <= _SAMPLE:
        found.append(_huffman.run_bytes(buffer))
    if grid is not None:
        found.append(_class_bytes(buffer, grid, counts))
    return jnp.min(jnp.stack(found))


def plane_bytes(array: Array) -> Float32[Array, ""]:
    """An estimate of the bytes that an array of floats takes in planes."""
    planes = jax.lax.bitcast_convert_type(array.reshape(-1), jnp.uint8)
    coded = (4 + jnp.minimum(_huffman.coded_bytes(planes[:, n]), array.size) for n in range(planes.shape[1]))
    return jnp.sum(jnp.stack(list(coded)))


def _pieces(buffer):
    """(bytes from everywhere in the buffer, how many of its bytes one of these stands for)."""
    every, piece = max(1, buffer.size // _SAMPLE), 127
    if every == 1:
        return buffer, 1.0
    pieces = buffer.size // (every * piece)
    sample = buffer[: pieces * every * piece].reshape(pieces, every * piece)[:, :piece].reshape(-1)
    return sample, buffer.size / sample.size


def _flat_bytes(buffer, counts, scale):
    """Of one class: flags in the order of memory, as they are."""
    commonest = jnp.argmax(counts)
    flags = _bits.pack((buffer != commonest.astype(jnp.uint8)).astype(jnp.uint8), 1)
    flag_bytes = jnp.minimum(_huffman.coded_bytes(flags), _huffman.run_bytes(flags))
    others = _huffman.sampled_bits(jnp.where(jnp.arange(256) == commonest, 0, counts), scale) / 8
    with_flags = jnp.ceil(flag_bytes + others)
    return 6 + jnp.where(
        2 * counts[commonest] > jnp.sum(counts, dtype=counts.dtype), with_flags, jnp.float32(buffer.size)
    )


def _class_bytes(buffer, grid, all_counts):
    """Of classes by neighbours, from a sample of pixels."""
    commonest = jnp.argmax(all_counts)
    some = grid_sample(grid, _SAMPLE)
    values, left, above = (found.astype(jnp.int32) for found in some.values_and_neighbours(buffer))
    sizes = jnp.asarray(grid.sizes, jnp.uint8)
    sums = jnp.where((some.places > 0)[..., None], sizes[left] + sizes[above], jnp.uint8(0)).astype(jnp.int32)
    halves = sizes // 16 + sizes % 16 if grid.halves else 2 * sizes
    weights = all_counts.astype(jnp.float32)
    mean = jnp.vdot(weights, halves.astype(jnp.float32)) / jnp.sum(weights)
    levels, classes = _contexts.MOST_LEVELS, grid.classes(_contexts.MOST_LEVELS)
    thresholds = _contexts.thresholds_of(mean)

    def level(size):
        return sum((size > threshold).astype(jnp.int32) for threshold in thresholds)

    found = level(sums % 16) + levels * level(sums // 16) if grid.halves else level(sums)
    counts = _huffman.histogram((found * 256 + values).reshape(-1), classes * 256)
    scale = grid.buffer_bytes / values.size
    bits = jax.vmap(lambda c: _huffman.flagged_bits(c, commonest, scale))(counts.reshape(classes, 256))
    return 2 + len(thresholds) + 4 * classes + jnp.ceil(jnp.sum(bits) / 8)

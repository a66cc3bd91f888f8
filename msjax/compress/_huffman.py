"""How many bytes zlib's Huffman coder makes of a buffer, estimated inside `jit`.

`Z_HUFFMAN_ONLY` codes each block of bytes by a Huffman code of its own (RFC 1951), whose length follows from the
histogram alone. `Z_RLE` does so with a block of symbols, which are bytes, or numbers of repetitions of the byte before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

from msjax.compress._deflate import BLOCK

_BYTE = 256
_COUNTED_BLOCKS = 2
"""Blocks of a buffer that is counted whole."""
_PIECE = 127  # prime, so that pieces meet all columns of an array
_SEGMENTS, _SEGMENT = 64, 128  # many, as a few samples may have nearly all that is not zero
_LONGEST = 258
_WITH_SO_MANY = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1], np.float32)
"""Of bytes of eight flags: how many have 0 … 8 of them set."""
_LARGEST, _PARTS = 8, 8
CODE_BITS, SYMBOL_BITS = 68, 3.3
"""That describe a code, and one more symbol of it."""
_EXTRA_BITS = [0] * 8 + [n // 4 for n in range(4, 24)]
_LENGTH_CODES = np.repeat(np.arange(28, dtype=np.int32), [1 << bits for bits in _EXTRA_BITS])
_LENGTH_CODES[-1] = 28
_LENGTH_EXTRA = np.array([*_EXTRA_BITS, 0], np.int32)[_LENGTH_CODES]
"""Of 3 … 258 repetitions: the number of the symbol, and how many more bits it takes (RFC 1951, 3.2.5)."""


def histogram(symbols: Int32[Array, "n"], count: int) -> Int32[Array, "count"]:
    """How often each of `count` symbols occurs; on a CPU one index is several times as fast as two."""
    return jnp.zeros(count, jnp.int32).at[symbols].add(1)


def coded_bytes(buffer: UInt8[Array, "b"]) -> Float32[Array, ""]:
    """An estimate of the bytes that `buffer` takes, coded by zlib with `Z_HUFFMAN_ONLY` and memory level 9.

    Of long buffers from every fourth of equal pieces, in each of zlib's blocks.
    """
    size = buffer.size
    if not size:
        return jnp.float32(0)
    blocks = -(-size // BLOCK)
    if blocks <= _COUNTED_BLOCKS:
        number, symbols, scale = lax.iota(jnp.int32, size), buffer, 1.0
    else:
        pieces = size // _PIECE // 4
        # Counted in the program, of which a constant would be as large as the buffer.
        start = lax.iota(jnp.int32, pieces) * jnp.int32(4 * _PIECE)
        number = (start[:, None] + lax.iota(jnp.int32, _PIECE)[None]).reshape(-1)
        symbols = buffer[: 4 * pieces * _PIECE].reshape(pieces, 4 * _PIECE)[:, :_PIECE].reshape(-1)
        scale = size / symbols.size
    counts = histogram(number // jnp.int32(BLOCK) * _BYTE + symbols.astype(jnp.int32), blocks * _BYTE)
    return jnp.ceil(jnp.sum(jax.vmap(lambda c: sampled_bits(c, scale))(counts.reshape(blocks, _BYTE))) / 8)


def sampled_bits(counts: Int32[Array, "256"], scale: float) -> Float32[Array, ""]:
    """Bits of zlib's blocks of bytes of which every scale-th was counted."""
    body = code_bits(jnp.append(counts, 1)) * np.float32(scale)  # a block ends with a symbol of its own
    used = jnp.sum(counts > 0).astype(jnp.float32)
    # A sample's own code is better for it than for the rest: by half of log2(e) bits a symbol (Miller & Madow, 1955).
    body += np.float32((scale - 1) / (2 * np.log(2))) * jnp.maximum(used - 1, 0)
    blocks = jnp.ceil(jnp.sum(counts).astype(jnp.float32) * np.float32(scale / BLOCK))
    return body + blocks * description_bits(counts > 0)


def run_bytes(buffer: UInt8[Array, "b"]) -> Float32[Array, ""]:
    """An estimate of the bytes that `buffer` takes, coded by zlib with `Z_RLE` and memory level 9.

    Of long buffers from segments, one at a random place in each of as many equal parts.
    """
    size = buffer.size
    if not size:
        return jnp.float32(0)
    if size <= _SEGMENTS * (_SEGMENT + 1):
        return jnp.ceil(_run_bits(buffer[None], jnp.full(1, -1, jnp.int32), 1, size) / 8)
    number, room = np.arange(_SEGMENTS), size / _SEGMENTS
    places = (number * room + number * 0.6180339887 % 1 * (room - _SEGMENT - 1)).astype(int)
    found = buffer[places[:, None] + np.arange(_SEGMENT + 1)[None]]
    scale = size / (_SEGMENTS * _SEGMENT)
    return jnp.ceil(_run_bits(found[:, 1:], found[:, 0].astype(jnp.int32), scale, size) / 8)


def _run_bits(segments, before, scale, size):
    """Bits of a buffer of `size` bytes of which these are every scale-th: (S, L) bytes, and the one before each."""
    values = segments.astype(jnp.int32)
    length = values.shape[1]
    at = jnp.arange(length, dtype=jnp.int32)[None]
    fresh = values != jnp.concatenate([before[:, None], values[:, :-1]], axis=1)
    # A run that goes on from before its segment is taken to have begun right before it.
    # On a CPU `lax.cummax` takes longer.
    start = lax.associative_scan(jnp.maximum, jnp.where(fresh, at, -1), axis=1)
    following = jnp.concatenate([jnp.where(fresh, at, length)[:, 1:], jnp.full_like(before[:, None], length)], axis=1)
    end = lax.associative_scan(jnp.minimum, following, axis=1, reverse=True)
    place, repeats = at - start - 1, end - start - 1  # place among the repetitions of a byte; −1 for the byte itself
    left = repeats - place // _LONGEST * _LONGEST
    literal = (place < 0) | (left < 3)
    match = ~literal & (place % _LONGEST == 0)
    lengths = jnp.clip(jnp.minimum(left, _LONGEST), 3, _LONGEST) - 3
    symbols = jnp.where(literal, values, _BYTE + 1 + jnp.asarray(_LENGTH_CODES)[lengths])
    counted = (literal | match).reshape(-1).astype(jnp.int32)
    blocks, kinds = -(-size // BLOCK), _BYTE + 1 + 29
    block = jnp.int32(0)
    if blocks > 1:
        number = jnp.cumsum(counted, dtype=jnp.int32) - counted
        block = (number.astype(jnp.float32) * np.float32(scale / BLOCK)).astype(jnp.int32)
    counts = jnp.zeros(blocks * kinds, jnp.int32).at[block * kinds + symbols.reshape(-1)].add(counted)
    counts = counts.reshape(blocks, kinds)
    extra = jnp.sum(jnp.where(match, 1 + jnp.asarray(_LENGTH_EXTRA)[lengths], 0))  # one bit for the only distance
    bits = jax.vmap(code_bits)(counts.at[:, _BYTE].add(jnp.int32(scale == 1))).sum() + extra.astype(jnp.float32)
    described = jnp.where(counts.sum(1) > 0, jax.vmap(description_bits)(counts > 0), 0)
    return bits * np.float32(scale) + described.sum()


def flagged_bits(counts: Int32[Array, "256"], commonest: Any, scale: float) -> Float32[Array, ""]:
    """Bits of bytes of which every scale-th was counted, with flags for the commonest where it is more than half."""
    total = jnp.sum(counts)
    other = 1 - counts[commonest].astype(jnp.float32) / jnp.maximum(total, 1).astype(jnp.float32)
    sparse = other < 0.5
    groups = total.astype(jnp.float32) * np.float32(scale / 8)
    counts = jnp.where(sparse & (jnp.arange(_BYTE) == commonest), 0, counts)
    flags = groups * flag_code_bits(other, jnp) + flag_description_bits(other, groups, jnp)
    return jnp.where(sparse, flags, 0) + sampled_bits(counts, scale)


def bits_a_byte(sample: UInt8[Array, "n"], *, of: int) -> Float32[Array, ""]:
    """Bits that a byte takes in a buffer of `of` bytes, from a sample of them: in one code, or with flags.

    What describes the code is counted by a quarter of the code at most: of a short buffer it is most of a message.
    """
    counts = histogram(sample.astype(jnp.int32), _BYTE)
    code = code_bits(counts) / sample.size
    code += jnp.minimum(description_bits(counts > 0) / min(of, BLOCK), code / 4)
    commonest = jnp.argmax(counts)
    flagged = flagged_bits(counts, commonest, of / sample.size) / of
    return jnp.where(2 * counts[commonest] > sample.size, jnp.minimum(code, flagged), code)


def description_bits(used):
    """About the bits that describe a code: 17 and the code lengths' own lengths, and more for a symbol that is used."""
    return CODE_BITS + SYMBOL_BITS * jnp.sum(used).astype(jnp.float32)


def code_bits(counts: Int32[Array, "n"]) -> Float32[Array, ""]:
    """Bits of the Huffman code of n symbols with these counts, within about 2 %.

    The tree of the largest ones is made; its other leaves are equal parts of the rest, which are taken to have codes a
    few hundredths of a bit a symbol longer than their entropy. The tree of all would be a loop over all symbols, which
    took half of the time of an estimate.
    """
    counts = counts.astype(jnp.float32)
    # Without the barrier XLA sorts all of them on a CPU, in twenty times the time.
    top = lax.optimization_barrier(lax.top_k(jnp.pad(counts, (0, max(0, _LARGEST - counts.size))), _LARGEST)[0])
    rest = jnp.maximum(jnp.sum(counts) - jnp.sum(top), 0)
    parts = jnp.clip(jnp.ceil(rest / jnp.maximum(top[-1], 1)), 1, _PARTS)
    inside = _times_log(rest) - rest * jnp.log2(parts)
    inside -= jnp.sum(_times_log(counts)) - jnp.sum(_times_log(top))
    equal = jnp.where(jnp.arange(_PARTS, dtype=jnp.float32) < parts, rest / parts, 0)
    return _tree_bits(jnp.concatenate([top, equal])) + jnp.where(inside > 0, inside + redundancy(0.0) * rest, 0)


def _tree_bits(weights):
    """The sum of the inner nodes of the Huffman tree of (n,) weights, of which some may be 0.

    Two sorted queues, as in van Leeuwen's algorithm: the leaves, and the nodes in the order in which they are made.
    """
    n = weights.size
    leaves = jnp.append(jnp.sort(jnp.where(weights > 0, weights, jnp.inf)), jnp.full(2, jnp.inf, jnp.float32))
    merges = jnp.sum(weights > 0) - 1

    def merge(i, state):
        nodes, leaf, node, total = state
        weight = jnp.float32(0)
        for _ in range(2):
            from_leaves = leaves[leaf] <= nodes[node]
            weight += jnp.where(from_leaves, leaves[leaf], nodes[node])
            leaf, node = leaf + from_leaves.astype(jnp.int32), node + (~from_leaves).astype(jnp.int32)
        going = i < merges
        nodes = nodes.at[i].set(jnp.where(going, weight, jnp.inf))
        return nodes, leaf, node, total + jnp.where(going, weight, 0)

    zero = weights[0] * 0  # made of data, so that it varies over a mesh as the data does
    first = zero.astype(jnp.int32)
    start = (jnp.broadcast_to(zero + jnp.inf, (n + 2,)), first, first, zero)
    return lax.fori_loop(0, n - 1, merge, start)[3]


def _times_log(counts):
    return counts * jnp.log2(jnp.maximum(counts, 1))


def redundancy(most: Any) -> Any:
    """About the bits a symbol by which Huffman's code is above the entropy, where no symbol's share is above `most`.

    Fitted to codes of features and gradients of a ResNet at 0.3 to 3.2 bits, where `most` is from 0 to 0.4.
    """
    return 0.02 + 0.12 * most


def flag_code_bits(other: Any, xp: Any) -> Any:
    """Bits a byte of eight flags in its Huffman code, where a share `other` of flags is set, each independently."""
    entropy, none = 8 * binary_entropy(other, xp), (1 - other) ** 8
    # Where zero is two fifths of these bytes or more it takes one bit.
    rest = 1 + entropy - binary_entropy(none, xp) + redundancy(0.125) * (1 - none)
    return xp.where(none > 0.4, rest, entropy + redundancy(none))


def flag_description_bits(other: Any, groups: Any, xp: Any) -> Any:
    """Bits that describe the codes of so many bytes of eight flags, of which a share `other` is set."""
    number = np.arange(9, dtype=np.float32)
    shares = other[..., None] ** number * (1 - other[..., None]) ** (8 - number)
    used = (_WITH_SO_MANY * -xp.expm1(-groups[..., None] * shares)).sum(-1)
    return xp.ceil(groups / BLOCK) * (CODE_BITS + SYMBOL_BITS * used)


def binary_entropy(share: Any, xp: Any) -> Any:
    """Bits of a flag that is set with a probability `share`."""
    inside = xp.clip(share, 1e-6, 1 - 1e-6)
    return -inside * xp.log2(inside) - (1 - inside) * xp.log2(1 - inside)

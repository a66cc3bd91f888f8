"""How many bytes zlib's Huffman coder makes of a buffer, computed inside `jit`.

`Z_HUFFMAN_ONLY` codes each block of bytes by a Huffman code of its own (RFC 1951), whose length follows from the
histogram alone: it is the sum of the tree's inner nodes. `Z_RLE` does so with a block of symbols, which are bytes, or
numbers of repetitions of the byte before.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

_BLOCK = (1 << 15) - 1
"""Bytes that zlib collects before it ends a block, at its largest memory level."""
_BYTE, _NONE = 256, jnp.iinfo(jnp.int32).max
_SEGMENTS, _SEGMENT = 256, 512
_LONGEST = 258
_EXTRA_BITS = [0] * 8 + [n // 4 for n in range(4, 24)]
_LENGTH_CODES = np.repeat(np.arange(28), [1 << bits for bits in _EXTRA_BITS])
_LENGTH_CODES[-1] = 28
_LENGTH_EXTRA = np.array([*_EXTRA_BITS, 0])[_LENGTH_CODES]
"""Of 3 … 258 repetitions: the number of the symbol, and how many more bits it takes (RFC 1951, 3.2.5)."""


def coded_bytes(buffer: UInt8[Array, "b"]) -> Float32[Array, ""]:
    """An estimate of the bytes that `buffer` takes, coded by zlib with `Z_HUFFMAN_ONLY` and memory level 9."""
    if not buffer.size:
        return jnp.float32(0)
    blocks = jnp.arange(buffer.size, dtype=jnp.int32) // _BLOCK
    counts = jnp.zeros((-(-buffer.size // _BLOCK), _BYTE), jnp.int32).at[blocks, buffer.astype(jnp.int32)].add(1)
    return jnp.ceil(jnp.sum(jax.vmap(_block_bits)(counts)) / 8)


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
    segments = buffer[places[:, None] + np.arange(_SEGMENT + 1)[None]]
    scale = size / (_SEGMENTS * _SEGMENT)
    return jnp.ceil(_run_bits(segments[:, 1:], segments[:, 0].astype(jnp.int32), scale, size) / 8)


def _run_bits(segments, before, scale, size):
    """Bits of a buffer of `size` bytes of which these are every scale-th: (S, L) bytes, and the one before each."""
    values = segments.astype(jnp.int32)
    length = values.shape[1]
    at = jnp.arange(length, dtype=jnp.int32)[None]
    fresh = values != jnp.concatenate([before[:, None], values[:, :-1]], axis=1)
    # A run that goes on from before its segment is taken to have begun right before it.
    start = lax.cummax(jnp.where(fresh, at, -1), axis=1)
    following = jnp.concatenate([jnp.where(fresh, at, length)[:, 1:], jnp.full_like(before[:, None], length)], axis=1)
    end = lax.cummin(following, axis=1, reverse=True)
    place, repeats = at - start - 1, end - start - 1  # place among the repetitions of a byte; −1 for the byte itself
    left = repeats - place // _LONGEST * _LONGEST
    literal = (place < 0) | (left < 3)
    match = ~literal & (place % _LONGEST == 0)
    lengths = jnp.clip(jnp.minimum(left, _LONGEST), 3, _LONGEST) - 3
    symbols = jnp.where(literal, values, _BYTE + 1 + jnp.asarray(_LENGTH_CODES)[lengths])
    counted = (literal | match).reshape(-1).astype(jnp.int32)
    number = jnp.cumsum(counted, dtype=jnp.int32) - counted
    block = (number.astype(jnp.float32) * np.float32(scale / _BLOCK)).astype(jnp.int32)
    counts = jnp.zeros((-(-size // _BLOCK), _BYTE + 1 + 29), jnp.int32).at[block, symbols.reshape(-1)].add(counted)
    extra = jnp.sum(jnp.where(match, 1 + jnp.asarray(_LENGTH_EXTRA)[lengths], 0))  # one bit for the only distance
    bits = jax.vmap(code_bits)(counts.at[:, _BYTE].add(jnp.int32(scale == 1))).sum() + extra
    described = jnp.where(counts.sum(1) > 0, jax.vmap(_description_bits)(counts), 0)
    return bits.astype(jnp.float32) * np.float32(scale) + described.sum()


def bits_a_byte(sample: UInt8[Array, "n"], *, of: int) -> Float32[Array, ""]:
    """Bits that a byte takes in a buffer of `of` bytes, from a sample of them."""
    counts = jnp.zeros(_BYTE, jnp.int32).at[sample.astype(jnp.int32)].add(1)
    code = code_bits(counts).astype(jnp.float32) / sample.size
    return code + _description_bits(counts) / min(of, _BLOCK)


def _block_bits(counts: Int32[Array, "256"]) -> Float32[Array, ""]:
    """Bits of one block of bytes with this histogram."""
    body = code_bits(jnp.append(counts, 1))  # a block ends with a symbol of its own
    return body.astype(jnp.float32) + _description_bits(counts)


def _description_bits(counts):
    """About the bits that describe a code: 17, the code lengths' own lengths, and 3.3 a symbol that is used."""
    return 68 + 3.3 * jnp.sum(counts > 0).astype(jnp.float32)


def code_bits(counts: Int32[Array, "n"]) -> Int32[Array, ""]:
    """Bits of the Huffman code of n symbols with these counts: the sum of the inner nodes of its tree.

    Two sorted queues, as in van Leeuwen's algorithm: the leaves, and the nodes in the order in which they are made.
    """
    n = counts.size
    leaves = jnp.append(jnp.sort(jnp.where(counts > 0, counts, _NONE)), jnp.full(2, _NONE, jnp.int32))
    merges = jnp.sum(counts > 0) - 1

    def merge(i, state):
        nodes, leaf, node, total = state
        weight = jnp.int32(0)
        for _ in range(2):
            from_leaves = leaves[leaf] <= nodes[node]
            weight += jnp.where(from_leaves, leaves[leaf], nodes[node])
            leaf, node = leaf + from_leaves.astype(jnp.int32), node + (~from_leaves).astype(jnp.int32)
        going = i < merges
        nodes = nodes.at[i].set(jnp.where(going, weight, _NONE))
        return nodes, leaf, node, total + jnp.where(going, weight, 0)

    zero = counts[0] & 0  # made of data, so that it varies over a mesh as the data does
    start = (jnp.broadcast_to(zero + _NONE, (n + 2,)), zero, zero, zero)
    return lax.fori_loop(0, n - 1, merge, start)[3]

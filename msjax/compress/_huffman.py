"""How many bytes zlib's Huffman coder makes of a buffer, computed inside `jit`.

`Z_HUFFMAN_ONLY` codes each block of bytes by a Huffman code of its own (RFC 1951), whose length follows from the
histogram alone: it is the sum of the tree's inner nodes.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt8

_BLOCK = (1 << 15) - 1
"""Bytes that zlib collects before it ends a block, at its largest memory level."""
_BYTE, _NONE = 256, jnp.iinfo(jnp.int32).max


def coded_bytes(buffer: UInt8[Array, "b"]) -> Float32[Array, ""]:
    """An estimate of the bytes that `buffer` takes, coded by zlib with `Z_HUFFMAN_ONLY` and memory level 9."""
    if not buffer.size:
        return jnp.float32(0)
    blocks = jnp.arange(buffer.size, dtype=jnp.int32) // _BLOCK
    counts = jnp.zeros((-(-buffer.size // _BLOCK), _BYTE), jnp.int32).at[blocks, buffer.astype(jnp.int32)].add(1)
    return jnp.ceil(jnp.sum(jax.vmap(_block_bits)(counts)) / 8)


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

"""Packing of small codes into bytes, least significant bit first: by way of 32-bit words, on a TPU by `_bits_tpu`."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt8, UInt32

from msjax.compress import _bits_tpu
from msjax.compress._arrays import by_platform


def packed_bytes(d: int, bits: int) -> int:
    """Bytes that `d` codes of `bits` bits take: ⌈d·bits / 8⌉."""
    return -(-d * bits // 8)


def pack(codes: UInt8[Array, "d"], bits: int) -> UInt8[Array, "b"]:
    """Packs d codes < 2^bits into ⌈d·bits/8⌉ bytes; code i fills bits i·bits … (i+1)·bits − 1; spare bits are zero."""
    if bits == 8:
        return codes
    return by_platform(codes, tpu=_bits_tpu.pack, default=_pack_by_words, bits=bits)


def _pack_by_words(codes, bits):
    d = codes.shape[0]
    word, shift = _layout(bits)
    per_group, last = word.shape[1], word[0, -1]
    groups = jnp.pad(codes, (0, -d % per_group)).reshape(-1, per_group).astype(jnp.uint32)
    words = []
    # Sums over short rows, which XLA turns into vector code, as it does not with strided slices.
    for i in range(last + 1):
        inside = jnp.where(word == i, groups << jnp.asarray(shift), jnp.uint32(0))
        spilt = (word == i - 1) & (shift + bits > 32)
        if spilt.any():
            inside |= jnp.where(spilt, groups >> jnp.asarray((32 - shift) % 32), jnp.uint32(0))
        words.append(jnp.sum(inside, axis=1, dtype=jnp.uint32))
    return _bitcast_to_bytes(jnp.stack(words, axis=1).reshape(-1))[: packed_bytes(d, bits)]


def unpack(packed: UInt8[Array, "b"], bits: int, d: int) -> UInt8[Array, "d"]:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    return by_platform(packed, tpu=_bits_tpu.unpack, default=_unpack_by_words, bits=bits, d=d)


def _unpack_by_words(packed, bits, d):
    word, shift = _layout(bits)
    last = word[0, -1]
    groups = _bitcast_to_words(packed, (last + 1) * 4).reshape(-1, last + 1)
    codes = groups[:, word[0]] >> jnp.asarray(shift)
    if (shift + bits > 32).any():
        following = groups[:, np.minimum(word[0] + 1, last)] << jnp.asarray((32 - shift) % 32)
        codes |= jnp.where(shift + bits > 32, following, jnp.uint32(0))
    return (codes & jnp.uint32(2**bits - 1)).astype(jnp.uint8).reshape(-1)[:d]


def pack_words(mask: Bool[Array, "d"]) -> UInt32[Array, "w"]:
    """⌈d/32⌉ words of 32 entries each, the first in the lowest bit."""
    return by_platform(mask, tpu=_bits_tpu.pack_words, default=_pack_words_by_sums)


def _pack_words_by_sums(mask):
    rows = jnp.pad(mask, (0, -mask.shape[0] % 32)).reshape(-1, 32)
    return jnp.sum(rows.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[None], axis=1, dtype=jnp.uint32)


def unpack_words(words: UInt32[Array, "w"], d: int) -> Bool[Array, "d"]:
    """The inverse of `pack_words`."""
    return by_platform(words, tpu=_bits_tpu.unpack_words, default=_unpack_words_by_shifts, d=d)


def _unpack_words_by_shifts(words, d):
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & jnp.uint32(1)
    return bits.reshape(-1)[:d] == 1


def ones(d: int) -> UInt32[Array, "w"]:
    """`pack_words` of d entries that are all set."""
    return pack_words(jnp.ones(d, bool))


def as_bytes(words: UInt32[Array, "w"], d: int) -> UInt8[Array, "b"]:
    """The first ⌈d/8⌉ bytes of packed words: what `pack` makes of d codes of one bit."""
    return to_bytes(words)[: packed_bytes(d, 1)]


def to_bytes(words: UInt32[Array, "w"]) -> UInt8[Array, "b"]:
    """The four bytes of each word, the lowest first."""
    return by_platform(words, tpu=_bits_tpu.to_bytes, default=_bitcast_to_bytes)


def to_words(packed: UInt8[Array, "b"]) -> UInt32[Array, "w"]:
    """The inverse of `to_bytes`; what is missing of the last word is zero."""
    return by_platform(packed, tpu=_bits_tpu.to_words, default=_bitcast_to_words)


def nth_set(words: UInt32[Array, "n"], n: Int32[Array, "n"]) -> Int32[Array, "n"]:
    """Place of the n-th bit that is 1, from 0, in each word; nothing useful where there are fewer."""
    place = jnp.zeros_like(n)
    for width in (16, 8, 4, 2, 1):
        low = (words >> place.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1)
        below = lax.population_count(low).astype(jnp.int32)
        place, n = jnp.where(n >= below, place + width, place), jnp.where(n >= below, n - below, n)
    return place


def _layout(bits):
    """(word, shift) of each code in the smallest group that fills whole words, as rows of one to broadcast."""
    first = np.arange(math.lcm(bits, 32) // bits)[None] * bits
    return first // 32, (first % 32).astype(np.uint32)


def _bitcast_to_bytes(words):
    return lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)


def _bitcast_to_words(packed, multiple=4):
    return lax.bitcast_convert_type(jnp.pad(packed, (0, -packed.size % multiple)).reshape(-1, 4), jnp.uint32)

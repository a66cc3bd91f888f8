"""The packing of `_bits` as a TPU does it: bytes and codes find their places by products with matrices of 0 and 1.

The short rows that `_bits` reshapes to, of 4 or 32, a TPU pads to 128 each: many times the array. Bytes are exact in
bfloat16, and each place of a product gets one of them, or parts that share no bit. Compiled for a TPU, and compared on
a CPU; never run on one so far.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, UInt8, UInt32

_LANES = 128


def pack(codes: UInt8[Array, "d"], bits: int) -> UInt8[Array, "b"]:
    """`_bits.pack`, for fewer than 8 bits."""
    here, following, shift = _places(bits)
    rows = _rows(codes, here.shape[0])
    packed = _placed((rows << shift) & jnp.uint32(255), here)
    if 8 % bits:  # some codes go on in the next byte
        packed |= _placed(rows >> (jnp.uint32(8) - shift), following)
    return packed.astype(jnp.uint8).reshape(-1)[: -(-codes.size * bits // 8)]


def unpack(packed: UInt8[Array, "b"], bits: int, d: int) -> UInt8[Array, "d"]:
    """`_bits.unpack`, for fewer than 8 bits."""
    here, following, shift = _places(bits)
    rows = _rows(packed, here.shape[1])
    codes = _placed(rows, here.T) >> shift
    if 8 % bits:
        codes |= _placed(rows, following.T) << (jnp.uint32(8) - shift)
    return (codes & jnp.uint32(2**bits - 1)).astype(jnp.uint8).reshape(-1)[:d]


def pack_words(mask: Bool[Array, "d"]) -> UInt32[Array, "w"]:
    """`_bits.pack_words`."""
    return to_words(pack(mask.astype(jnp.uint8), 1))


def unpack_words(words: UInt32[Array, "w"], d: int) -> Bool[Array, "d"]:
    """`_bits.unpack_words`."""
    return unpack(to_bytes(words), 1, d) == 1


def to_bytes(words: UInt32[Array, "w"]) -> UInt8[Array, "b"]:
    """`_bits.to_bytes`."""
    rows = _rows(words, _LANES)
    parts = [_placed((rows >> jnp.uint32(8 * n)) & jnp.uint32(255), _every_fourth(n)) for n in range(4)]
    return sum(parts[1:], parts[0]).astype(jnp.uint8).reshape(-1)[: 4 * words.size]


def to_words(packed: UInt8[Array, "b"]) -> UInt32[Array, "w"]:
    """`_bits.to_words`."""
    rows = _rows(packed, 4 * _LANES)
    parts = [_placed(rows, _every_fourth(n).T) << jnp.uint32(8 * n) for n in range(4)]
    return sum(parts[1:], parts[0]).reshape(-1)[: -(-packed.size // 4)]


def _places(bits):
    """Returns where the codes of a row lie that fills whole bytes.

    Matrices of the byte that each begins in and of the one behind it, and its shift in the former.
    """
    group = math.gcd(bits, 8)
    codes, width = _LANES * 8 // group, _LANES * bits // group
    first = lax.iota(jnp.uint32, codes) * jnp.uint32(bits)
    byte = first // jnp.uint32(8)
    return _one_hot(byte, width), _one_hot(byte + jnp.uint32(1), width), (first % jnp.uint32(8))[None]


def _every_fourth(n):
    """The matrix that makes a word byte n of four."""
    return _one_hot(lax.iota(jnp.uint32, _LANES) * jnp.uint32(4) + jnp.uint32(n), 4 * _LANES)


def _one_hot(places, n):
    return (places[:, None] == lax.iota(jnp.uint32, n)[None]).astype(jnp.bfloat16)


def _rows(x, n):
    return jnp.pad(x, (0, -x.size % n)).reshape(-1, n).astype(jnp.uint32)


def _placed(rows, places):
    """The product of `rows`, numbers below 256, and a matrix."""
    product = jnp.dot(rows.astype(jnp.bfloat16), places, preferred_element_type=jnp.float32)
    return product.astype(jnp.int32).astype(jnp.uint32)

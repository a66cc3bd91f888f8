"""Packing of small codes into bytes, least significant bit first."""

import math

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def packed_bytes(d: int, bits: int) -> int:
    """Bytes that `d` codes of `bits` bits take: ⌈d·bits / 8⌉."""
    return -(-d * bits // 8)


def _group(bits: int) -> tuple[int, int]:
    """The smallest whole number of codes that fills whole bytes: (codes, bytes)."""
    gcd = math.gcd(bits, 8)
    return 8 // gcd, bits // gcd


def pack(codes: UInt8[Array, "d"], bits: int) -> UInt8[Array, "b"]:
    """Packs d codes < 2^bits into ⌈d·bits/8⌉ bytes; code i fills bits i·bits … (i+1)·bits − 1; spare bits are zero."""
    if bits == 8:
        return codes
    d = codes.shape[0]
    per_group, width = _group(bits)
    groups = jnp.pad(codes, (0, -d % per_group)).reshape(-1, per_group)
    out = []
    for byte in range(width):
        value = jnp.zeros(groups.shape[0], jnp.uint8)
        for i in range(per_group):
            shift = i * bits - byte * 8
            if -bits < shift < 8:
                code = groups[:, i]
                value |= code << jnp.uint8(shift) if shift >= 0 else code >> jnp.uint8(-shift)
        out.append(value)
    return jnp.stack(out, axis=1).reshape(-1)[: packed_bytes(d, bits)]


def unpack(packed: UInt8[Array, "b"], bits: int, d: int) -> UInt8[Array, "d"]:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    per_group, width = _group(bits)
    groups = jnp.pad(packed, (0, -packed.shape[0] % width)).reshape(-1, width)
    out = []
    for i in range(per_group):
        value = jnp.zeros(groups.shape[0], jnp.uint8)
        for byte in range(width):
            shift = i * bits - byte * 8
            if -bits < shift < 8:
                part = groups[:, byte]
                value |= part >> jnp.uint8(shift) if shift >= 0 else part << jnp.uint8(-shift)
        out.append(value & jnp.uint8(2**bits - 1))
    return jnp.stack(out, axis=1).reshape(-1)[:d]

"""Packing: equal to the reference's one long integer, for every width and many lengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.compress import _bits, _bits_tpu

from . import reference

LENGTHS = (0, 1, 3, 7, 8, 17, 33)


@functools.partial(jax.jit, static_argnums=(1,))
def both(all_codes, bits):
    """Every length in one program: compiling one apiece is what takes the time."""
    packed = [_bits.pack(codes, bits) for codes in all_codes]
    return packed, [_bits.unpack(p, bits, c.size) for p, c in zip(packed, all_codes, strict=True)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_is_the_loop_and_unpack_its_inverse(bits):
    rng = np.random.default_rng(bits)
    random = [rng.integers(0, 2**bits, d).astype(np.uint8) for d in LENGTHS]
    ones = [np.full(d, 2**bits - 1, np.uint8) for d in LENGTHS]
    for all_codes in (random, ones):
        for codes, packed, unpacked in zip(all_codes, *both([jnp.asarray(c) for c in all_codes], bits), strict=True):
            assert packed.dtype == unpacked.dtype == jnp.uint8
            assert packed.shape == (_bits.packed_bytes(codes.size, bits),)
            assert list(np.asarray(packed)) == reference.pack(codes, bits)  # spare bits are zero there
            np.testing.assert_array_equal(unpacked, codes)
            assert reference.unpack(packed, bits, codes.size) == list(codes)


def test_layout_is_least_significant_bit_first():
    codes = jnp.array([0b001, 0b010, 0b011, 0b100], jnp.uint8)
    np.testing.assert_array_equal(_bits.pack(codes, 3), [0b11_010_001, 0b0000_100_0])


@pytest.mark.parametrize("bits", (2, 3))
def test_vmap(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 13)).astype(np.uint8)
    packed = jax.vmap(lambda c: _bits.pack(c, bits))(jnp.asarray(codes))
    assert [list(row) for row in np.asarray(packed)] == [reference.pack(row, bits) for row in codes]
    np.testing.assert_array_equal(jax.vmap(lambda p: _bits.unpack(p, bits, 13))(packed), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes(bits):
    for d in range(34):
        assert _bits.packed_bytes(d, bits) == len(reference.pack([0] * d, bits))


@pytest.mark.parametrize("bits", range(1, 8))
def test_on_a_tpu(bits):
    """By products of matrices: the same bytes and words."""
    rng = np.random.default_rng(bits)
    for d in (0, 1, 333, 128 * 8, 3001):
        codes = jnp.asarray(rng.integers(0, 2**bits, d).astype(np.uint8))
        packed = _bits_tpu.pack(codes, bits)
        np.testing.assert_array_equal(packed, _bits.pack(codes, bits), strict=True)
        np.testing.assert_array_equal(_bits_tpu.unpack(packed, bits, d), codes, strict=True)


def test_words_on_a_tpu():
    rng = np.random.default_rng(0)
    for d in (0, 5, 700, 128 * 32, 9001):
        mask = jnp.asarray(rng.random(d) < 0.5)
        words = _bits._pack_words_on_tpu(mask)
        np.testing.assert_array_equal(words, _bits.pack_words(mask), strict=True)
        np.testing.assert_array_equal(_bits._unpack_words_on_tpu(words, d), mask, strict=True)
        np.testing.assert_array_equal(_bits_tpu.to_bytes(words), _bits.to_bytes(words), strict=True)
        for cut in range(0, 8, 3):
            packed = _bits.as_bytes(words, max(0, d - 8 * cut))
            np.testing.assert_array_equal(_bits_tpu.to_words(packed), _bits._bitcast_to_words(packed), strict=True)

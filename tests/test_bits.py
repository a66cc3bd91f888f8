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
def test_pack_by_products_of_matrices(bits):
    """As a TPU does it."""
    rng = np.random.default_rng(bits)
    for d in (0, 1, 333, 128 * 8, 3001):
        codes = rng.integers(0, 2**bits, d).astype(np.uint8)
        packed = _bits_tpu.pack(jnp.asarray(codes), bits)
        assert list(np.asarray(packed)) == reference.pack(codes, bits) and packed.dtype == jnp.uint8
        np.testing.assert_array_equal(_bits_tpu.unpack(packed, bits, d), codes, strict=True)
    rows = jnp.asarray(rng.integers(0, 2**bits, (3, 200)).astype(np.uint8))
    packed = jax.vmap(lambda row: _bits_tpu.pack(row, bits))(rows)
    np.testing.assert_array_equal(jax.vmap(lambda row: _bits_tpu.unpack(row, bits, 200))(packed), rows, strict=True)


def test_words_by_products_of_matrices():
    rng = np.random.default_rng(0)
    for d in (0, 5, 700, 128 * 32, 9001):
        mask = jnp.asarray(rng.random(d) < 0.5)
        words = _bits_tpu.pack_words(mask)
        np.testing.assert_array_equal(words, _bits._pack_words_by_sums(mask), strict=True)
        np.testing.assert_array_equal(_bits_tpu.unpack_words(words, d), mask, strict=True)
        np.testing.assert_array_equal(_bits_tpu.to_bytes(words), _bits._bitcast_to_bytes(words), strict=True)
        for missing in range(0, 8, 3):
            packed = _bits.as_bytes(words, max(0, d - 8 * missing))
            np.testing.assert_array_equal(_bits_tpu.to_words(packed), _bits._bitcast_to_words(packed), strict=True)


@pytest.mark.parametrize("platform", ("cpu", "cuda", "tpu"))
def test_products_are_for_tpus(platform):
    def all_of_it(codes):
        packed, words = _bits.pack(codes, 3), _bits.pack_words(codes > 3)
        return _bits.unpack(packed, 3, 96), _bits.unpack_words(words, 96), _bits.to_words(_bits.to_bytes(words))

    exported = jax.export.export(jax.jit(all_of_it), platforms=[platform])(jax.ShapeDtypeStruct((96,), jnp.uint8))
    assert ("dot_general" in exported.mlir_module()) == (platform == "tpu")


def test_an_axis_that_is_explicitly_sharded():
    mesh = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Explicit,))
    codes = jnp.asarray(np.arange(64, dtype=np.uint8) % 4)
    sharded = jax.device_put(codes, jax.NamedSharding(mesh, jax.P("c")))
    np.testing.assert_array_equal(jax.jit(lambda c: _bits.pack(c, 2))(sharded), _bits.pack(codes, 2))

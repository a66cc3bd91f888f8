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


@functools.partial(jax.jit, static_argnums=(2,))
def by_products(all_codes, rows, bits):
    packed, of_rows = [_bits_tpu.pack(codes, bits) for codes in all_codes], jax.vmap(lambda c: _bits_tpu.pack(c, bits))
    unpacked = [_bits_tpu.unpack(p, bits, c.size) for p, c in zip(packed, all_codes, strict=True)]
    return packed, unpacked, jax.vmap(lambda p: _bits_tpu.unpack(p, bits, rows.shape[1]))(of_rows(rows))


def test_layout_is_least_significant_bit_first():
    (packed,), _ = both([jnp.array([0b001, 0b010, 0b011, 0b100], jnp.uint8)], 3)
    np.testing.assert_array_equal(packed, [0b11_010_001, 0b0000_100_0])


@pytest.mark.parametrize("bits", (2, 3))
def test_vmap(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 13)).astype(np.uint8)
    (packed,), (unpacked,) = jax.vmap(lambda c: both([c], bits))(jnp.asarray(codes))
    assert [list(row) for row in np.asarray(packed)] == [reference.pack(row, bits) for row in codes]
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes(bits):
    for d in range(34):
        assert _bits.packed_bytes(d, bits) == len(reference.pack([0] * d, bits))


@pytest.mark.parametrize("bits", range(1, 8))
def test_pack_by_products_of_matrices(bits):
    """As a TPU does it."""
    rng = np.random.default_rng(bits)
    all_codes = [rng.integers(0, 2**bits, d).astype(np.uint8) for d in (0, 1, 333, 128 * 8, 3001)]
    rows = rng.integers(0, 2**bits, (3, 200)).astype(np.uint8)
    *lists, of_rows = by_products([jnp.asarray(codes) for codes in all_codes], jnp.asarray(rows), bits)
    for codes, packed, unpacked in zip(all_codes, *lists, strict=True):
        assert list(np.asarray(packed)) == reference.pack(codes, bits) and packed.dtype == jnp.uint8
        np.testing.assert_array_equal(unpacked, codes, strict=True)
    np.testing.assert_array_equal(of_rows, rows, strict=True)


@jax.jit
def words_both_ways(masks):
    """What products make of the masks, and what it is to equal."""
    pairs = []
    for mask in masks:
        words = _bits_tpu.pack_words(mask)
        pairs.append((words, _bits._pack_words_by_sums(mask)))
        pairs.append((_bits_tpu.unpack_words(words, mask.size), mask))
        pairs.append((_bits_tpu.to_bytes(words), _bits._bitcast_to_bytes(words)))
        for missing in range(0, 8, 3):
            packed = _bits.as_bytes(words, max(0, mask.size - 8 * missing))
            pairs.append((_bits_tpu.to_words(packed), _bits._bitcast_to_words(packed)))
    return pairs


def test_words_by_products_of_matrices():
    rng = np.random.default_rng(0)
    for got, want in words_both_ways([jnp.asarray(rng.random(d) < 0.5) for d in (0, 5, 700, 128 * 32, 9001)]):
        np.testing.assert_array_equal(got, want, strict=True)


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

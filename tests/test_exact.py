"""`Exact`: integers and booleans beside features, bit for bit, in memory and as bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import compress, wire
from msjax.compress import Exact, straight_through
from msjax.compress._exact import EXACT_DTYPES

SHAPES = [(3, 5), (0,), (2, 0, 3), (8,), ()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [d for d in EXACT_DTYPES if "64" not in d])
def test_what_is_decoded_is_what_was_encoded(dtype, shape):
    codec, rng = compress.from_string("Exact"), np.random.default_rng(0)
    h = rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    payload = jax.jit(codec.encode)(jnp.asarray(h))
    jax.tree.map(np.testing.assert_array_equal, payload, codec.encode_numpy(h))
    like = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    size = -(-h.size // 8) if dtype == "bool" else h.nbytes
    assert codec.payload_bytes(like) == sum(leaf.nbytes for leaf in payload) == size
    assert [(p.shape, p.dtype) for p in codec.payload_like(like)] == [(p.shape, p.dtype) for p in payload]
    for compression in wire.COMPRESSIONS:
        message = wire.decode(wire.encode(payload, codec, like, compression=compression))
        assert (message.codec, message.like) == (codec, like)
        for found in (
            codec.decode(message.payload, like),
            codec.decode(payload, like),
            codec.roundtrip(jnp.asarray(h)),
        ):
            assert found.dtype == h.dtype and found.shape == shape
            np.testing.assert_array_equal(found, h)


def test_the_bytes_of_a_mask():
    """The first value is in the lowest bit."""
    (values,) = Exact().encode(jnp.array([True, False, False, True] + [False] * 4 + [True]))
    np.testing.assert_array_equal(values, np.uint8([0b1001, 1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_floats_are_refused(dtype):
    with pytest.raises(TypeError, match=f"h must be one of bool, int8, .* for Exact, got {dtype}"):
        Exact().encode(jnp.zeros(3, dtype))


def test_integers_that_jax_would_cut_off_are_refused(unchecked):
    h = np.array([2**40, 1])
    for call in (Exact().encode, Exact().roundtrip, lambda h: straight_through(Exact(), h)):
        with pytest.raises(TypeError, match="h must be int32 where jax_enable_x64 is off, got int64"):
            call(h)
    np.testing.assert_array_equal(Exact().encode_numpy(h)[0], h)


@pytest.mark.parametrize("codec", compress.CODECS, ids=lambda c: c.__name__)
def test_other_codecs_refuse_integers(codec):
    with pytest.raises(TypeError, match="h must be one of float32, bfloat16, float16, got int32"):
        codec().payload_like(jax.ShapeDtypeStruct((3,), jnp.int32))

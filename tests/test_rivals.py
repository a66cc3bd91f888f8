"""Others' codecs, `experiments.rivals`, against slow NumPy written from their sources; sizes, rates and claims."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rivals import C3SL, ProductQuantizer, SplitFC, TAHQuant
from msjax import compress, config, wire

from . import reference
from .helpers import case_id

KEY = jax.random.key(0)
SHAPE = (5, 4, 4, 6)
CODECS = (C3SL(2), ProductQuantizer(4, 8, groups=2), TAHQuant(tile=8), TAHQuant(3, 2, 0.5, 16), SplitFC(0.5, 1.5))
CODECS += (SplitFC(1.0, 2.0),)


@functools.partial(jax.jit, static_argnames="codec")
def program(h, key, *, codec):
    payload = codec.encode(h, key)
    return payload, codec.decode(payload, jax.ShapeDtypeStruct(h.shape, h.dtype)), codec.roundtrip(h, key)


def features(shape=SHAPE, *, signed=False, seed=0):
    h = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(h if signed else np.maximum(h, 0))


def error(codec, h, key=KEY):
    return float(jnp.sum((program(h, key, codec=codec)[2] - h) ** 2) / jnp.sum(h**2))


@pytest.mark.parametrize("codec", CODECS, ids=case_id)
def test_contract(codec):
    """Sizes are as from shapes alone and as sent; another program decodes what came over the wire to the same."""
    for h in (
        features(),
        features(signed=True).astype(jnp.bfloat16),
        jnp.zeros(SHAPE),
        features((1, 7)),
        features((0, 3)),
    ):
        payload, decoded, roundtrip = program(h, KEY, codec=codec)
        assert decoded.shape == roundtrip.shape == h.shape and decoded.dtype == roundtrip.dtype == h.dtype
        np.testing.assert_array_equal(decoded, roundtrip)
        leaves = [np.asarray(leaf) for leaf in payload]
        assert [(leaf.shape, leaf.dtype) for leaf in codec.payload_like(h)] == [(x.shape, x.dtype) for x in leaves]
        assert codec.payload_bytes(h) == sum(leaf.nbytes for leaf in leaves)
        if h.size and not np.any(h):
            assert not np.any(decoded)
        data = wire.encode(payload, codec, h, compression="huffman")
        received = wire.decode(data, expect=(codec, h)).payload
        np.testing.assert_allclose(codec.decode(received, h), decoded, rtol=1e-5, atol=1e-5)
    text = config.to_json(config.Config(codec=codec))["codec"]
    assert text.startswith("experiments.rivals.") and config.from_json(
        config.to_json(config.Config(codec=codec)), own_code=True
    ) == config.Config(codec=codec)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: C3SL(0), "group must be an integer in 1..1024, got 0"),
        (lambda: ProductQuantizer(clusters=3), "clusters must be one of 2, .*, got 3"),
        (lambda: TAHQuant(9), "high_bits must be an integer in 1..8, got 9"),
        (lambda: TAHQuant(high_share=1.5), r"high_share must be in \[0, 1\], got 1.5"),
        (lambda: SplitFC(keep=0), "keep must be above 0 and at most 1, got 0"),
        (lambda: SplitFC(bits=9), r"bits must be in \[0, 8\], got 9"),
        (lambda: SplitFC().encode(jnp.zeros(3)), "key must be a JAX random key for SplitFC, got None"),
        (lambda: C3SL().payload_bytes(jnp.float32(1)), "h must have a batch axis, got a scalar"),
    ],
)
def test_errors_name_argument_rule_and_value(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


def test_c3sl_is_circular_convolution_and_correlation():
    codec, h = C3SL(2, seed=3), features((3, 7), signed=True)
    keys = np.asarray(jax.random.normal(jax.random.key(3), (2, 7)), np.float64)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    rows = np.concatenate([np.asarray(h, np.float64), np.zeros((1, 7))])
    payload, decoded, _ = program(h, KEY, codec=codec)
    for group in range(2):
        total = np.zeros(7)
        for i, n in np.ndindex(2, 7):
            total[n] += sum(keys[i][m] * rows[2 * group + i][(n - m) % 7] for m in range(7))
        np.testing.assert_allclose(payload.values[group], total, atol=1e-5)
        for i in range(2 - group):
            back = [sum(keys[i][m] * total[(n + m) % 7] for m in range(7)) for n in range(7)]
            np.testing.assert_allclose(decoded[2 * group + i], back, atol=1e-5)


def test_c3sl_both_ways_is_the_derivative_of_the_whole():
    codec, h, weights = C3SL(2), features((4, 9)), features((4, 9), signed=True, seed=1)
    through = jax.grad(lambda h: jnp.sum(compress.straight_through(codec, h, None, codec) * weights))(h)
    np.testing.assert_allclose(through, jax.grad(lambda h: jnp.sum(codec.roundtrip(h) * weights))(h), atol=1e-5)


def test_product_quantizer_is_k_means():
    """Lloyd's steps by loops, on each of two groups; the codebook travels."""
    codec, h = ProductQuantizer(2, 4, groups=2, iterations=3), features((6, 8), signed=True)
    payload, decoded, _ = program(h, KEY, codec=codec)
    for group in range(2):
        points = np.asarray(h, np.float64).reshape(6, 2, 2, 2)[:, group].reshape(12, 2)
        means = points[[0, 3, 6, 9]]
        for _ in range(3):
            nearest = [min(range(4), key=lambda c: np.sum((p - means[c]) ** 2)) for p in points]
            mine = [[p for p, c in zip(points, nearest, strict=True) if c == k] for k in range(4)]
            means = np.array([np.mean(own, 0) if own else means[k] for k, own in enumerate(mine)])
        np.testing.assert_allclose(payload.codebook[group], means, atol=1e-5)
        expected = [means[min(range(4), key=lambda c: np.sum((p - means[c]) ** 2))] for p in points]
        np.testing.assert_allclose(decoded.reshape(6, 2, 4)[:, group], np.reshape(expected, (6, 4)), atol=1e-5)


def test_tah_quant_by_loops():
    codec = TAHQuant(3, 2, high_share=0.5, tile=4)
    x = np.array(features((2, 4, 8), signed=True))
    x[0, 1, 2] = 9  # an outlier, so that a tile is rotated
    payload, decoded, _ = program(jnp.asarray(x), KEY, codec=codec)
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    rotated = reference.unpack(payload.is_rotated, 1, 16)
    assert rotated[2] == 1 and sum(rotated) < 8
    for sample in range(2):
        shares = [[abs(v) / np.abs(token).sum() for v in token] for token in x[sample]]
        entropy = [-sum(p * math.log(p) for p in token) for token in shares]
        low = sorted(range(4), key=lambda t: entropy[t])[:2]
        for token, tile in np.ndindex(4, 2):
            values = x[sample, token, 4 * tile : 4 * tile + 4].astype(np.float64)
            first, second = np.sort(np.abs(values))[:-3:-1]
            at = int(np.argmax(np.abs(values)))
            assert rotated[8 * sample + 2 * token + tile] == (first >= 2 * second)
            if first >= 2 * second:
                values[[0, at]] = values[[at, 0]]
                values = hadamard @ values
            top = 2 ** (2 if token in low else 3) - 1
            zero = np.float64(jnp.bfloat16(values.min()))
            scale = np.float64(jnp.bfloat16((values.max() - zero) / top))
            back = zero + scale * np.clip(np.rint((values - zero) / scale), 0, top)
            if first >= 2 * second:
                back = hadamard @ back
                back[[0, at]] = back[[at, 0]]
            np.testing.assert_allclose(decoded[sample, token, 4 * tile : 4 * tile + 4], back, atol=1e-5)


def test_splitfc_quantizes_columns_by_their_range():
    codec, h = SplitFC(1.0, 1.5), features((6, 10), signed=True) * jnp.arange(10.0)
    payload, decoded, _ = program(h, KEY, codec=codec)
    x = np.asarray(h, np.float32)
    low, high = x.min(), x.max()
    unit = (high - low) / 255
    ends = [(math.floor((c.min() - low) / unit + 1e-4), math.ceil((c.max() - low) / unit - 1e-4)) for c in x.T]
    widths = [0] * 10
    for _ in range(15):  # a bit at a time to the largest step that is left
        best = max(range(10), key=lambda j: ((ends[j][1] - ends[j][0]) / 2 ** widths[j] * (widths[j] < 8), -j))
        widths[best] += 1
    assert min(widths) == 0 and max(widths) >= 2
    for j, (column, width) in enumerate(zip(x.T, widths, strict=True)):
        if width == 0:
            np.testing.assert_allclose(decoded[:, j], low + np.rint((column.mean() - low) / unit) * unit, atol=1e-3)
            continue
        start, stop = (low + end * unit for end in ends[j])
        step = (stop - start) / (2**width - 1)
        np.testing.assert_allclose(decoded[:, j], start + np.rint((column - start) / step) * step, atol=1e-3)
    assert payload.ends.shape == (10, 2) and payload.kept.size == 0


def test_splitfc_drops_columns_without_bias():
    """With all of its 8 bits the quantization hardly counts: what is left is the dropping, by deviation."""
    codec, h = SplitFC(0.25, 8.0), features((8, 24)) * jnp.linspace(0.2, 1, 24)
    keys = jax.random.split(jax.random.key(5), 4000)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: codec.roundtrip(h, key)))(keys), np.float64)
    kept = (draws != 0).any(1)
    assert (kept.sum(1) == 6).all()
    share, deviation = kept.mean(0), np.asarray(h).std(0)
    np.testing.assert_allclose(share, deviation / deviation.sum() * 6, atol=0.03)
    spread = np.asarray(h) * np.sqrt(np.maximum(1 / share - 1, 0)) / np.sqrt(len(keys))
    assert (np.abs(draws.mean(0) - h) <= 5 * spread + 0.02 * np.abs(np.asarray(h).max())).all()
    assert codec.at_inference() == SplitFC(1.0, 8.0) and not codec.at_inference().needs_key


@pytest.mark.parametrize(
    "rates",
    [
        [C3SL(8), C3SL(4), C3SL(2)],
        [ProductQuantizer(4, clusters) for clusters in (2, 8, 64)],
        [TAHQuant(bits, bits - 1, tile=16) for bits in (2, 3, 4)],
        [SplitFC(1.0, bits) for bits in (0.5, 1.0, 2.0, 4.0)],
        [SplitFC(keep, 4.0) for keep in (0.25, 0.5, 0.75)],
    ],
    ids=lambda rates: f"{type(rates[0]).__name__}{len(rates)}",
)
def test_more_bytes_less_error(rates):
    h = features((8, 4, 4, 8))
    errors, sizes = [error(codec, h) for codec in rates], [codec.payload_bytes(h) for codec in rates]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    assert errors == sorted(errors, reverse=True)


def test_the_report_of_the_untrained_frontier():
    from experiments import frontier_untrained as frontier

    assert len({str(codec) for codec in frontier.CODECS}) == len(frontier.CODECS)
    rows = [
        {"block": block, "images": 2000, "codec": str(codec), "bits": 2.0, "error": 0.1, "top1_percent": 50.0 + i}
        for block in ("stage1_block3", "stage2_block3")
        for i, codec in enumerate(frontier.CODECS)
    ]
    text = frontier.table(json.loads(json.dumps(rows)))
    assert "The first 2,000 test images." in text and "| `SplitFC(keep=1.0, bits=0.5)` | 2.00 | 0.1 |" in text
    assert len(frontier.plot(rows).axes) == 2

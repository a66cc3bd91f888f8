"""Augmentation and normalisation on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, config, data
from msjax.split.spec import Preprocess

from .setups import dataset

augment = jax.jit(data.augment, static_argnames="kind")


def crop_flip_reference(images, offsets, flips, padding):
    out = np.zeros_like(images)
    b, h, w, _ = images.shape
    for i in range(b):
        for r in range(h):
            for c in range(w):
                rr, cc = r + offsets[i, 0] - padding, (w - 1 - c if flips[i] else c) + offsets[i, 1] - padding
                if 0 <= rr < h and 0 <= cc < w:
                    out[i, r, c] = images[i, rr, cc]
    return out


@pytest.mark.parametrize("shape, padding", [((7, 9, 3), 4), ((8, 8, 1), 2), ((5, 5, 3), 0)])
def test_crop_flip_equals_reference(shape, padding):
    rng = np.random.default_rng(0)
    grid = [(r, c, f) for r in range(2 * padding + 1) for c in range(2 * padding + 1) for f in (False, True)]
    offsets, flips = np.array([g[:2] for g in grid], np.int32), np.array([g[2] for g in grid])
    images = rng.integers(1, 256, (len(grid), *shape), dtype=np.uint8)
    want = crop_flip_reference(images, offsets, flips, padding)
    got = data.crop_flip(jnp.asarray(images), offsets, flips, padding=padding)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, want)


def test_augment_uses_every_offset_and_flip():
    # Pixels number their own place, so that offset and flip can be read off the result.
    h = w = 12
    base = np.zeros((h, w, 2), np.uint8)
    base[..., 0], base[..., 1] = np.arange(1, h + 1)[:, None], np.arange(1, w + 1)
    images = jnp.asarray(np.broadcast_to(base, (4000, h, w, 2)))
    out = np.asarray(augment(images, jax.random.key(0), kind="crop_flip")).astype(int)
    middle = out[:, 6, 5:7]  # never padding
    flips = middle[:, 1, 1] < middle[:, 0, 1]
    offsets = np.stack([middle[:, 0, 0] - 7, np.where(flips, middle[:, 1, 1], middle[:, 0, 1]) - 6], 1) + 4
    seen, counts = np.unique(np.c_[offsets, flips], axis=0, return_counts=True)
    assert len(seen) == 9 * 9 * 2 and counts.min() >= 5 and counts.max() <= 60
    assert seen[:, :2].min() == 0 and seen[:, :2].max() == 8
    np.testing.assert_array_equal(out[:50], crop_flip_reference(np.asarray(images[:50]), offsets[:50], flips[:50], 4))
    np.testing.assert_array_equal(augment(images, jax.random.key(0), kind="crop_flip"), out)


def test_augment_kinds():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3), dtype=np.uint8))
    assert data.augment(images, kind="none") is images
    flipped = np.asarray(augment(images, jax.random.key(1), kind="flip"))
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(flipped, np.asarray(images), strict=True)]
    kept = [(a == b).all() for a, b in zip(flipped, np.asarray(images), strict=True)]
    assert all(m or k for m, k in zip(mirrored, kept, strict=True)) and 10 < sum(mirrored) < 54
    with pytest.raises(ValueError, match="kind must be one of crop_flip, flip, none, got 'crop'"):
        data.augment(images, jax.random.key(0), kind="crop")
    with pytest.raises(ValueError, match="needs a key"):
        data.augment(images, kind="flip")
    assert augment(images[:0], jax.random.key(0), kind="crop_flip").shape == (0, 6, 5, 3)
    assert [data.default_augmentation(n) for n in ("digits", "mnist", "cifar10")] == ["none", "none", "crop_flip"]


def test_augment_under_vmap_and_scan():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 6, 6, 3), dtype=np.uint8))
    keys = jax.random.split(jax.random.key(2), 3)
    one = [data.augment(x, k, kind="crop_flip") for x, k in zip(images, keys, strict=True)]  # outside jit
    mapped = jax.jit(jax.vmap(lambda x, k: data.augment(x, k, kind="crop_flip")))(images, keys)
    _, scanned = jax.lax.scan(lambda c, xk: (c, data.augment(xk[0], xk[1], kind="crop_flip")), 0, (images, keys))
    np.testing.assert_array_equal(mapped, jnp.stack(one))
    np.testing.assert_array_equal(scanned, jnp.stack(one))


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_normalize(dtype, bound):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8))
    mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2023, 0.1994, 0.2010])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        x = data.normalize(images, mean, std, dtype)
    assert x.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(x, np.float64), (np.asarray(images) / 255 - mean) / std, rtol=bound, atol=bound
    )


def test_numbers_far_from_zero_keep_their_digits():
    """As those of a sensor in Pa: float32 has them to 0.06."""
    x = np.float32(1e6) + np.random.default_rng(0).normal(size=(100, 5, 2)).astype(np.float32)
    mean, std = x.mean((0, 1), np.float64), x.std((0, 1), dtype=np.float64)
    found = np.asarray(data.normalize(x, np.float32(mean), np.float32(std), maximum=1), np.float64)
    np.testing.assert_allclose(found, (x - np.float32(mean).astype(np.float64)) / std, atol=1e-5)


def test_pixels_are_divided_by_a_declared_range():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1))
    expected = data.normalize(jnp.asarray(pixels, jnp.uint8), [0.5], [0.25])
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int16):
        x = jnp.asarray(pixels, dtype)
        np.testing.assert_array_equal(data.normalize(x, [0.5], [0.25], maximum=255), expected)
        with pytest.raises(
            ValueError, match=rf"maximum must be given for .*got {x.dtype} \(2, 4, 4, 1\) without: 255 "
        ):
            data.normalize(x, [0.5], [0.25])
    with pytest.raises(ValueError, match="maximum must be given for"):
        data.normalize(jnp.ones((2, 1), jnp.uint16), [0.5], [0.25])
    floats = jnp.asarray(pixels / 255, jnp.float32)
    np.testing.assert_allclose(data.normalize(floats, [0.5], [0.25], maximum=1), expected, atol=1e-5)
    deep = jnp.asarray(pixels * 257, jnp.uint16)
    np.testing.assert_allclose(data.normalize(deep, [0.5], [0.25], maximum=65535), expected, atol=1e-5)
    wide = jnp.asarray(pixels)  # int64 of NumPy
    np.testing.assert_array_equal(data.normalize(wide, [0.5], [0.25], maximum=255), expected)
    with pytest.raises(ValueError, match=r"got one of tokens \(int32; images of int32 need maximum=255\)"):
        data.normalize(wide, [0.5], [0.25])
    for maximum in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"maximum must be positive and finite, got {maximum}"):
            data.normalize(floats, [0.5], [0.25], maximum=maximum)
    np.testing.assert_array_equal(data.normalize(jnp.full((2, 1), 3.0), [1.0], [2.0]), [[1], [1]])  # a table


def test_a_run_knows_what_its_pixels_are_divided_by():
    ds = dataset()
    summary = build.DataSummary.of(ds)
    assert build.make_preprocess(config.Config(), summary).maximum == 255
    images = jnp.asarray(ds.train_inputs[:3])
    to_floats = Preprocess(lambda x, key: x.astype(jnp.float32), summary.mean, summary.std, maximum=255.0)
    with pytest.raises(
        ValueError, match=r"augment must return inputs of the dtype that it is given, uint8, got float32"
    ):
        to_floats.augmented(images, jnp.zeros(3), jax.random.key(0))
    brighter = Preprocess(lambda x, key: x + jnp.uint8(1), summary.mean, summary.std, maximum=255.0)
    found, labels = brighter.augmented(images, jnp.arange(3), jax.random.key(0))
    np.testing.assert_array_equal(found, brighter(images + jnp.uint8(1)))
    np.testing.assert_array_equal(labels, jnp.arange(3))
    floats = np.random.default_rng(0).normal(size=(20, 4, 4, 1)).astype(np.float32)
    measured = build.DataSummary.of(data.from_arrays((floats, np.arange(20) % 2), normalize=True))
    x = build.make_preprocess(config.Config(), measured)(jnp.asarray(floats))
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-6)
    old = {"input_shape": [8, 8, 1], "num_classes": 10, "mean": [0.5], "std": [0.25]}  # of parts of the first version
    assert build.make_preprocess(config.Config(), build.DataSummary.from_json(old)).maximum == 255

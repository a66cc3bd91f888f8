"""Splits that do not fit in memory, and batches of either kind."""

import dataclasses
import io
import threading

import jax
import numpy as np
import pytest

from msjax import data
from msjax.data import _images, _registry, _tfds
from msjax.data._records import Images

from .data_helpers import Image, Records, collect


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """`stream` over 48 images larger than the crop, of several sizes."""
    folder = tmp_path / "tfds" / "photos" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").touch()
    (folder / "photos-train.array_record-00000-of-00001").touch()
    records = Records(24, (50, 70, 3), 4, encoding="jpeg")
    more = Records(24, (64, 40, 3), 4, seed=1, encoding="jpeg")
    records.encoded += more.encoded
    records.labels = np.arange(48) % 4
    monkeypatch.setattr(
        _tfds, "open_split", lambda *a: _tfds.Records(records, Images("image", (None, None, 3)), "label", 4)
    )
    return {"data_dir": tmp_path / "tfds", "cache_dir": tmp_path / "cache", "image_size": 32}


def test_stream_is_deterministic_and_resumable(photos):
    source = data.stream("photos", **photos)
    assert len(source) == 48 and source.input_shape == (32, 32, 3) and source.num_classes == 4
    indices = np.random.default_rng(0).permutation(48)[:40].reshape(2, 2, 10)
    one = collect(source, indices, seed=1, epoch=2, threads=1, prefetch=0)
    assert [x.shape for x, _ in one] == [(2, 10, 32, 32, 3)] * 2 and one[0][0].dtype == np.uint8
    np.testing.assert_array_equal(one[1][1], indices[1] % 4)
    assert one[0][1].dtype == np.int32
    for options in ({"threads": 7, "prefetch": 3}, {"threads": 2}, {}):
        for (x, y), (xx, yy) in zip(one, collect(source, indices, seed=1, epoch=2, **options), strict=True):
            np.testing.assert_array_equal(x, xx)
            np.testing.assert_array_equal(y, yy)
    (resumed,) = collect(source, indices, seed=1, epoch=2, start=1)
    np.testing.assert_array_equal(resumed[0], one[1][0])
    # a host that reads only its own client gets the crops it would have had
    np.testing.assert_array_equal(collect(source, indices[:, 1:], seed=1, epoch=2)[0][0], one[0][0][1:])
    assert (collect(source, indices, seed=1, epoch=3)[0][0] != one[0][0]).any()
    assert collect(source, indices, start=2) == []


def test_stream_for_test_crops_the_middle(photos):
    source = data.stream("photos", "test", **photos)
    ((x, _),) = collect(source, np.array([[0, 30]]))
    ((xx, _),) = collect(source, np.array([[0, 30]]), seed=9)
    np.testing.assert_array_equal(x, xx)
    image = Image.open(io.BytesIO(source._source.records.encoded[0])).resize((51, 37), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(x[0], np.asarray(image)[2:34, 10:42])


def test_stream_labels_are_kept(photos, monkeypatch):
    source = data.stream("photos", **photos)
    np.testing.assert_array_equal(source.labels(), np.arange(48) % 4)
    monkeypatch.setattr(_tfds, "read", None)
    np.testing.assert_array_equal(data.stream("photos", **photos).labels(), np.arange(48) % 4)


def test_inputs_of_many_sizes_need_image_size_or_a_stream(photos):
    with pytest.raises(data.DataError, match=r"differ in size: give image_size.*data.stream"):
        data.load("photos", **(photos | {"image_size": None}))
    assert data.load("photos", **photos).train_inputs.shape == (48, 32, 32, 3)


def test_stream_errors(photos):
    source = data.stream("photos", **photos)
    source._source.records.encoded[3] = b"no image"
    with pytest.raises(data.DataError, match=r"image 3 of photos .*cannot be decoded"):
        collect(source, np.arange(20).reshape(2, 10))
    with pytest.raises(IndexError, match=r"indices must be in 0..47, got -1..0"):
        data.batches(source, np.array([[0, -1]]))
    with pytest.raises(ValueError, match=r"start must be in 0..1 .*got 2"):
        data.batches(source, np.array([[0]]), start=2)
    with pytest.raises(ValueError, match="indices must be integers"):
        data.batches(source, np.arange(3))
    with pytest.raises(ValueError, match='split must be "train" or "test"'):
        data.stream("photos", "validation", **photos)
    with pytest.raises(ValueError, match="crop must be one of random, middle, whole, got 'left'"):
        data.stream("photos", crop="left", **photos)
    with pytest.raises(data.DataError, match="streamed must be None or False for digits"):
        data.load("digits", streamed=True)


def test_leaving_a_stream_early_stops_its_threads(photos):
    source, before = data.stream("photos", **photos), set(threading.enumerate())
    loop = data.batches(source, np.zeros((1000, 4), int), threads=2)
    next(loop)
    started = set(threading.enumerate()) - before
    assert started
    loop.close()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()


def test_batches_of_arrays():
    ds = data.load()
    indices = data.epoch_indices(data.partition(1437, 3), 12, seed=0, epoch=0).reshape(3, 4, 3).swapaxes(0, 1)
    got = collect((ds.train_inputs, ds.train_labels), indices, start=1)
    assert len(got) == 3
    np.testing.assert_array_equal(got[0][0], ds.train_inputs[indices[1]])
    np.testing.assert_array_equal(got[0][1], ds.train_labels[indices[1]])


def test_random_resized_crop_covers_sizes_and_places():
    gradient = np.zeros((40, 60, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(40)[:, None] * 6, np.arange(60) * 4
    image = Image.fromarray(gradient)
    crops = np.stack(
        [np.asarray(_images.random_resized_crop(image, 16, np.random.default_rng(i))) for i in range(300)]
    ).astype(float)
    heights = (crops[:, -1, 8, 0] - crops[:, 0, 8, 0]) / 6
    widths = (crops[:, 8, -1, 1] - crops[:, 8, 0, 1]) / 4
    assert heights.min() < 15 and heights.max() > 30 and widths.max() > 35
    assert crops[:, 0, 8, 0].min() < 6 and crops[:, 0, 8, 0].max() > 100
    extreme = Image.fromarray(np.zeros((4, 400, 3), np.uint8))  # no permitted ratio fits: the fallback
    assert np.asarray(_images.random_resized_crop(extreme, 16, np.random.default_rng(0))).shape == (16, 16, 3)


def test_what_is_streamed_by_wish_is_as_in_memory(photos, monkeypatch):
    ds, loaded = data.load("photos", streamed=True, **photos), data.load("photos", **photos)
    for name in ("train", "test"):
        images, labels = getattr(ds, name).fetch(np.arange(48))
        np.testing.assert_array_equal(images, getattr(loaded, f"{name}_inputs"))
        np.testing.assert_array_equal(labels, getattr(loaded, f"{name}_labels"))
    np.testing.assert_array_equal((ds.mean, ds.std), (loaded.mean, loaded.std))
    assert (ds.augment, ds.classes, ds.num_classes) == (loaded.augment, loaded.classes, loaded.num_classes)
    monkeypatch.setattr(_tfds, "read", None)  # what was measured is kept
    np.testing.assert_array_equal(data.load("photos", streamed=True, **photos).mean, loaded.mean)


def test_a_set_without_test_data_is_shared_out_as_in_memory(photos, monkeypatch):
    opened = _tfds.open_split

    def open_split(name, folder, split):
        if split == "test":
            raise _tfds.NoSplit("none")
        return opened(name, folder, split)

    monkeypatch.setattr(_tfds, "open_split", open_split)
    ds, loaded = data.load("photos", streamed=True, **photos), data.load("photos", **photos)
    assert (len(ds.train), len(ds.test)) == (len(loaded.train), len(loaded.test)) == (38, 10)
    np.testing.assert_array_equal(ds.test.fetch(np.arange(10))[0], loaded.test_inputs)
    np.testing.assert_array_equal(ds.train.labels(), loaded.train_labels)
    np.testing.assert_array_equal((ds.mean, ds.std), (loaded.mean, loaded.std))


def test_a_share_of_a_stream_keeps_its_crops(photos):
    source, share = data.stream("photos", **photos), np.array([3, 40, 17])
    images, labels = source.only(share).fetch(np.array([1, 2]), (5, 6))
    np.testing.assert_array_equal(images, source.fetch(share[1:], (5, 6))[0])
    np.testing.assert_array_equal(labels, source.only(share).labels()[1:])


def test_load_streams_what_is_too_large_or_asked_for(photos, monkeypatch):
    ds = data.load("photos", streamed=True, **photos)
    assert isinstance(ds.train, data.ImageStream) and not ds.train.random_crop
    assert isinstance(ds.train, data.Split) and not ds.in_memory and ds.num_classes == 4 and len(ds.test) == 48
    assert ds.input_like == jax.ShapeDtypeStruct((32, 32, 3), np.uint8)
    assert ds.label_like == jax.ShapeDtypeStruct((), np.int32)
    with pytest.raises(data.DataError, match="the train split of photos is not in memory"):
        _ = ds.train_labels
    large = dataclasses.replace(_registry.find("imagenet2012"), augment="flip")
    monkeypatch.setattr(_registry, "ENTRIES", {**_registry.ENTRIES, "photos": large})
    assert data.is_streamed("photos") and not data.is_streamed("digits")
    place = {name: photos[name] for name in ("data_dir", "cache_dir")}
    ds = data.load("photos", **place)
    assert ds.input_like.shape == (224, 224, 3) and ds.augment == "flip"
    assert ds.train.random_crop and not ds.test.random_crop
    np.testing.assert_array_equal(ds.mean, ds.train.mean)
    assert data.load("photos", streamed=False, **photos).train_inputs.shape == (48, 32, 32, 3)


def test_batches_of_a_split_in_memory():
    split = data.Arrays({"x": np.arange(6)}, np.arange(6) * 2)
    ((x, y),) = data.batches(split, np.array([[[5, 1], [0, 3]]]))
    np.testing.assert_array_equal(x["x"], [[5, 1], [0, 3]])
    np.testing.assert_array_equal(y, [[10, 2], [0, 6]])
    with pytest.raises(IndexError, match=r"indices must be in 0..5, got 0..6"):
        data.batches(split, np.array([[0, 6]]))

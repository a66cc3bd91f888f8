"""Folders of images as data sets."""

import numpy as np
import pytest

from msjax import data

from .data_helpers import Image


@pytest.fixture
def animals(tmp_path):
    """`animals/cat` and `animals/dog`: 10 grey PNG images of several sizes each, and a file that is none."""
    rng = np.random.default_rng(0)
    for name in ("dog", "cat"):
        folder = tmp_path / "animals" / name / "deep"
        folder.mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (8 + i, 12), dtype=np.uint8)).save(folder / f"{i}.PNG")
        (folder / "notes.txt").touch()
        (folder / "._0.png").touch()
    return tmp_path / "animals"


def test_classes_and_share(animals):
    ds = data.from_image_folder(animals, image_size=8)
    assert ds.num_classes == 2 and (len(ds.train), len(ds.test)) == (16, 4)
    assert ds.input_like.shape == (8, 8, 1) and ds.input_like.dtype == np.uint8 and ds.mean.shape == (1,)
    assert np.bincount(ds.test_labels).tolist() == [2, 2]
    whole = data.from_image_folder(animals, image_size=8, test_share=None)
    assert whole.train_labels.tolist() == [0] * 10 + [1] * 10  # cat, dog
    first = np.asarray(Image.open(animals / "cat" / "deep" / "0.PNG"))
    np.testing.assert_array_equal(whole.train_inputs[0, ..., 0], first[:, 2:10])
    assert data.from_image_folder(animals, image_size=8, channels=3).input_like.shape == (8, 8, 3)


def test_train_and_test_folders(animals):
    (animals / "train").mkdir()
    for name in ("cat", "dog"):
        (animals / name).rename(animals / "train" / name)
    assert len(data.from_image_folder(animals, image_size=8).test) == 4
    (animals / "val" / "dog").mkdir(parents=True)
    for i in (3, 4):
        (animals / "train" / "dog" / "deep" / f"{i}.PNG").rename(animals / "val" / "dog" / f"{i}.PNG")
    ds = data.from_image_folder(animals, image_size=8)
    assert ds.num_classes == 2 and len(ds.train) == 18 and ds.test_labels.tolist() == [1, 1]
    (animals / "val" / "dog").rename(animals / "val" / "cow")
    with pytest.raises(data.DataError, match=r"val must have classes that there are to train on \(cat, dog\), got cow"):
        data.from_image_folder(animals, image_size=8)


def test_images_are_turned_and_flattened(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 200  # the stored first row is the last column when seen: orientation 6 turns clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png", exif=exif)
    rgba = np.full((4, 4, 4), 100, np.uint8)
    rgba[:2, :, 3], rgba[2:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a" / "1.png")
    Image.fromarray(np.full((4, 4), 0x1234, np.uint16)).save(tmp_path / "a" / "2.png")
    ds = data.from_image_folder(tmp_path, image_size=None, test_share=None)
    turned, flat, deep = ds.train_inputs
    assert (turned[:, 3] == 200).all() and (turned[:, :3] == 0).all()
    assert (flat[:2] == 0).all() and (flat[2:] == 100).all()  # transparent pixels are black
    assert (deep == 0x12).all()


def test_streamed(animals):
    whole = data.from_image_folder(animals, image_size=8)
    ds = data.from_image_folder(animals, image_size=8, in_memory=False)
    assert not ds.train.in_memory and ds.num_classes == 2
    np.testing.assert_array_equal(ds.mean, whole.mean)
    np.testing.assert_array_equal(ds.test.labels(), whole.test_labels)
    ((x, y),) = data.batches(ds.train, np.arange(16).reshape(1, 4, 4))
    np.testing.assert_array_equal(x.reshape(16, 8, 8, 1), whole.train_inputs)
    np.testing.assert_array_equal(y.reshape(16), whole.train_labels)


def test_errors(animals, tmp_path):
    with pytest.raises(
        data.DataError, match=r"images must have one size where image_size is None: .*PNG has \(12, 9\)"
    ):
        data.from_image_folder(animals, image_size=None)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        data.from_image_folder(animals, image_size=0)
    with pytest.raises(data.DataError, match="channels must be 1 or 3, got 4"):
        data.from_image_folder(animals, image_size=8, channels=4)
    with pytest.raises(data.DataError, match="nowhere must be a folder of images"):
        data.from_image_folder(tmp_path / "nowhere", image_size=8)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(data.DataError, match="empty must hold a folder of images for each class"):
        data.from_image_folder(tmp_path / "empty", image_size=8)
    file = animals / "dog" / "deep" / "3.PNG"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(data.DataError, match=r"image .*dog.deep.3.PNG cannot be decoded"):
        data.from_image_folder(animals, image_size=8)
    file.write_bytes(b"no image")
    with pytest.raises(data.DataError, match=r"image .*3.PNG cannot be opened"):
        data.from_image_folder(animals, image_size=8)

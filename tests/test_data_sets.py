"""Data sets by name: embedded ones, and the array cache. Needs neither network nor prepared data."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from msjax import data
from msjax.data import _cache, _embedded, _registry, _tfds

from .data_helpers import forbid, prepare_tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return prepare_tiny(tmp_path, monkeypatch)


def test_digits():
    ds = data.load()
    assert ds.name == "digits" and ds.num_classes == 10
    assert ds.train_inputs.shape == (1437, 8, 8, 1) and ds.test_inputs.shape == (360, 8, 8, 1)
    assert ds.train_inputs.dtype == np.uint8 and ds.train_inputs.max() == 255
    assert ds.train_labels.dtype == ds.test_labels.dtype == np.int32
    assert (np.bincount(ds.test_labels) == 36).all()
    pixels = ds.train_inputs / 255
    np.testing.assert_allclose(ds.mean, [pixels.mean()], rtol=1e-6)
    np.testing.assert_allclose(ds.std, [pixels.std()], rtol=1e-6)
    assert ds.mean.dtype == ds.std.dtype == np.float32
    assert (data.as_dataset("digits").test_inputs == ds.test_inputs).all()
    assert data.load("digits", image_size=16).train_inputs.shape == (1437, 16, 16, 1)


@pytest.mark.slow
def test_embedded_sets_are_those_of_scikit_learn():
    from sklearn import datasets

    theirs, ours = datasets.load_digits(), _embedded.arrays("digits")
    np.testing.assert_array_equal(ours["images"], theirs.images)
    np.testing.assert_array_equal(ours["labels"], theirs.target)
    theirs, ours = datasets.load_breast_cancer(), _embedded.arrays("breast_cancer")
    np.testing.assert_array_equal(ours["columns"], theirs.data.astype(np.float32))
    np.testing.assert_array_equal(ours["labels"], theirs.target)


def test_cache_round_trip(tiny):
    directory, splits = tiny
    ds = data.load("tiny", data_dir=directory)
    np.testing.assert_array_equal(ds.train_inputs, splits["train"].images)
    np.testing.assert_array_equal(ds.test_labels, splits["test"].labels)
    pixels = splits["train"].images / 255
    np.testing.assert_allclose(ds.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(ds.std, pixels.std((0, 1, 2)), rtol=1e-5)
    assert isinstance(ds.train_inputs, np.memmap)
    assert jnp.asarray(ds.train_inputs).shape == (40, 12, 10, 3)
    assert not list((directory.parent / "cache").glob(".*"))  # nothing half-written stays


def test_cache_hit_needs_neither_tfds_nor_the_directory(tiny, monkeypatch):
    directory, splits = tiny
    data.load("tiny", data_dir=directory)

    def fail(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(_tfds, "open_split", fail)
    forbid(monkeypatch, "tensorflow_datasets")
    np.testing.assert_array_equal(data.load("tiny", data_dir=directory).train_inputs, splits["train"].images)
    shutil.rmtree(directory)
    np.testing.assert_array_equal(data.load("tiny", data_dir=directory).train_inputs, splits["train"].images)
    with pytest.raises(data.DataError, match=r"made from .*tfds: give that data_dir"):
        data.load("tiny", data_dir=directory / "elsewhere")


def test_image_size_is_a_cache_key(tiny):
    directory, _ = tiny
    assert data.load("tiny", data_dir=directory, image_size=6).train_inputs.shape == (40, 6, 6, 3)
    assert data.load("tiny", data_dir=directory).train_inputs.shape == (40, 12, 10, 3)
    assert len(list((directory.parent / "cache").iterdir())) == 2
    with pytest.raises(ValueError, match="image_size must be an integer of at least 1, got 0"):
        data.load("tiny", data_dir=directory, image_size=0)


def flip_a_byte(entry):
    path = entry / "train_inputs.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def old_format(entry):
    meta = json.loads((entry / "meta.json").read_text())
    (entry / "meta.json").write_text(json.dumps(meta | {"format": 0}))


DAMAGE = {
    "flipped bit": flip_a_byte,
    "cut short": lambda e: (e / "test_inputs.npy").write_bytes((e / "test_inputs.npy").read_bytes()[:-5]),
    "file missing": lambda e: (e / "train_labels.npy").unlink(),
    "no metadata": lambda e: (e / "meta.json").unlink(),
    "half metadata": lambda e: (e / "meta.json").write_text('{"format": 2, "arr'),
    "not metadata": lambda e: (e / "meta.json").write_text("[]"),
    "old format": old_format,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_rebuilt_or_reported(tiny, monkeypatch, damage):
    directory, splits = tiny
    data.load("tiny", data_dir=directory)
    (entry,) = (directory.parent / "cache").iterdir()
    DAMAGE[damage](entry)
    np.testing.assert_array_equal(data.load("tiny", data_dir=directory).train_inputs, splits["train"].images)
    DAMAGE[damage](entry)
    shutil.rmtree(directory)
    with pytest.raises(data.DataError, match=r"does not exist.*The array cache .* cannot be used"):
        data.load("tiny", data_dir=directory)


def test_cache_follows_the_prepared_set(tiny):
    directory, splits = tiny
    data.load("tiny", data_dir=directory)
    splits["train"].encoded.reverse()
    (directory / "tiny" / "1.0.0" / "dataset_info.json").write_text(json.dumps({"name": "tiny", "new": 1}))
    np.testing.assert_array_equal(data.load("tiny", data_dir=directory).train_inputs, splits["train"].images[::-1])


def test_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), _cache.writing(tmp_path / "cache" / "entry") as draft:
        draft.array("x", (3,), np.int32)[:] = 1
        raise KeyboardInterrupt
    assert not list((tmp_path / "cache").iterdir())
    assert _cache.read(tmp_path / "cache" / "entry") is None


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("MSJAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _cache.directory(None) == tmp_path / "xdg" / "msjax"
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "own"))
    assert _cache.directory(None) == tmp_path / "own"
    assert _cache.directory(tmp_path / "asked") == tmp_path / "asked"


def test_unwritable_cache(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match=r"cannot write the array cache.*cache_dir"):
        data.load("tiny", data_dir=tiny[0], cache_dir=tmp_path / "file" / "cache")


def test_the_registry_is_whole():
    for name, entry in _registry.ENTRIES.items():
        assert (entry.mean is None) == (entry.std is None) and entry.augment in data.AUGMENTATIONS, name
        assert bool(entry.sources) == (entry.file_format is not None), name
        assert len(entry.sources) == {"cifar": 1, "idx": 4, None: 0}[entry.file_format], name
        assert all(len(digest) == 64 for _, digest in entry.sources), name
    with pytest.raises(TypeError):
        _registry.ENTRIES["digits"] = None
    assert _registry.find("never heard of") == _registry.Entry()

"""Where sets come from: directories, downloads from files, real TFDS files, and what is said where there is nothing."""

import dataclasses
import errno
import gzip
import hashlib
import io
import os
import tarfile

import numpy as np
import pytest

from msjax import data
from msjax.data import _official, _registry, _tfds

from .data_helpers import Records, forbid, png, prepare_tiny


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, no default TFDS directory, an empty cache."""

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "default").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_no_network(offline, name):
    with pytest.raises(data.DataError, match=rf"looked for {name} in .*default.*cannot be downloaded.*data_dir"):
        data.load(name)


def test_imagenet_says_how_to_get_it(offline):
    for opening in (data.load, data.stream):
        with pytest.raises(data.DataError, match=r"ILSVRC2012_img_train.tar.*--file_format=array_record"):
            opening("imagenet2012")


def test_tfds_not_installed(offline, monkeypatch):
    forbid(monkeypatch, "tensorflow_datasets")
    with pytest.raises(data.DataError, match=r"looked for svhn_cropped in .*pip install 'msjax\[data\]'"):
        data.load("svhn_cropped")


def test_pillow_not_installed(tmp_path, monkeypatch):
    directory, _ = prepare_tiny(tmp_path, monkeypatch)
    forbid(monkeypatch, "PIL")
    with pytest.raises(data.DataError, match=r"needs pillow.*pip install 'msjax\[data\]'"):
        data.load("tiny", data_dir=directory)


def flipped(encoded, at):
    return encoded[:at] + bytes([encoded[at] ^ 1]) + encoded[at + 1 :]


BAD_IMAGES = {
    "cut short": lambda encoded: encoded[:-40],
    "cut in its head": lambda encoded: encoded[:20],
    "empty": lambda encoded: b"",
    "HTML": lambda encoded: b"<!DOCTYPE html><title>404</title>",
    "SVG": lambda encoded: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pixels changed": lambda encoded: flipped(encoded, encoded.index(b"IDAT") + 30),
    "wrong CRC": lambda encoded: flipped(encoded, encoded.index(b"IDAT") - 5),
    "none": lambda encoded: None,
    "bomb": lambda encoded: png(np.zeros((40, 40, 3), np.uint8)),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_a_bad_image_is_named(tmp_path, monkeypatch, what):
    directory, splits = prepare_tiny(tmp_path, monkeypatch)
    encoded = splits["train"].encoded
    encoded[3] = BAD_IMAGES[what](encoded[3])
    if what == "bomb":
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 700)  # an error is raised for more than twice as many
    with pytest.raises(data.DataError, match=r"^image 3 of tiny \(train\) cannot be decoded: ") as caught:
        data.load("tiny", data_dir=directory)
    assert "cache" not in str(caught.value) and "0x" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())
    stream = data.stream("tiny", data_dir=directory, image_size=8)
    with pytest.raises(data.DataError, match=r"^image 3 of tiny \(train\) cannot be decoded: "):
        next(data.batches(stream, np.arange(8).reshape(1, 8)))


def test_only_the_cache_is_told_to_be_unwritable(tmp_path, monkeypatch):
    directory, splits = prepare_tiny(tmp_path, monkeypatch)

    def unreadable(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(splits["train"].__class__, "__getitems__", unreadable)
        with pytest.raises(data.DataError, match="TFDS cannot read examples of tiny"):
            data.load("tiny", data_dir=directory)
    for number, advice in (
        (errno.ENOSPC, "free some space there, or name another cache_dir"),
        (errno.EROFS, "name an"),
    ):

        def full(*args, number=number):
            raise OSError(number, "no")

        with monkeypatch.context() as broken:
            broken.setattr(os, "posix_fallocate", full)
            with pytest.raises(data.DataError, match=rf"cannot write the array cache .*tiny.*: {advice}"):
                data.load("tiny", data_dir=directory)
    assert not list((tmp_path / "cache").iterdir())


def test_wrong_directories(offline, tmp_path):
    with pytest.raises(data.DataError, match=r"nowhere does not exist.*data_dir"):
        data.load("cifar10", data_dir=tmp_path / "nowhere")
    folder = tmp_path / "tfds" / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    for inside in (folder, folder.parent):
        with pytest.raises(data.DataError, match="is the folder of one data set"):
            data.load("cifar10", data_dir=inside)
    (folder / "cifar10-train.tfrecord-00000-of-00001").touch()
    with pytest.raises(data.DataError, match=r"TFRecord.*tfds build cifar10 --file_format=array_record"):
        data.load("cifar10", data_dir=tmp_path / "tfds")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(data.DataError, match=r"other is not a TFDS data directory.*NAME/VERSION"):
        data.load("cifar10", data_dir=tmp_path / "other")
    with pytest.raises(data.DataError, match="names look like"):
        data.load("../cifar10", data_dir=tmp_path / "tfds")


def test_newest_version_is_found(tmp_path):
    for version in ("1.9.0", "1.10.0", "incomplete.2.0.0"):
        (tmp_path / "a" / "b" / version).mkdir(parents=True)
        (tmp_path / "a" / "b" / version / "dataset_info.json").touch()
        (tmp_path / "a" / "b" / version / "b.array_record-00000-of-00001").touch()
    assert _tfds.locate("a/b", tmp_path) == tmp_path / "a" / "b" / "1.10.0"
    assert _tfds.prepared(tmp_path) == ["a/b"]


def serve(monkeypatch, tmp_path, name, contents):
    sources = []
    for i, content in enumerate(contents):
        (tmp_path / f"{name}{i}").write_bytes(content)
        sources.append(((tmp_path / f"{name}{i}").as_uri(), hashlib.sha256(content).hexdigest()))
    entry = dataclasses.replace(_registry.find(name), sources=tuple(sources))
    monkeypatch.setattr(_registry, "ENTRIES", {**_registry.ENTRIES, name: entry})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "default").mkdir()


@pytest.mark.parametrize("name, label_bytes", [("cifar10", 1), ("cifar100", 2)])
def test_cifar_download(monkeypatch, tmp_path, name, label_bytes):
    forbid(monkeypatch, "tensorflow_datasets")
    rng = np.random.default_rng(0)
    files = (
        {"train.bin": 6, "test.bin": 3}
        if name == "cifar100"
        else {"data_batch_1.bin": 3, "data_batch_2.bin": 3, "test_batch.bin": 3}
    )
    buffer, records = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, count in files.items():
            raw = rng.integers(0, 10, (count, label_bytes + 3072), dtype=np.uint8)
            records.append(raw)
            info = tarfile.TarInfo(f"{name}-binary/{file}")
            info.size = raw.size
            tar.addfile(info, io.BytesIO(raw.tobytes()))
    serve(monkeypatch, tmp_path, name, [buffer.getvalue()])
    ds = data.load(name)
    raw = np.concatenate(records)
    assert ds.train_inputs.shape == (6, 32, 32, 3) and ds.test_inputs.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(ds.train_labels, raw[:6, label_bytes - 1])
    np.testing.assert_array_equal(ds.train_inputs[4][5, 7], raw[4, label_bytes:].reshape(3, 32, 32)[:, 5, 7])
    monkeypatch.setattr(_official, "download", None)
    np.testing.assert_array_equal(data.load(name).test_inputs, ds.test_inputs)  # from the cache


def test_mnist_download_and_checksum(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 5, 28, 28), dtype=np.uint8), rng.integers(0, 10, (2, 5), dtype=np.uint8)
    contents = []
    for images, labels in zip(x, y, strict=True):
        contents.append(gzip.compress(bytes([0, 0, 8, 3]) + np.array([5, 28, 28], ">u4").tobytes() + images.tobytes()))
        contents.append(gzip.compress(bytes([0, 0, 8, 1]) + np.array([5], ">u4").tobytes() + labels.tobytes()))
    serve(monkeypatch, tmp_path, "mnist", contents)
    ds = data.load("mnist")
    np.testing.assert_array_equal(ds.train_inputs[..., 0], x[0])
    np.testing.assert_array_equal(ds.test_labels, y[1])
    (tmp_path / "mnist1").write_bytes(contents[1] + b"x")
    with pytest.raises(data.DataError, match="other than the published one"):
        data.load("mnist", image_size=14)


@pytest.mark.filterwarnings("default")  # TFDS's own
def test_real_tfds(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    records = {"train": Records(30, (6, 6, 1), 3), "validation": Records(9, (6, 6, 1), 3, seed=1)}

    class MsjaxTestShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(6, 6, 1), encoding_format="png")
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(r) for split, r in records.items()}

        def _generate_examples(self, r):
            for i, encoded in enumerate(r.encoded):
                yield i, {"image": encoded, "label": int(r.labels[i])}

    MsjaxTestShapes(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    name, where = "msjax_test_shapes", {"data_dir": tmp_path / "tfds", "cache_dir": tmp_path / "cache"}
    ds = data.load(name, **where)
    assert ds.train_inputs.shape == (30, 6, 6, 1) and ds.test_inputs.shape == (9, 6, 6, 1) and ds.num_classes == 3
    # TFDS shuffles when it writes: the same images, each with its label
    written = {x.tobytes(): y for x, y in zip(records["train"].images, records["train"].labels, strict=True)}
    assert {x.tobytes(): y for x, y in zip(ds.train_inputs, ds.train_labels, strict=True)} == written
    source = data.stream(name, "test", image_size=6, **where)
    np.testing.assert_array_equal(source.labels(), ds.test_labels)
    for shard in (tmp_path / "tfds").glob("**/*train.array_record*"):
        shard.write_bytes(b"")
    with pytest.raises(data.DataError, match=r"TFDS cannot read msjax_test_shapes in .*prepare or copy it again"):
        data.load(name, image_size=5, **where)
    with pytest.raises(data.DataError, match="TFDS knows no set of that name"):
        data.load("nosuch", **where)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nosuch").mkdir()
    with pytest.raises(data.DataError, match=r"the folder of that name here is \./nosuch"):
        data.load("nosuch", **where)

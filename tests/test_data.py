"""Data: sets, cache, errors, clients, order, augmentation, streams. Needs neither network nor prepared data."""

import builtins
import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import data
from msjax.data import _cache, _images, _official, _registry, _tfds
from msjax.data._records import Images

Image = pytest.importorskip("PIL.Image")


# --- a fake prepared set, so that no TFDS is needed -------------------------------------------------------------------


class Records:
    """Encoded examples with the interface of a TFDS data source."""

    def __init__(self, count, shape, classes, seed=0, encoding="png"):
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        self.labels = np.arange(count) % classes
        self.encoded = []
        for x in self.images:
            buffer = io.BytesIO()
            Image.fromarray(x[..., 0] if shape[-1] == 1 else x).save(buffer, format=encoding)
            self.encoded.append(buffer.getvalue())

    def __len__(self):
        return len(self.encoded)

    def __getitems__(self, indices):
        return [{"image": self.encoded[i], "label": self.labels[i]} for i in indices]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A data_dir that holds a set `tiny` (40 train, 12 test, 12x10x3, 3 classes), read through a fake TFDS."""
    folder = tmp_path / "tfds" / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "tiny", "version": "1.0.0"}))
    (folder / "tiny-train.array_record-00000-of-00001").touch()
    splits = {"train": Records(40, (12, 10, 3), 3), "test": Records(12, (12, 10, 3), 3, seed=1)}

    def open_split(name, folder, split):
        return _tfds.Records(splits[split], Images("image", splits[split].images.shape[1:]), "label", 3)

    monkeypatch.setattr(_tfds, "open_split", open_split)
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "tfds", splits


def forbid_tfds(monkeypatch):
    """Make every import of tensorflow_datasets fail, as on a machine without it."""
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == "tensorflow_datasets":
            raise ImportError("No module named 'tensorflow_datasets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


# --- sets and cache ---------------------------------------------------------------------------------------------------


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
    assert (data.load("digits").test_inputs == ds.test_inputs).all()
    assert data.load("digits", image_size=16).train_inputs.shape == (1437, 16, 16, 1)


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
    forbid_tfds(monkeypatch)
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
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
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


# --- errors -----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(data.DataError, match=rf"looked for {name} in .*default.*cannot be downloaded.*--data.data-dir"):
        data.load(name)


def test_imagenet_says_how_to_get_it(offline):
    for opening in (data.load, data.stream):
        with pytest.raises(data.DataError, match=r"ILSVRC2012_img_train.tar.*--file_format=array_record"):
            opening("imagenet2012")


def test_tfds_not_installed(offline, monkeypatch):
    forbid_tfds(monkeypatch)
    with pytest.raises(data.DataError, match=r"looked for svhn_cropped in .*pip install 'msjax\[data\]'"):
        data.load("svhn_cropped")


def test_pillow_not_installed(tiny, monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name == "PIL":
            raise ImportError("No module named 'PIL'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(data.DataError, match=r"needs pillow.*pip install 'msjax\[data\]'"):
        data.load("tiny", data_dir=tiny[0])


def test_wrong_directories(offline, tmp_path):
    with pytest.raises(data.DataError, match=r"nowhere does not exist.*--data.data-dir"):
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


# --- downloads from the authors' sites, served from files -------------------------------------------------------------


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
    forbid_tfds(monkeypatch)
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


# --- real TFDS files, made here ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # TFDS's own
def test_real_tfds(tmp_path):
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


# --- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, clients", [(100, 10), (103, 10), (7, 7), (5, 1)])
def test_even_partition(count, clients):
    pools = data.partition(np.zeros(count, np.int32), clients, seed=3)
    assert [len(p) for p in pools] == [count // clients] * clients
    joined = np.concatenate(pools)
    assert len(set(joined.tolist())) == len(joined) and joined.min() >= 0 and joined.max() < count
    assert all(p.dtype == np.int32 for p in pools)
    np.testing.assert_array_equal(joined, np.concatenate(data.partition(count, clients, seed=3)))
    if count > 7:
        assert (joined != np.concatenate(data.partition(count, clients, seed=4))).any()


def skew(labels, pools):
    """Mean total-variation distance between each client's label shares and the whole set's."""
    whole = np.bincount(labels, minlength=10) / len(labels)
    shares = [np.bincount(labels[p], minlength=10) / len(p) for p in pools]
    return np.mean([np.abs(s - whole).sum() / 2 for s in shares])


def test_dirichlet_partition():
    labels = np.random.default_rng(0).integers(0, 10, 5000)
    skews = []
    for alpha in (0.01, 0.1, 1.0, 10.0, 1000.0):
        pools = data.partition(labels, 20, alpha=alpha, seed=1)
        assert sorted(np.concatenate(pools).tolist()) == list(range(5000))
        assert min(map(len, pools)) >= 10
        skews.append(skew(labels, pools))
        again = data.partition(labels, 20, alpha=alpha, seed=1)
        assert all((a == b).all() for a, b in zip(pools, again, strict=True))
    assert skews == sorted(skews, reverse=True) and skews[0] > 0.7 and skews[-1] < 0.1
    assert [len(p) for p in data.partition(labels[:20], 20, alpha=0.05)] == [1] * 20


def test_partition_errors():
    with pytest.raises(ValueError, match=r"num_clients must be in 1..3 .*got 4"):
        data.partition(np.zeros(3), 4)
    with pytest.raises(ValueError, match="got 0"):
        data.partition(3, 0)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must be positive"):
            data.partition(np.zeros(30), 3, alpha=alpha)
    with pytest.raises(ValueError, match="needs the label"):
        data.partition(30, 3, alpha=1.0)
    with pytest.raises(ValueError, match="one-dimensional"):
        data.partition(np.zeros((3, 3)), 3)


def test_epoch_indices():
    pools = data.partition(100, 4, seed=0)
    order = data.epoch_indices(pools, 25, seed=5, epoch=2)
    assert order.shape == (4, 25) and order.dtype == np.int32
    for row, pool in zip(order, pools, strict=True):
        assert sorted(row) == sorted(pool)
    np.testing.assert_array_equal(order, data.epoch_indices(pools, 25, seed=5, epoch=2))
    assert (order != data.epoch_indices(pools, 25, seed=5, epoch=3)).any()
    assert (order != data.epoch_indices(pools, 25, seed=6, epoch=2)).any()
    np.testing.assert_array_equal(order[:2], data.epoch_indices(pools[:2], 25, seed=5, epoch=2))  # client by client


def test_epoch_indices_of_uneven_pools():
    pools = [np.arange(3), np.arange(10, 30)]
    short, long = data.epoch_indices(pools, 8, seed=0, epoch=0)
    assert sorted(short[:3]) == sorted(short[3:6]) == [0, 1, 2] and len(set(short[6:])) == 2
    assert len(set(long)) == 8 and set(long) <= set(range(10, 30))
    with pytest.raises(ValueError, match="pool of client 1 is empty"):
        data.epoch_indices([np.arange(3), np.arange(0)], 2, seed=0, epoch=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        data.epoch_indices(pools, 0, seed=0, epoch=0)


# --- augmentation -----------------------------------------------------------------------------------------------------


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
    out = np.asarray(jax.jit(data.augment, static_argnames="kind")(images, jax.random.key(0), kind="crop_flip")).astype(
        int
    )
    middle = out[:, 6, 5:7]  # never padding
    flips = middle[:, 1, 1] < middle[:, 0, 1]
    offsets = np.stack([middle[:, 0, 0] - 7, np.where(flips, middle[:, 1, 1], middle[:, 0, 1]) - 6], 1) + 4
    seen, counts = np.unique(np.c_[offsets, flips], axis=0, return_counts=True)
    assert len(seen) == 9 * 9 * 2 and counts.min() >= 5 and counts.max() <= 60
    assert seen[:, :2].min() == 0 and seen[:, :2].max() == 8
    np.testing.assert_array_equal(out[:50], crop_flip_reference(np.asarray(images[:50]), offsets[:50], flips[:50], 4))
    same = data.augment(images, jax.random.key(0), kind="crop_flip")
    np.testing.assert_array_equal(same, out)


def test_augment_kinds():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3), dtype=np.uint8))
    assert data.augment(images, kind="none") is images
    flipped = np.asarray(data.augment(images, jax.random.key(1), kind="flip"))
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(flipped, np.asarray(images), strict=True)]
    kept = [(a == b).all() for a, b in zip(flipped, np.asarray(images), strict=True)]
    assert all(m or k for m, k in zip(mirrored, kept, strict=True)) and 10 < sum(mirrored) < 54
    with pytest.raises(ValueError, match="kind must be one of crop_flip, flip, none, got 'crop'"):
        data.augment(images, jax.random.key(0), kind="crop")
    with pytest.raises(ValueError, match="needs a key"):
        data.augment(images, kind="flip")
    assert data.augment(images[:0], jax.random.key(0), kind="crop_flip").shape == (0, 6, 5, 3)
    assert [data.default_augmentation(n) for n in ("digits", "mnist", "cifar10")] == ["none", "none", "crop_flip"]


def test_augment_under_vmap_and_scan():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 6, 6, 3), dtype=np.uint8))
    keys = jax.random.split(jax.random.key(2), 3)
    one = [data.augment(x, k, kind="crop_flip") for x, k in zip(images, keys, strict=True)]
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


# --- streams ----------------------------------------------------------------------------------------------------------


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


def collect(source, indices, **options):
    return [(x.copy(), y.copy()) for x, y in data.batches(source, indices, **options)]


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


def test_leaving_a_stream_early_stops_its_threads(photos):
    source = data.stream("photos", **photos)
    loop = data.batches(source, np.zeros((1000, 4), int), threads=2)
    next(loop)
    loop.close()


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

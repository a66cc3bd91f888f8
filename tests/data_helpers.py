"""What the tests of data share: prepared sets without TFDS, machines without network or packages."""

import builtins
import io
import json
import sys
import types

import numpy as np
import pytest

from msjax import data
from msjax.data import _tfds
from msjax.data._records import Images

Image = pytest.importorskip("PIL.Image")


def png(pixels):
    """An image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


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


def prepare_tiny(tmp_path, monkeypatch):
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


def forbid(monkeypatch, package):
    """Make every import of a package fail, as on a machine without it."""
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named '{package}'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setitem(sys.modules, package, None)


def collect(source, indices, **options):
    """Copies of all batches."""
    return [(x.copy(), y.copy()) for x, y in data.batches(source, indices, **options)]


NEGATIVE, POSITIVE = ("dull", "bleak", "tired"), ("Bright", "lively", "warm")


def sentences(count, seed=0):
    """Sentences of neutral words and one that gives the class away, and the classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    found = []
    for label in labels:
        words = [f"word{n}" for n in rng.integers(0, 40, rng.integers(2, 9))]
        words.insert(rng.integers(0, len(words)), rng.choice((NEGATIVE, POSITIVE)[label]))
        found.append(" ".join(words).encode())
    return found, labels


class Source(list):
    """Records with the interface of a TFDS data source."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def prepared(tmp_path, monkeypatch, name, features, splits, supervised=None):
    """A data_dir with a set of these features and records, read through TFDS's own classes but for the files."""
    import tensorflow_datasets as tfds

    folder = tmp_path / "tfds" / name / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": name, "version": "1.0.0"}))
    (folder / f"{name}-train.array_record-00000-of-00001").touch()
    info = types.SimpleNamespace(
        supervised_keys=supervised, features=tfds.features.FeaturesDict(features), splits=splits
    )
    builder = types.SimpleNamespace(info=info, as_data_source=lambda split, decoders: Source(splits[split]))
    fake = types.SimpleNamespace(
        builder_from_directory=lambda path: builder, features=tfds.features, decode=tfds.decode
    )
    monkeypatch.setattr(_tfds, "import_tfds", lambda purpose: fake)
    return {"data_dir": tmp_path / "tfds", "cache_dir": tmp_path / "cache"}


def prepare_reviews(tmp_path, monkeypatch):
    """A set of texts like SST-2: the labels of its test split are hidden."""
    from tensorflow_datasets import features as kinds

    splits = {}
    for seed, (split, count) in enumerate({"train": 600, "validation": 100, "test": 20}.items()):
        texts, labels = sentences(count, seed)
        hidden = split == "test"
        splits[split] = [
            {"idx": n, "sentence": text, "label": -1 if hidden else label}
            for n, (text, label) in enumerate(zip(texts, labels, strict=True))
        ]
    features = {"idx": np.int32, "sentence": kinds.Text(), "label": kinds.ClassLabel(num_classes=2)}
    return prepared(tmp_path, monkeypatch, "reviews", features, splits), splits

"""TensorFlow Datasets without TensorFlow: find a prepared set, read its records, say clearly why that is not possible.

Finding and identifying a set reads only file names and JSON; tensorflow_datasets is imported when records are read.
"""

import hashlib
import importlib
import os
import re
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from msjax.data import _images, _registry
from msjax.data._error import DataError
from msjax.data._records import Columns, Feature, Images, Texts, value

_NAME = re.compile(r"[A-Za-z]\w*(/\w[\w.+-]*)?")
_PREPARE = "`tfds build {name} --file_format=array_record --data_dir=DIR`"


def check_name(name: str) -> None:
    """Names are `set` or `set/config`, and become paths."""
    if not _NAME.fullmatch(name):
        raise DataError(f"data set names look like cifar10 or imagenet_resized/64x64, got {name!r}")


def import_tfds(purpose: str) -> ModuleType:
    """tensorflow_datasets, or a DataError that says how to get it."""
    try:
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise DataError(
            f"{purpose} needs tensorflow_datasets, which cannot be imported ({error}): pip install 'msjax[data]'"
        ) from error


def root(data_dir: str | os.PathLike | None) -> tuple[Path, bool]:
    """The TFDS data directory, and whether it was asked for (by argument or $TFDS_DATA_DIR)."""
    asked = data_dir if data_dir is not None else os.environ.get("TFDS_DATA_DIR")
    return Path(asked or "~/tensorflow_datasets").expanduser(), bool(asked)


def check_root(directory: Path) -> None:
    """A directory that was asked for must exist and look like a TFDS data directory (or be empty)."""
    if not directory.is_dir():
        raise DataError(
            f"the data directory {directory} does not exist or is no directory: correct data_dir, or "
            f"create it to use it"
        )
    if (directory / "dataset_info.json").exists() or _versions(directory):
        raise DataError(
            f"{directory} is the folder of one data set: give the TFDS data directory above it, the one that holds "
            f"NAME/VERSION, as data_dir"
        )
    if not prepared(directory) and any(
        not p.name.startswith(".") and p.name != "downloads" for p in directory.iterdir()
    ):
        raise DataError(
            f"{directory} is not a TFDS data directory: there is no NAME/VERSION/dataset_info.json in it. Give the "
            f"folder that holds the "
            "data sets' folders as data_dir"
        )


def _versions(folder: Path) -> list[Path]:
    """The version folders of a prepared set, oldest first."""
    found = [p.parent for p in folder.glob("*/dataset_info.json") if re.fullmatch(r"\d+\.\d+\.\d+", p.parent.name)]
    return sorted(found, key=lambda p: tuple(int(n) for n in p.name.split(".")))


def is_prepared(folder: Path) -> bool:
    """Whether a folder is of a set, with a folder a version."""
    return bool(_versions(folder))


def prepared(directory: Path) -> list[str]:
    """Names of the sets prepared in a TFDS data directory."""
    folders = [p for depth in ("*", "*/*") for p in directory.glob(depth) if p.is_dir() and _versions(p)]
    return sorted(p.relative_to(directory).as_posix() for p in folders)


def locate(name: str, directory: Path) -> Path | None:
    """The folder of the newest prepared version of a set, or None; a DataError where only TFRecord files are there."""
    versions = _versions(directory / name)
    if not versions:
        return None
    folder = versions[-1]
    if not any(folder.glob("*.array_record*")):
        what = "in TFRecord format" if any(folder.glob("*.tfrecord*")) else "without data files"
        raise DataError(
            f"{name} in {folder} is {what}; only array_record files can be read without TensorFlow. Prepare it again, "
            f"in another directory or "
            f"after removing this copy: {_PREPARE.format(name=name)} (this needs tensorflow, once)"
        )
    return folder


def digest(folder: Path) -> str:
    """What a prepared set is, and how it is decoded: changes with version, splits, sizes and features."""
    texts = [(folder / f).read_bytes() for f in ("dataset_info.json", "features.json") if (folder / f).exists()]
    decoder = f"decoder {_images.DECODER}".encode()
    return hashlib.sha256(b"\0".join([*texts, decoder])).hexdigest()


class Records(NamedTuple):
    """One split of a prepared set, images still encoded: `records.__getitems__([i, ...])` gives dicts."""

    records: Sequence[dict[str, Any]]
    inputs: Images | Texts | Columns
    label_key: str
    num_classes: int
    classes: tuple[str, ...] = ()
    """Their names."""


class NoSplit(DataError):
    """A prepared set has nothing that is set aside for testing."""


def open_split(name: str, folder: Path, split: str) -> Records:
    """Open "train" or "test" of a prepared set; "test" is the labelled set-aside split, `test` or `validation`."""
    tfds = import_tfds(f"reading {name}")
    try:
        builder = tfds.builder_from_directory(os.fspath(folder))
        info = builder.info
        features = _leaves(tfds.features, info.features) if hasattr(info.features, "keys") else {}
        input_keys, label_key = _keys(info.supervised_keys)
        label = features.get(label_key)
        inputs = _inputs(tfds, name, folder, features, input_keys, label_key)
        if inputs is None or not isinstance(label, tfds.features.ClassLabel):
            raise DataError(
                f"{name} in {folder} is no set of images, texts or a table with a class label each: its features are "
                f"{', '.join(f'{key} ({_described(features[key])})' for key in sorted(features))}, and the label is "
                f"{label_key}"
            )
        wanted = ("train",) if split == "train" else _registry.test_splits(name)
        there = [s for s in wanted if s in info.splits]
        decoders = _nested(inputs.key, tfds.decode.SkipDecoding()) if isinstance(inputs, Images) else None
        for chosen in there:
            records = builder.as_data_source(chosen, decoders=decoders)
            if len(records) and value(records.__getitems__([0])[0], label_key) >= 0:
                return Records(records, inputs, label_key, label.num_classes, tuple(label.names))
        what = "none that has examples whose labels are known" if there else f"it has {', '.join(sorted(info.splits))}"
        raise NoSplit(f"{name} in {folder} has no {' or '.join(wanted)} split; {what}")
    except DataError:
        raise
    except Exception as error:  # whatever is wrong with the files, TFDS says it in its own way
        raise DataError(
            f"TFDS cannot read {name} in {folder} ({type(error).__name__}: {error}). The copy may be incomplete: "
            f"prepare or copy it again"
        ) from error


def _keys(supervised: Any) -> tuple[set[str] | None, str]:
    """The keys of inputs, all others where none are named, and that of the label."""
    if not supervised or len(supervised) < 2:
        return None, "label"

    def names(tree: Any) -> set[str]:
        """As a set says them: a key, or a dict or tuple of keys."""
        if isinstance(tree, str):
            return {tree}
        return set().union(*map(names, tree.values() if hasattr(tree, "values") else tree))

    label = sorted(names(supervised[1]))
    return names(supervised[0]), label[0] if len(label) == 1 else ", ".join(label)


def _leaves(kinds: ModuleType, features: Any, prefix: str = "") -> dict[str, Any]:
    """Features by key, those in dicts of dicts with their names joined by "/"."""
    found = {}
    for key, feature in dict(features).items():
        nested = isinstance(feature, kinds.FeaturesDict)
        found |= _leaves(kinds, feature, f"{prefix}{key}/") if nested else {f"{prefix}{key}": feature}
    return found


def _nested(key: str, leaf: Any) -> dict[str, Any]:
    """A leaf in dicts of dicts."""
    first, _, rest = key.partition("/")
    return {first: _nested(rest, leaf) if rest else leaf}


def _described(feature: Any) -> str:
    """A feature in a few words."""
    return f"{type(feature).__name__} {getattr(feature, 'shape', '')}".strip()


def _inputs(tfds, name, folder, features, input_keys, label_key):
    """What is classified: the images, else the texts, else all columns of a table; None where there are none."""
    kinds = tfds.features

    def is_input(key):
        return input_keys is None or any(key == k or key.startswith(f"{k}/") for k in input_keys)

    others = {k: f for k, f in features.items() if k != label_key and is_input(k)}
    images = [k for k, f in others.items() if isinstance(f, kinds.Image)]
    if images:
        h, w, channels = others[images[0]].shape
        if np.dtype(others[images[0]].np_dtype) != np.uint8 or channels not in (None, 1, 3) or len(images) > 1:
            raise DataError(
                f"{name} in {folder}: there must be one image, uint8 with 1 or 3 channels, got "
                + ", ".join(f"{k} {others[k].np_dtype} {others[k].shape}" for k in images)
            )
        return Images(images[0], (h, w, channels or 3))
    if texts := [k for k, f in others.items() if isinstance(f, kinds.Text)]:
        return Texts(tuple(sorted(texts)))
    columns = tuple(_feature(kinds, key, others[key]) for key in sorted(others))
    return Columns(columns) if any(not column.refused for column in columns) else None


def _feature(kinds: ModuleType, key: str, feature: Any) -> Feature:
    """A feature as one of a table."""
    if isinstance(feature, kinds.ClassLabel):
        return Feature(key, tuple(feature.names))
    shape, dtype = feature.shape, feature.np_dtype
    if not isinstance(shape, tuple) or len(shape) > 1 or None in shape:
        return Feature(key, refused=f"must be one value or a vector of fixed length, got {_described(feature)}")
    kind = np.dtype(dtype).kind
    if kind not in "fiubOSU":
        return Feature(key, refused=f"must be numbers, classes or texts, got {np.dtype(dtype)}")
    return Feature(key, (), shape[0] if shape else None, kind in "OSU")


def prepare(name: str, directory: Path) -> None:
    """Download and prepare a set that TFDS knows, as array_record; most builders need tensorflow for that step."""
    there = ", ".join(prepared(directory)) if directory.is_dir() else ""
    looked = f"looked for {name} in {directory}" + (f" (which has {there})" if there else " (which has none)")
    if by_hand := _registry.find(name).by_hand:
        raise DataError(f"{looked}. {by_hand}")
    tfds = import_tfds(f"{looked}; downloading it")
    try:
        builder = tfds.builder(name, data_dir=os.fspath(directory), file_format="array_record")
    except Exception as error:
        if type(error).__name__ != "DatasetNotFoundError":
            raise DataError(f"{looked}; TFDS cannot make it ({type(error).__name__}: {error})") from error
        helps = "correct the name, or the directory by data_dir"
        if Path(name).is_dir():  # a name without a separator is never a path
            helps = f"the folder of that name here is ./{name}"
        raise DataError(f"{looked}, and TFDS knows no set of that name: {helps}") from None
    require_network("storage.googleapis.com", looked)
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise DataError(
            f"{looked}; TFDS could not prepare it ({type(error).__name__}: {str(error)[:300]}). Where tensorflow is "
            f"missing, prepare it once on a "
            f"machine that has it: {_PREPARE.format(name=name)}, and give DIR as data_dir; reading it needs no "
            f"tensorflow"
        ) from error


def find(name: str, directory: Path, asked: bool) -> Path:
    """The folder of a prepared set, which TFDS downloads and prepares where it is not there yet."""
    folder = locate(name, directory)
    if folder is None:
        if asked:
            check_root(directory)
        prepare(name, directory)
        folder = locate(name, directory)
    if folder is None:
        raise DataError(f"TFDS prepared {name}, but not as {directory / name}/VERSION")
    return folder


def place(directory: Path, asked: bool) -> str:
    """A data directory's part of the names in the cache; TFDS's own is the same on every machine."""
    return hashlib.sha256(os.path.realpath(directory).encode()).hexdigest()[:12] if asked else "default"


def require_network(host: str, looked: str) -> None:
    """Fail at once where a host cannot be reached; TFDS would retry for minutes. A proxy is taken to work."""
    if urllib.request.getproxies():
        return
    try:
        socket.create_connection((host, 443), timeout=10).close()
    except OSError as error:
        raise DataError(
            f"{looked}, and {host} cannot be reached to download it ({error}). On a machine without network, copy a "
            f"prepared TFDS directory (or the "
            "array cache of another machine) there and give its place: data_dir or cache_dir"
        ) from error


def read(name: str, split: Records, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """Records by index, images still encoded."""
    try:
        return list(split.records.__getitems__([int(i) for i in indices]))
    except Exception as error:
        raise DataError(
            f"TFDS cannot read examples of {name} ({type(error).__name__}: {error}). The copy may be incomplete"
        ) from error


def labels(name: str, split: Records, records: Sequence[dict[str, Any]]) -> np.ndarray:
    """int32 labels of records, all of them known."""
    found = np.asarray([value(r, split.label_key) for r in records], np.int32)
    if found.size and not (found.min() >= 0 and found.max() < split.num_classes):
        raise DataError(f"{name} has labels outside 0..{split.num_classes - 1}: this split's labels are hidden")
    return found

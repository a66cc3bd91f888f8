"""A folder of images, one folder a class, as a data set."""

import logging
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msjax.data import _images, _sets
from msjax.data._arrays import finish
from msjax.data._check import SPLIT_NAMES, TEST_NAMES, check_classes
from msjax.data._dataset import Dataset
from msjax.data._error import DataError
from msjax.data._sequence import SequenceSplit, are_large, share_split

_log = logging.getLogger("msjax")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Files with other names are passed over."""
_SPLITS = (*TEST_NAMES, "train", "training", "testing", "dev", "eval", "evaluation")
"""Names of folders, in any case, that are splits rather than classes."""


def from_image_folder(
    path: str | os.PathLike,
    *,
    image_size: int | None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    test_share: float | None = 0.2,
    streamed: bool | None = None,
    seed: int = 0,
) -> Dataset:
    """Make a data set of PATH/train/CLASS/* and PATH/test/CLASS/*, or of PATH/CLASS/*, with Pillow.

    In place of test the folder may be called val, valid or validation; the first of these that is there is used.
    Classes are numbered by their folders' names in order, which `classes` of the data set has; images may lie deeper
    inside. An image is turned as its EXIF orientation says; transparent pixels are laid over black; of more than 8 bits
    a channel the upper 8 are left, and where nothing says how many there are, as in floats, the image is refused. Then
    its shorter side is resized to `image_size` and the middle cropped, as `load` does. Mean and std are measured on the
    training images.

    Args:
        path: the folder.
        image_size: side of the images in pixels; None: as they are, all of one size.
        channels: 1 (grey) or 3 (RGB); by default 1 where all training images are grey.
        classes: names of all classes in order, also of those that have no folder here, as where several parties have
            images of the same classes; by default those of the folders to train on.
        test_share: what is set aside where there is no test folder, of each class alike; None: nothing.
        streamed: decode images as they are needed, by worker processes where that pays (see `Reader`), rather than into
            memory; mean and std are then measured on 1,000. By default whether all have 2 GiB or more.
        seed: chooses what is set aside.

    Raises:
        DataError: there is no such folder, class or image; a folder looks like a split that would not be used; an image
            cannot be decoded (its path is named); the images
            differ in size without `image_size`; Pillow is missing.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    _sets.check_image_size(image_size)
    if channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 or 3, got {channels}")
    if not path.is_dir():
        raise DataError(f"{path} must be a folder of images, and is none")
    _images.pillow()
    has_splits = _is_split(path / "train", classes)
    root = path / "train" if has_splits else path
    test_root = next((path / n for n in TEST_NAMES if (path / n).is_dir()), None) if has_splits else None
    _check_splits(path, has_splits, classes or ())
    if has_splits and test_root is None and classes is None:
        _warn_of_others(path)
    classes, files, labels = _find(root, None if classes is None else check_classes(classes))
    if channels is None:
        channels = _channels(files)
    _warn_of_few_levels(files)
    splits = [_Images(files, labels, image_size, channels)]
    if test_root:
        splits.append(_Images(*_find(test_root, classes)[1:], image_size, channels))
    splits = [
        SequenceSplit(items, path.name, split, num_classes=len(classes))
        for items, split in zip(splits, ("train", "test"), strict=False)
    ]
    if streamed is None:
        streamed = are_large(splits)
    if not streamed:
        splits = [split.read() for split in splits]
    if not test_root:
        splits = share_split(splits[0], test_share, seed, labels)
    return finish(path.name, *splits, classes=tuple(classes))


def _nfc(name: str) -> str:
    """A class's name as one sequence of characters: macOS may write a letter and its accent as two characters."""
    return unicodedata.normalize("NFC", name)


def _folders(path: Path) -> list[Path]:
    return sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def _is_split(train: Path, classes: Sequence[str] | None) -> bool:
    """Whether a folder of this name has the classes to train on; it may be a class itself, as of vehicles."""
    if not train.is_dir():
        return False
    if classes is not None and "train" in classes:
        inner = [_nfc(folder.name) for folder in _folders(train) if images_in(folder)]
        return bool(inner) and {*inner} <= {_nfc(name) for name in classes}
    beside = (folder for folder in _folders(train.parent) if folder.name.lower() not in _SPLITS)
    # Without folders it is a class, or nothing, where there are others; where there are none, an error says so.
    return bool(_folders(train)) or not any(map(images_in, beside))


def _warn_of_others(path: Path) -> None:
    """Beside the only split there may be what is none: "train" would be a class whose images lie deeper."""
    if others := [p.name for p in _folders(path) if p.name.lower() not in _SPLITS and images_in(p)]:
        _log.warning(
            "%s: only the images in train are used, not those in %s. If these folders are classes, too, name all "
            "classes, train among them, with classes= (data.classes)",
            path,
            ", ".join(others[:5]),
        )


def _check_splits(path: Path, has_splits: bool, classes: Sequence[str]) -> None:
    """A folder that looks like a split is one, and no class, unless it is named as one or has images itself."""
    used = ("train", *TEST_NAMES) if has_splits else classes
    for folder in _folders(path):
        if folder.name.lower() in _SPLITS and folder.name not in used and _holds_classes(folder):
            raise DataError(
                f"{path} must have its splits in folders named {SPLIT_NAMES}, or one folder for each class, got "
                f"{folder.name!r}: rename it, or give classes"
            )


def _holds_classes(folder: Path) -> bool:
    """Whether a folder has folders, and no images beside them."""
    return folder.is_dir() and any(p.is_dir() for p in folder.iterdir()) and not any(map(is_image, folder.iterdir()))


def _find(root: Path, classes: Sequence[str] | None = None) -> tuple[list[str], list[Path], np.ndarray]:
    """The classes below a folder, and every image's path and class."""
    found: dict[str, list[Path]] = {}
    for folder in _folders(root):
        if files := images_in(folder):
            found.setdefault(_nfc(folder.name), []).extend(files)
    if not found:
        raise DataError(f"{root} must hold a folder of images for each class ({', '.join(SUFFIXES)}), and has none")
    classes = sorted(found) if classes is None else [_nfc(name) for name in classes]
    if unknown := sorted(set(found) - set(classes)):
        raise DataError(
            f"{root} must have classes that are given or are there to train on ({', '.join(classes)}), got {unknown[0]}"
        )
    files = [file for name in classes for file in found.get(name, ())]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found.get(name, ())) for name in classes])
    return classes, files, labels


def images_in(folder: Path) -> list[Path]:
    """All images in a folder, however deep, in order; what lies in hidden folders, as thumbnails do, is passed over."""
    files, seen = [], {os.path.realpath(folder)}
    for at, folders, names in os.walk(folder, followlinks=True):
        places = [(os.path.islink(there := os.path.join(at, name)), name, os.path.realpath(there)) for name in folders]
        folders.clear()
        for _, name, real in sorted(places):  # links may lead around, or to what is there already
            if not name.startswith(".") and real not in seen:
                folders.append(name)
                seen.add(real)
        files += [file for name in names if is_image(file := Path(at, name))]
    return sorted(files, key=lambda file: file.relative_to(folder).parts)  # paths are in another order on Windows


def is_image(file: Path) -> bool:
    """By its name; hidden files are passed over."""
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _channels(files: Sequence[Path]) -> int:
    """1 where all images are grey; only the files' heads are read."""
    for place, file in enumerate(files):
        if _opened(file).mode not in _images.GREY_MODES:
            if place:
                said = "%s is a colour image, and those before it are grey: all become colour; with channels=1 "
                said += "(data.channels) all become grey"
                _log.warning(said, file)
            return 3
    return 1


def _warn_of_few_levels(files: Sequence[Path]) -> None:
    """Of grey images of more than 8 bits, where some of them use so few values that little is left of the upper 8."""
    most: dict[int, tuple[int, Path]] = {}  # by bits: the brightest value, and whose it is
    for file in files[:: max(1, len(files) // 8)]:
        with _images.decoding(f"image {file}"), _images.pillow().open(file) as image:
            if bits := _images.grey_bits(image):
                most[bits] = max(most.get(bits, (0, file)), (int(np.asarray(image).max()), file))
    for bits, (value, file) in most.items():
        if value < 1 << (bits - 3):
            said = "images of %d bits, as %s, use values of at most %d: of the upper 8 bits, which alone are used, "
            said += "these leave %d levels; scale them before, so that the brightest have %d"
            _log.warning(said, bits, file, value, (value >> (bits - 8)) + 1, (1 << bits) - 1)


def _opened(file: Path):
    """A PIL image that is not decoded yet."""
    try:
        with _images.pillow().open(file) as image:
            return image
    except Exception as error:  # Pillow's readers raise what they like
        raise DataError(f"image {file} cannot be opened: {type(error).__name__}: {error}") from error


class _Images:
    """Images and classes by index: a sequence as `from_sequence` takes it."""

    def __init__(self, files: Sequence[Path], labels: np.ndarray, image_size: int | None, channels: int):
        self._files = list(map(str, files))  # shorter than paths where they are sent to other processes
        self._labels, self._image_size, self._channels = labels, image_size, channels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.integer]:
        file = self._files[index]
        with _images.decoding(f"image {file}"), _images.pillow().open(file) as opened:
            image = _images.flatten(opened, self._channels)
        if self._image_size is not None:
            image = _images.resize_center_crop(image, self._image_size, self._image_size)
        elif index and image.size != (first := self._size()):
            raise DataError(
                f"images must have one size where image_size is None: {file} has {image.size} pixels, "
                f"{self._files[0]} {first}"
            )
        return _images.to_array(image), self._labels[index]

    def _size(self) -> tuple[int, int]:
        """Width and height of the first image as it is seen."""
        if not hasattr(self, "_first"):
            with _images.pillow().open(self._files[0]) as image:
                self._first = _images.upright(image).size
        return self._first

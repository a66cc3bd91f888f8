"""Sets of images that do not fit in memory: decoded and cropped as they are read."""

import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from msjax.data import _cache, _images, _registry, _sets, _tfds
from msjax.data._error import DataError
from msjax.data._measure import count_levels, measure_levels
from msjax.data._records import Images, value

_log = logging.getLogger("msjax")

IMAGE_SIZE = 224  # of the crops, by default
_AUGMENT = 3  # keeps this stream of random numbers apart from those of _clients
_CHUNK = 500  # records of a pass over a split that are read at a time

Crop = Literal["random", "middle", "whole"]


def test_resize(size: int) -> int:
    """The shorter side to which test images are resized before the middle, `size` pixels wide, is cropped."""
    return round(size * 256 / 224)


class ImageStream:
    """One split of a prepared TFDS set, a `Split`; made by `stream` or `load`, read by `batches` or a `Reader`.

    It can be sent to another process, which opens the files anew.

    Attributes:
        name, split: what it was opened as.
        num_classes: number of classes.
        classes: their names, where the set says them.
        input_shape: (H, W, C) of what `fetch` returns.
        mean, std: float32 [C], of pixels / 255; for `normalize`. Published values; ImageNet's for sets that have none.
        crop: "random", as of training images of ImageNet; "middle", as of its test images; "whole", as `load` has
            images in memory.
    """

    in_memory = False

    def __init__(
        self,
        name: str,
        split: str,
        source: _tfds.Records,
        *,
        image_size: int | None,
        crop: Crop,
        cache: tuple[Path, str],
        digest: str,
    ):
        """`cache` is where passes over the set keep what they found: a folder, and what stands for the directory."""
        self.name, self.split, self.crop = name, split, crop
        self.num_classes = source.num_classes
        self.classes = source.classes or None
        height, width, channels = source.inputs.shape
        self.input_shape = (height, width, channels) if image_size is None else (image_size, image_size, channels)
        known = _registry.find(name if _registry.find(name).mean else "imagenet2012")
        self.mean, self.std = (
            np.resize(np.asarray(v if len(v) == channels else np.mean(v), np.float32), channels)
            for v in (known.mean, known.std)
        )
        self._source, self._image_size, self._cache, self._digest = source, image_size, cache, digest
        self._chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._source.records) if self._chosen is None else len(self._chosen)

    @property
    def random_crop(self) -> bool:
        """Whether images are cropped at random."""
        return self.crop == "random"

    @property
    def input_like(self) -> jax.ShapeDtypeStruct:
        """uint8 (H, W, C)."""
        return jax.ShapeDtypeStruct(self.input_shape, np.uint8)

    @property
    def label_like(self) -> jax.ShapeDtypeStruct:
        """int32 ()."""
        return jax.ShapeDtypeStruct((), np.int32)

    def only(self, indices: np.ndarray) -> "ImageStream":
        """Returns the split of these examples alone; each keeps the random crops that it has here."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._chosen = np.asarray(indices) if self._chosen is None else self._chosen[indices]
        return new

    def labels(self) -> np.ndarray:
        """int32 [N] labels of the split; read once (every record is), then kept in the array cache."""

        def read(draft: _cache.Draft) -> None:
            out = draft.array("labels", (len(self._source.records),), np.int32)

            def fill(lo: int) -> None:
                records = _tfds.read(self.name, self._source, range(lo, min(lo + _CHUNK, len(out))))
                out[lo : lo + _CHUNK] = _tfds.labels(self.name, self._source, records)

            _sets.for_each(fill, range(0, len(out), _CHUNK))

        labels = self._kept("labels", "labels", read)
        return labels if self._chosen is None else labels[self._chosen]

    def measure(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [C] mean and std of the pixels / 255, of all examples: decoded once, then kept in the array cache."""

        def read(draft: _cache.Draft) -> None:
            _log.info("decoding %s once to measure its mean and std", self.name)
            out, lock = draft.array("levels", (self.input_shape[2], 256), np.int64), threading.Lock()

            def count(lo: int) -> None:
                counts = count_levels(self.fetch(np.arange(lo, min(lo + _CHUNK, len(self))))[0])
                with lock:
                    out[...] += counts

            _sets.for_each(count, range(0, len(self), _CHUNK))

        which = f"levels-{self._image_size or 'native'}" + ("" if self.crop == "whole" else f"-{self.crop}")
        if self._chosen is not None:
            which += f"-{hashlib.sha256(np.asarray(self._chosen, np.int64).tobytes()).hexdigest()[:12]}"
        mean, std = measure_levels(self._kept(which, "levels", read))
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def _kept(self, which: str, array: str, read: Any) -> np.ndarray:
        """An array of a pass over the split: from the cache, else by `read`, which writes it there."""
        folder, place = self._cache
        entry = folder / f"{self.name.replace('/', '--')}-{which}-{self.split}-{place}"
        try:
            found = _cache.read(entry, self._digest)
        except _cache.Damaged:
            found = None
        if found is not None:
            return np.asarray(found[0][array])
        with _cache.writing(entry) as draft:
            read(draft)
            draft.meta = {"name": self.name, "digest": self._digest}
            return np.array(draft.arrays[array])

    def fetch(self, indices: np.ndarray, entropy: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C], labels int32 [n]; the crop of example i depends on (*entropy, i) alone."""
        indices = np.asarray(indices) if self._chosen is None else self._chosen[indices]
        records = _tfds.read(self.name, self._source, indices)
        images = np.empty((len(records), *self.input_shape), np.uint8)
        for j, (index, record) in enumerate(zip(indices, records, strict=True)):
            with _images.decoding(f"image {index} of {self.name} ({self.split})"):
                images[j] = self._decode(value(record, self._source.inputs.key), (*entropy, int(index)))
        return images, _tfds.labels(self.name, self._source, records)

    def _decode(self, encoded: bytes, entropy: tuple[int, ...]) -> np.ndarray:
        if self.crop == "whole":
            return _images.decode_as(encoded, self.input_shape, self._image_size)
        image, size = _images.decode(encoded, self.input_shape[2]), self.input_shape[0]
        if self.crop == "random":
            image = _images.random_resized_crop(image, size, np.random.default_rng([_AUGMENT, *entropy]))
        else:
            image = _images.resize_center_crop(image, size, test_resize(size))
        return _images.to_array(image)


def stream(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: int | None = IMAGE_SIZE,
    crop: Crop | None = None,
) -> ImageStream:
    """Open a prepared TFDS set of images for reading in batches; nothing is decoded yet.

    Args:
        name, data_dir: as for `load`; a missing set is prepared where TFDS can.
        split: "train" or "test" (which is `validation` for ImageNet).
        cache_dir: where passes over the set keep labels, mean and std.
        image_size: side of the images; None, with "whole" alone: as they are, all of one size.
        crop: "random", by default of "train": a random-resized-crop (8..100 % of the area, aspect 3/4..4/3) to
            `image_size`; flip them on the device with `augment(kind="flip")`. "middle", by default of "test": the
            shorter side resized to `image_size` * 256/224 and the middle cropped. "whole": as `load` has them in
            memory, the shorter side resized to `image_size` and the middle kept. All bilinear, as torchvision. Images
            are decoded as by `load`.

    Raises:
        DataError: as for `load`.
        ValueError: `split` or `crop` is none of these, or `image_size` is not positive.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    crop = ("random" if split == "train" else "middle") if crop is None else crop
    if crop not in get_args(Crop):
        raise ValueError(f"crop must be one of {', '.join(get_args(Crop))}, got {crop!r}")
    if image_size is None and crop != "whole":
        raise ValueError(f'image_size must be given with crop={crop!r}, got None, which goes with "whole"')
    _sets.check_image_size(image_size)
    _tfds.check_name(name)
    _images.pillow()
    directory, asked = _tfds.root(data_dir)
    folder = _tfds.find(name, directory, asked)
    source = _tfds.open_split(name, folder, split)
    if not isinstance(source.inputs, Images):
        raise DataError(f"{name} in {folder} has no images; only they are streamed, other sets are loaded whole")
    if image_size is None and None in source.inputs.shape:
        raise DataError(f"the images of {name} differ in size: give image_size")
    return ImageStream(
        name,
        split,
        source,
        image_size=image_size,
        crop=crop,
        cache=(_cache.directory(cache_dir), _tfds.place(directory, asked)),
        digest=_tfds.digest(folder),
    )

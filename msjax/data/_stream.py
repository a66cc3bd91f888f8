"""Sets that do not fit in memory: decoded and cropped on the host by threads, in the order asked for."""

import os
from typing import Any

import jax
import numpy as np

from msjax.data import _cache, _images, _registry, _sets, _tfds
from msjax.data._error import DataError
from msjax.data._records import Images, value

IMAGE_SIZE = 224  # of the crops, by default
_AUGMENT = 3  # keeps this stream of random numbers apart from those of _clients


def test_resize(size: int) -> int:
    """The shorter side to which test images are resized before the middle, `size` pixels wide, is cropped."""
    return round(size * 256 / 224)


class ImageStream:
    """One split of a prepared TFDS set, a `Split`; made by `stream`, read by `batches`.

    Attributes:
        name, split: what it was opened as.
        num_classes: number of classes.
        classes: their names, where the set says them.
        input_shape: (size, size, C) of what `batches` yields.
        mean, std: float32 [C], of pixels / 255; for `normalize`. Published values; ImageNet's for sets that have none.
        random_crop: whether images are cropped at random (training) or in the middle (test).
    """

    in_memory = False

    def __init__(
        self,
        name: str,
        split: str,
        source: _tfds.Records,
        *,
        image_size: int,
        random_crop: bool,
        labels_entry: Any,
        digest: str,
    ):
        self.name, self.split, self.random_crop = name, split, random_crop
        self.num_classes = source.num_classes
        self.classes = source.classes or None
        self.input_shape = (image_size, image_size, source.inputs.shape[2])
        known = _registry.find(name if _registry.find(name).mean else "imagenet2012")
        channels = self.input_shape[2]
        self.mean, self.std = (
            np.resize(np.asarray(v if len(v) == channels else np.mean(v), np.float32), channels)
            for v in (known.mean, known.std)
        )
        self._source, self._labels_entry, self._digest = source, labels_entry, digest

    def __len__(self) -> int:
        return len(self._source.records)

    @property
    def input_like(self) -> jax.ShapeDtypeStruct:
        """uint8 (size, size, C)."""
        return jax.ShapeDtypeStruct(self.input_shape, np.uint8)

    @property
    def label_like(self) -> jax.ShapeDtypeStruct:
        """int32 ()."""
        return jax.ShapeDtypeStruct((), np.int32)

    def labels(self) -> np.ndarray:
        """int32 [N] labels of the whole split; read once (every record is), then kept in the array cache."""
        try:
            found = _cache.read(self._labels_entry, self._digest)
        except _cache.Damaged:
            found = None
        if found is None:
            with _cache.writing(self._labels_entry) as draft:
                out = draft.array("labels", (len(self),), np.int32)

                def fill(lo: int) -> None:
                    records = _tfds.read(self.name, self._source, range(lo, min(lo + 500, len(self))))
                    out[lo : lo + 500] = _tfds.labels(self.name, self._source, records)

                _sets.for_each(fill, range(0, len(self), 500))
                draft.meta = {"name": self.name, "digest": self._digest}
            return np.array(out)
        return np.asarray(found[0]["labels"])

    def fetch(self, indices: np.ndarray, entropy: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, size, size, C], labels int32 [n]; the crop of example i depends on (*entropy, i) alone."""
        size = self.input_shape[0]
        records = _tfds.read(self.name, self._source, indices)
        images = np.empty((len(records), *self.input_shape), np.uint8)
        for j, (index, record) in enumerate(zip(indices, records, strict=True)):
            with _images.decoding(f"image {index} of {self.name} ({self.split})"):
                image = _images.decode(value(record, self._source.inputs.key), self.input_shape[2])
                if self.random_crop:
                    image = _images.random_resized_crop(
                        image, size, np.random.default_rng([_AUGMENT, *entropy, int(index)])
                    )
                else:
                    image = _images.resize_center_crop(image, size, test_resize(size))
                images[j] = _images.to_array(image)
        return images, _tfds.labels(self.name, self._source, records)


def stream(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: int = IMAGE_SIZE,
    random_crop: bool | None = None,
) -> ImageStream:
    """Open a prepared TFDS set of images for reading in batches; nothing is decoded yet.

    Training images get a random-resized-crop (8..100 % of the area, aspect 3/4..4/3) to `image_size`; flip them on the
    device with `augment(kind="flip")`. Test images get their shorter side resized to `image_size` * 256/224 and the
    middle cropped. Both bilinear, as torchvision. Images are decoded as by `load`.

    Args:
        name, data_dir: as for `load`; a missing set is prepared where TFDS can.
        split: "train" or "test" (which is `validation` for ImageNet).
        cache_dir: where `ImageStream.labels` keeps the labels.
        random_crop: default: for "train" only.

    Raises:
        DataError: as for `load`.
        ValueError: `split` is neither, or `image_size` is not positive.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    _sets.check_image_size(image_size)
    _tfds.check_name(name)
    _images.pillow()
    directory, asked = _tfds.root(data_dir)
    folder = _tfds.find(name, directory, asked)
    source = _tfds.open_split(name, folder, split)
    if not isinstance(source.inputs, Images):
        raise DataError(f"{name} in {folder} has no images; only they are streamed, other sets are loaded whole")
    digest = _tfds.digest(folder)
    entry = f"{name.replace('/', '--')}-labels-{split}-{_tfds.place(directory, asked)}"
    return ImageStream(
        name,
        split,
        source,
        image_size=image_size,
        random_crop=split == "train" if random_crop is None else random_crop,
        labels_entry=_cache.directory(cache_dir) / entry,
        digest=digest,
    )

"""Sets that do not fit in memory: decoded and cropped on the host by threads, in the order asked for."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from msjax.data import _cache, _images, _sets, _tfds
from msjax.data._error import DataError
from msjax.data._records import Images

_AUGMENT = 3  # keeps this stream of random numbers apart from those of _clients


class ImageStream:
    """One split of a prepared TFDS set with random access; made by `stream`, read by `batches`.

    Attributes:
        name, split: what it was opened as.
        num_classes: number of classes.
        input_shape: (size, size, C) of what `batches` yields.
        mean, std: float32 [C], of pixels / 255; for `normalize`. Published values; ImageNet's for sets that have none.
        random_crop: whether images are cropped at random (training) or in the middle (test).
    """

    def __init__(
        self,
        name: str,
        split: str,
        source: _tfds.Split,
        *,
        image_size: int,
        random_crop: bool,
        labels_entry: Any,
        digest: str,
    ):
        self.name, self.split, self.random_crop = name, split, random_crop
        self.num_classes = source.num_classes
        self.input_shape = (image_size, image_size, source.inputs.shape[2])
        mean, std = _sets.STATISTICS.get(name, _sets.STATISTICS["imagenet2012"])
        channels = self.input_shape[2]
        self.mean, self.std = (
            np.resize(np.asarray(v if len(v) == channels else np.mean(v), np.float32), channels) for v in (mean, std)
        )
        self._source, self._labels_entry, self._digest = source, labels_entry, digest

    def __len__(self) -> int:
        return len(self._source.records)

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

    def fetch(self, indices: np.ndarray, entropy: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, size, size, C], labels int32 [n]; the crop of example i depends on (*entropy, i) alone."""
        size = self.input_shape[0]
        records = _tfds.read(self.name, self._source, indices)
        images = np.empty((len(records), *self.input_shape), np.uint8)
        for j, (index, record) in enumerate(zip(indices, records, strict=True)):
            try:
                image = _images.decode(record[self._source.inputs.key], self.input_shape[2])
                if self.random_crop:
                    image = _images.random_resized_crop(
                        image, size, np.random.default_rng([_AUGMENT, *entropy, int(index)])
                    )
                else:
                    image = _images.resize_center_crop(image, size, round(size * 256 / 224))
            except OSError as error:
                raise DataError(f"image {index} of {self.name} ({self.split}) cannot be decoded: {error}") from error
            images[j] = _images.to_array(image)
        return images, _tfds.labels(self.name, self._source, records)


def stream(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: int = 224,
    random_crop: bool | None = None,
) -> ImageStream:
    """Open a prepared TFDS set for reading in batches; nothing is decoded yet.

    Training images get a random-resized-crop (8..100 % of the area, aspect 3/4..4/3) to `image_size`; flip them on the
    device with `augment(kind="flip")`. Test images get their shorter side resized to `image_size` * 256/224 and the
    middle cropped. Both bilinear, as torchvision.

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


def batches(
    source: ImageStream | tuple[np.ndarray, np.ndarray],
    indices: np.ndarray,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (images uint8 [*batch, H, W, C], labels int32 [*batch]) for each step of an epoch.

    `source` is an `ImageStream`, or a pair (images, labels) of arrays such as `(ds.train_inputs, ds.train_labels)`;
    pairs come as they are. Random crops depend on (seed, epoch, step, index) alone: not on the number of threads, on
    `start`, nor on which other examples are in the batch.

    Args:
        indices: int [steps, *batch], for example [steps, client, example].
        seed, epoch: choose the crops.
        start: first step to yield, to go on where an interrupted run stopped.
        threads: how many decode; default: as many as cores.
        prefetch: how many steps are read ahead of the consumer.

    Raises:
        IndexError: an index is negative or too large.
        DataError: reading or decoding fails.
        ValueError: `start` is out of range, or `indices` has no batch axis.
    """
    indices = np.asarray(indices)
    count = len(source) if isinstance(source, ImageStream) else len(source[1])
    if indices.ndim < 2 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"indices must be integers [steps, *batch], got {indices.dtype} {indices.shape}")
    if not 0 <= start <= len(indices):
        raise ValueError(f"start must be in 0..{len(indices)} (the number of steps), got {start}")
    if indices.size and (indices.min() < 0 or indices.max() >= count):
        raise IndexError(f"indices must be in 0..{count - 1}, got {indices.min()}..{indices.max()}")
    if isinstance(source, ImageStream):
        return _streamed(source, indices, (seed, epoch), start, threads or os.cpu_count() or 1, prefetch)
    images, labels = source
    return ((images[i], labels[i]) for i in indices[start:])


def _streamed(
    source: ImageStream, indices: np.ndarray, entropy: tuple[int, int], start: int, threads: int, prefetch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of a step as tasks of a pool, `prefetch` steps ahead; leaving the loop early cancels the rest."""
    batch_shape = indices.shape[1:]
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future]] = deque()
        steps = iter(range(start, len(indices)))

        def submit() -> None:
            if (step := next(steps, None)) is not None:
                flat = indices[step].reshape(-1)
                pending.append(
                    [pool.submit(source.fetch, flat[i : i + 16], (*entropy, step)) for i in range(0, len(flat), 16)]
                )

        try:
            for _ in range(max(prefetch, 0) + 1):
                submit()
            while pending:
                parts = [future.result() for future in pending.popleft()]
                submit()
                yield (
                    np.concatenate([x for x, _ in parts]).reshape(*batch_shape, *source.input_shape),
                    np.concatenate([y for _, y in parts]).reshape(batch_shape),
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

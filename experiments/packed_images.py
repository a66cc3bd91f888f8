"""Images of one size, packed without loss in files to carry along: NumPy and the standard library alone.

CIFAR-10's 60,000 images are 176 MiB of pixels; like this they are 95. Each pixel is predicted from the three
above and to the left of it (the median predictor of JPEG-LS), red and blue as differences from green; what the
prediction misses goes through LZMA.
"""

import lzma
import pathlib
import zlib
from collections.abc import Iterable

import numpy as np

PRESET = 6  # of LZMA; 1 is four times faster and makes a tenth more
SPLITS = ("train", "test")


def save(path: pathlib.Path, **splits: tuple[np.ndarray, np.ndarray]) -> None:
    """Writes an .npz file of splits: (images, labels) of "train" and "test", or one of them."""
    arrays = {}
    for split, (images, labels) in splits.items():
        arrays |= {f"{split}_images": pack(images), f"{split}_labels": labels.astype(np.uint8)}
        arrays[f"{split}_crc32"] = np.uint32(zlib.crc32(np.ascontiguousarray(images)))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def load(paths: Iterable[pathlib.Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the images and labels of several files' splits, one file after the other.

    Raises:
      ValueError: a file's images are not those that were packed.
    """
    found = {split: [] for split in SPLITS}
    for path in paths:
        with np.load(path) as file:
            for split in SPLITS:
                if f"{split}_images" in file:
                    labels = file[f"{split}_labels"]
                    images = unpack(file[f"{split}_images"], len(labels))
                    if zlib.crc32(images) != file[f"{split}_crc32"]:
                        raise ValueError(f"{path} must hold the {split} images that were packed, got others")
                    found[split].append((images, labels.astype(np.int32)))
    return {split: tuple(map(np.concatenate, zip(*parts, strict=True))) for split, parts in found.items() if parts}


def pack(images: np.ndarray) -> np.ndarray:
    """Returns images, uint8 (n, side, side, 3), as bytes, uint8 (b,)."""
    red, green, blue = np.moveaxis(images.astype(np.int16), (3, 0), (0, 3))
    planes = [plane - _prediction(plane) for plane in (green, red - green, blue - green)]
    missed = np.stack(planes).transpose(0, 3, 1, 2).astype(np.uint8)  # image by image; modulo 256
    return np.frombuffer(lzma.compress(missed.tobytes(), preset=PRESET), np.uint8)


def unpack(packed: np.ndarray, count: int) -> np.ndarray:
    """Returns the `count` images of `pack`."""
    missed = np.frombuffer(lzma.decompress(packed.tobytes()), np.uint8)
    if not count:
        return np.zeros((0, 0, 0, 3), np.uint8)
    side = round((missed.size / 3 / count) ** 0.5)
    missed = np.ascontiguousarray(missed.reshape(3, count, side, side).transpose(0, 2, 3, 1)).astype(np.int16)
    green = _undo(missed[0], 0)
    red, blue = (_undo(plane, green) + green for plane in missed[1:])
    return np.stack([red, green, blue], axis=-1).astype(np.uint8).transpose(2, 0, 1, 3).copy()


def _prediction(plane):
    """The prediction of each pixel of (rows, columns, n)."""
    left, above, corner = (np.zeros_like(plane) for _ in range(3))
    left[:, 1:], above[1:], corner[1:, 1:] = plane[:, :-1], plane[:-1], plane[:-1, :-1]
    left[1:, 0] = corner[1:, 0] = above[1:, 0]
    above[0] = left[0]
    return _median(left, above, corner)


def _median(left, above, corner):
    return np.clip(left + above - corner, np.minimum(left, above), np.maximum(left, above))


def _undo(missed, added):
    """The plane of what its prediction missed, modulo 256; the plane plus `added` is in 0..255."""
    added = np.broadcast_to(added, missed.shape)
    plane = np.zeros_like(missed)
    rows, columns, _ = plane.shape
    for row in range(rows):
        for column in range(columns):
            above = plane[row - 1, column] if row else None
            left = plane[row, column - 1] if column else above
            if row == 0 or column == 0:
                guess = np.int16(0) if left is None else left
            else:
                guess = _median(left, above, plane[row - 1, column - 1])
            plane[row, column] = ((guess + missed[row, column] + added[row, column]) & 255) - added[row, column]
    return plane

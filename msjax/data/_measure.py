"""Mean and standard deviation of a split, for `normalize`."""

from collections.abc import Callable

import numpy as np

from msjax.data._error import DataError


def measure_images(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Per-channel mean and std of pixels / 255, exactly, from a histogram a channel."""
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for lo in range(0, len(images), 1024):
        counts += count_levels(images[lo : lo + 1024])
    return measure_levels(counts)


def count_levels(images: np.ndarray) -> np.ndarray:
    """int64 (C, 256): how many pixels of uint8 images (N, H, W, C) have each level."""
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])


def measure_levels(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Per-channel mean and std of pixels / 255 of what `count_levels` counted."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    levels = np.arange(256) / 255
    mean = share @ levels
    std = np.sqrt(share @ levels**2 - mean**2)
    return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # a constant channel must not divide by zero


def measure_columns(table: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and std of the columns; 1 as that of a constant."""
    mean, std = table.mean(0, np.float64), table.std(0, np.float64)
    constant = table.min(0) == table.max(0)  # whose mean may be rounded
    return np.where(constant, table[0], mean).tolist(), np.where(constant, 1, std).tolist()


def measure_last_axis(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of float inputs (N, ..., C) for each of the last axis, 1 for a constant; in pieces, in float64."""
    width, rows = inputs.shape[-1], max(1, (1 << 22) // max(1, inputs[0].size))

    def total(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        pieces = (inputs[lo : lo + rows] for lo in range(0, len(inputs), rows))
        sums = [function(piece.reshape(-1, width).astype(np.float64)) for piece in pieces]
        return np.sum(sums, axis=0) / (inputs.size // width)

    with np.errstate(over="ignore", invalid="ignore"):  # told of below
        mean = total(lambda x: x.sum(0))
        std = np.sqrt(total(lambda x: ((x - mean) ** 2).sum(0)))
    least, most = (function(function(inputs, axis=0).reshape(-1, width), axis=0) for function in (np.min, np.max))
    mean, std = np.where(least == most, least, mean), np.where(least == most, 0, std)  # whose mean may be rounded
    if not np.isfinite([mean, std]).all():
        raise DataError(f"inputs must have a finite mean and std, got numbers up to {np.abs(inputs).max():.9g}")
    return mean, np.where(std > 0, std, 1)

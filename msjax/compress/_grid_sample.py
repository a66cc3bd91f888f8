"""Bytes from everywhere in a grid of codes, with their neighbours: what estimates of its classes are made of."""

from typing import Any, NamedTuple

import numpy as np

from msjax.compress import _contexts

_RUN, _LEAST_RUNS = 32, 2
"""Bytes of a run, at most; and the fewest runs of an image that are taken, if any are."""


class GridSample(NamedTuple):
    """Runs of neighbouring bytes of a pixel: R of each of S samples, of `width` bytes."""

    grid: _contexts.Grid
    samples: np.ndarray
    """The samples' numbers, int32 (S, 1)."""
    places: np.ndarray
    """Places in `_contexts.order_of` of the pixels, int32 (S, R)."""
    runs: np.ndarray
    """Which of a pixel's runs, int32 (S, R)."""
    width: int

    def values_and_neighbours(self, buffer: Any) -> tuple[Any, Any, Any]:
        """Returns the sample of a buffer in this grid, and the same bytes of the pixels to the left and above.

        Args:
          buffer: uint8 (b,), of JAX or NumPy.

        Returns:
          Three arrays, uint8 (S, R, width).
        """
        grid, order = self.grid, _contexts.order_of(self.grid.height, self.grid.width)
        rows = buffer.reshape(grid.samples, grid.pixels, -1, self.width)
        near = (self.places, order.left[self.places], order.above[self.places])
        values, left, above = (rows[self.samples, order.pixels[places], self.runs] for places in near)
        return values, left, above


def grid_sample(grid: _contexts.Grid, nbytes: int) -> GridSample:
    """Returns where about `nbytes` bytes are, of as many samples as can be.

    A few samples may have nearly all that is not zero, as those of gradients do: so at least some bytes of every sample
    are better than many of some. Each sample has other pixels, and all are as likely.
    """
    width = max(w for w in range(1, _RUN + 1) if grid.pixel_bytes % w == 0)
    width = grid.pixel_bytes if width < _RUN // 4 else width
    a_pixel = grid.pixel_bytes // width
    samples = min(grid.samples, -(-nbytes // (_LEAST_RUNS * width)))
    units = grid.pixels * a_pixel
    runs = min(units, -(-nbytes // (samples * width)))
    which = np.arange(samples) * grid.samples // samples
    # Even along both axes (the plane's quasirandom sequence of the plastic number).
    within = (np.arange(samples)[:, None] * 0.7548776662 + np.arange(runs) * 0.5698402910) % 1
    # All of them in order, or one at a random place in each of as many equal parts.
    unit = ((np.arange(runs) + within * (runs < units)) * (units / runs)).astype(np.int32)
    places, run = np.divmod(unit, np.int32(a_pixel))
    return GridSample(grid, which.astype(np.int32)[:, None], places, run, width)

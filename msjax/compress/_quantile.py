"""Quantile quantization: levels where a normal distribution has its values ("normal float")."""

import dataclasses
import functools
import statistics

import jax.numpy as jnp
import numpy as np

from msjax.compress import _select
from msjax.compress._options import check_integer
from msjax.compress._scaled import ScaledCodec

_COMPARED = 6  # bits up to which a value is compared with every threshold, which a CPU does faster


@dataclasses.dataclass(frozen=True, repr=False)
class Quantile(ScaledCodec):
    """Every value to the nearest of 2^bits levels at a normal distribution's quantiles, times the largest magnitude.

    The levels are those of NormalFloat, so that each is met about as often where values are normal: 2^(bits − 1)
    above 0, 0 itself, and 2^(bits − 1) − 1 below; the outermost are ±1. Of n levels on one side the i-th from 0 is
    Φ⁻¹(½ + (q − ½)·i/n) / Φ⁻¹(q), with Φ the normal distribution's and q = 1 − (1/(2·2^bits) + 1/(2·2^bits − 2))/2.
    Behind a ReLU nearly half of them are unused.

    Payload: ⌈d·bits/8⌉ bytes of the levels' numbers from the lowest, and 4 for the largest magnitude. Arithmetic is
    float32; the result has the input's dtype.

    Attributes:
      bits: of a code, 2 to 8: with one bit there would be no level below 0.
      granularity: see `VectorCodec`. NF4 takes blocks of 64 values of a network's weights; here all that is compressed
        together has one scale.

    0 and the values of the largest magnitude are exact, so a constant array is. NaN or ±Inf anywhere make everything
    decode to NaN. A value halfway between two levels takes the lower one. Magnitudes below 2⁻¹²⁶ may count as 0. Bias:
    biased; the error of a value is at most half of the gap between its neighbours. Source: the levels of NF4 (arXiv
    2305.14314, appendix E) at any number of bits; named as a codec of features by the later program of arXiv
    2408.13787's authors.

    Raises:
      ValueError: `bits` is no integer in 2..8.

    >>> import jax.numpy as jnp
    >>> Quantile(bits=2).roundtrip(jnp.array([-2.0, -0.3, 0.1, 0.9, 1.8]))
    Array([-2.        ,  0.        ,  0.        ,  0.87163633,  2.        ],      dtype=float32)
    """

    bits: int = 3

    def __post_init__(self):
        super().__post_init__()
        check_integer("bits", self.bits, 2, 8)

    @property
    def _width(self) -> int:
        return self.bits

    def _levels(self):
        return _normal_float(self.bits)

    @property
    def _middles(self) -> np.ndarray:
        levels = self._levels()
        return (levels[1:] + levels[:-1]) * np.float32(0.5)

    def _quantize(self, x, scale):
        thresholds = jnp.asarray(self._middles) * scale
        if self.bits <= _COMPARED:
            return sum(((x > threshold).astype(jnp.uint8) for threshold in thresholds), jnp.zeros(x.shape, jnp.uint8))
        return _select.count_below(thresholds, x, unroll=True).astype(jnp.uint8)

    def _quantize_numpy(self, x, scale):
        return np.searchsorted(self._middles * scale, x)


@functools.cache
def _normal_float(bits):
    """float32 (2^bits,): the levels of NormalFloat, ascending."""
    offset = 1 - (1 / (2 << bits) + 1 / ((2 << bits) - 2)) / 2  # of the outermost, so that none is infinite
    quantile = statistics.NormalDist().inv_cdf

    def above(count):
        return [quantile(0.5 + (offset - 0.5) * i / count) / quantile(offset) for i in range(1, count + 1)]

    half = 1 << (bits - 1)
    levels = np.float32([-level for level in above(half - 1)[::-1]] + [0.0] + above(half))
    levels.flags.writeable = False
    return levels

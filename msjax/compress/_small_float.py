"""Floating-point numbers of few bits."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from msjax.compress._options import check_integer
from msjax.compress._scaled import ScaledCodec


@dataclasses.dataclass(frozen=True, repr=False)
class SmallFloat(ScaledCodec):
    """Every value as a float of few bits, scaled so that the largest magnitude becomes the largest number there is.

    A code is a sign, exponent bits E and mantissa bits M, from the highest bit down. In units of the smallest number it
    stands for M where E = 0 (subnormal numbers), else for (2^mantissa_bits + M)·2^(E − 1); no code is NaN or Inf.
    e2m1, the default, has 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives, as FP4 in the OCP's Microscaling formats.

    Payload: ⌈d·(1 + exponent_bits + mantissa_bits)/8⌉ bytes, and 4 for the largest magnitude. Arithmetic is float32;
    the result has the input's dtype.

    Attributes:
      exponent_bits: at least 1.
      mantissa_bits: at least 0; with sign and exponent 8 bits at most.
      granularity: see `VectorCodec`.

    Rounds to nearest, half to even, to float32's precision. 0 and the values of the largest magnitude are exact, so a
    constant array is; −0 becomes 0. NaN or ±Inf anywhere make everything decode to NaN. Magnitudes below 2⁻¹²⁶ may
    count as 0. Bias: biased; the error of a value is at most 2^−(mantissa_bits + 1) of it, or half of the smallest
    number. Source: named as a codec of features by the later program of arXiv 2408.13787's authors; the format is
    FP4's, FP6's and FP8's of arXiv 2310.10537, but that FP8 keeps codes for NaN, and e5m2 for Inf.

    Raises:
      ValueError: a number of bits is out of range.

    >>> import jax.numpy as jnp
    >>> SmallFloat().roundtrip(jnp.array([6.0, -5.2, 2.4, 0.8, -0.3, 0.2]))
    Array([ 6. , -6. ,  2. ,  1. , -0.5,  0. ], dtype=float32)
    """

    exponent_bits: int = 2
    mantissa_bits: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_integer("exponent_bits", self.exponent_bits, 1, 7)
        check_integer("mantissa_bits", self.mantissa_bits, 0, 7 - self.exponent_bits)

    @property
    def _width(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def _largest(self) -> int:
        """The largest number, in units of the smallest."""
        return ((2 << self.mantissa_bits) - 1) << ((1 << self.exponent_bits) - 2)

    def _levels(self):
        return _numbers(self.exponent_bits, self.mantissa_bits, self._largest)

    def _quantize(self, x, scale):
        # By a power of two first, which rounds nothing and keeps all that follows in range; then with one rounding.
        octave = jnp.minimum((lax.bitcast_convert_type(scale, jnp.int32) >> 23) - 127, 126)
        octave = jnp.maximum(octave, -126)
        down = lax.bitcast_convert_type((127 - octave) << 23, jnp.float32)
        units = jnp.abs(x * down) * (jnp.float32(self._largest) / (scale * down))
        shift = jnp.maximum((lax.bitcast_convert_type(units, jnp.int32) >> 23) - (127 + self.mantissa_bits), 0)
        steps = jnp.round(units * lax.bitcast_convert_type((127 - shift) << 23, jnp.float32)).astype(jnp.int32)
        # The leading bit of a normal number adds one to its exponent; so does a mantissa that is rounded up too far.
        codes = (shift << self.mantissa_bits) + steps
        sign = ((x < 0) & (codes > 0)).astype(jnp.int32) << (self._width - 1)
        return (codes | sign).astype(jnp.uint8)

    def _quantize_numpy(self, x, scale):
        octave = np.clip((np.asarray(scale).view(np.int32) >> 23) - 127, -126, 126)
        down = np.float32(2.0) ** np.float32(-octave)
        units = np.abs(x * down) * (np.float32(self._largest) / (scale * down))
        shift = np.maximum((units.view(np.int32) >> 23) - np.int32(127 + self.mantissa_bits), 0)
        steps = np.rint(units * ((127 - shift) << 23).view(np.float32)).astype(np.int32)
        codes = (shift << self.mantissa_bits) + steps
        return codes | (((x < 0) & (codes > 0)).astype(np.int32) << (self._width - 1))


@functools.cache
def _numbers(exponent_bits, mantissa_bits, largest):
    """float32 (2^(1 + exponent_bits + mantissa_bits),): what each code stands for, by the largest number."""
    codes = range(1 << (exponent_bits + mantissa_bits))
    split = [divmod(code, 1 << mantissa_bits) for code in codes]
    units = [m if e == 0 else ((1 << mantissa_bits) + m) << (e - 1) for e, m in split]
    numbers = np.float32([n / largest for n in units])
    numbers = np.concatenate([numbers, np.float32(0) - numbers])
    numbers.flags.writeable = False
    return numbers

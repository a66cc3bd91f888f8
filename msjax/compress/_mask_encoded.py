"""MS, mask-encoded sparsification: the paper's codec."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax.compress import _bits, _finite, _numpy, _select
from msjax.compress._arrays import shaped
from msjax.compress._options import check_bits, check_choice, check_ratio
from msjax.compress._vector_codec import VectorCodec


class MaskPayload(NamedTuple):
    values: jax.Array
    """(k,) the kept values in the order of their positions, in the dtype of the input."""
    codes: jax.Array
    """uint8 (⌈d·bits/8⌉,) packed codes, least significant bits first; all ones marks a kept value."""
    signs: jax.Array
    """uint8 (⌈d/8⌉,) packed signs, 1 where a coded value is negative; (0,) when unsigned."""


@dataclasses.dataclass(frozen=True, repr=False)
class MaskEncoded(VectorCodec):
    """MS: the largest values exactly, every other one as a small integer (Algorithms 1 and 2, arXiv 2408.13787).

    k = ⌊(1 − ratio)·d⌋ values are kept; the smallest of them is τ. Every other value x gets the code x·(2^bits −
    1)/τ, rounded and clamped to 0 … 2^bits − 2, and decodes to code·τ/(2^bits − 1). Neither positions nor τ are sent.

    Payload: 4k + ⌈d·bits/8⌉ bytes for float32 (2.32 bits an element by default, 13.8×), 2k + ⌈d·bits/8⌉ for the
    16-bit types, whose values travel in 16 bits; `signed` adds ⌈d/8⌉. Arithmetic is float32; the result has the
    input's dtype.

    Attributes:
      ratio: the part of the values that is not kept, in [0, 1).
      bits: bits of a code, 1 to 8. With 1, MS is top-k with zeros.
      rounding: "nearest" (half to even, clamped), as the paper's program does and as its figures need, or "floor", as
        Algorithm 1 is written.
      signed: False ranks by value, for features that are not negative (after a ReLU): a negative value that is not
        kept decodes to 0. True ranks by magnitude and spends one more bit on the sign; it decodes to the same, and the
        bit is wasted, where no negative value reaches half a step, τ/6 with 2 bits, as behind a GELU in our studies.
      granularity: see `VectorCodec`.

    Corners that the paper leaves open:
      - Ties at τ: exactly k values are kept, the first ones by position; the others get the largest code, 2^bits − 2.
      - Fewer than k positive values: zeros fill the rest of the k, τ ≤ 0, every other code is 0 and decodes to 0.
      - k is at least 1 (the paper's formula gives 0 for d < 1/(1 − ratio)); an empty array has an empty payload.
      - NaN ranks above +Inf. Both are kept exactly while there are at most k; from k of them on, τ is not finite and
        what is not kept decodes to NaN: a diverged network shows. −Inf is a negative value.
      - Subnormal numbers may count as 0.

    Bias: biased, toward 0 with "floor"; the error of a value is at most τ/(2^bits − 1), and at most the value itself.
    The squared error is bounded by `mask_encoded_error_bound`.

    >>> import jax.numpy as jnp
    >>> codec = MaskEncoded(ratio=0.75, bits=2)
    >>> h = jnp.array([2.2, 0.8, 1.2, 0.4, 1.8, 0.2, 3.1, 2.0])
    >>> codec.encode(h).values, codec.payload_bytes(h)
    (Array([2.2, 3.1], dtype=float32), 10)
    """

    ratio: float = 0.99
    bits: int = 2
    rounding: Literal["nearest", "floor"] = "nearest"
    signed: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_ratio(self.ratio)
        check_bits(self.bits)
        check_choice("rounding", self.rounding, ("nearest", "floor"))
        check_choice("signed", self.signed, (False, True))

    @property
    def _top(self) -> int:
        """2^bits − 1: the code of a kept value, and the number of steps from 0 to τ."""
        return 2**self.bits - 1

    def _vector_like(self, d, dtype):
        values, signs = _select.num_kept(self.ratio, d), _bits.packed_bytes(d, 1) if self.signed else 0
        return MaskPayload(shaped(values, dtype), shaped(_bits.packed_bytes(d, self.bits)), shaped(signs))

    def _quantize(self, x):
        """(what is kept, codes of the others as float32) of the vector `x`, d ≥ 1."""
        score = _select.score(x, by_magnitude=self.signed)
        top = _select.select(x, _select.num_kept(self.ratio, x.size), by_magnitude=self.signed)
        # Below 0 the code is 0, and above τ a value is kept: there, what follows could be out of range.
        tau = jnp.maximum(top.kth, 0)
        score = jnp.clip(score, 0, tau)
        score, tau = (_finite.lowered(part, top.kth > _finite.LARGE) for part in (score, tau))
        # Multiplied before it is divided: in this order float32 gives Figure 1's codes. And by a divisor a value, since
        # XLA may multiply by the inverse of one for all.
        steps = score * jnp.float32(self._top) / jnp.where(score > 0, tau, jnp.float32(1))
        steps = jnp.round(steps) if self.rounding == "nearest" else jnp.floor(steps)
        # The comparison, not a maximum, so that NaN (τ not finite) becomes code 0.
        codes = jnp.where((steps > 0) & (tau > 0), jnp.minimum(steps, jnp.float32(self._top - 1)), jnp.float32(0))
        return top, codes

    def _levels(self, codes, tau):
        """What float32 codes decode to. One multiplication by a scalar: the same bits in every program."""
        # 0·∞ = NaN is meant: without a finite τ nothing is known of the values that are not kept.
        return codes * (jnp.maximum(tau, 0) * jnp.float32(1 / self._top))

    def _encode_vector(self, x, key):
        if x.size == 0:
            return MaskPayload(x, jnp.zeros(0, jnp.uint8), jnp.zeros(0, jnp.uint8))
        top, codes = self._quantize(x)
        codes = jnp.where(_bits.unpack_words(top.words, x.size), jnp.uint8(self._top), codes.astype(jnp.uint8))
        packed = _bits.pack(codes, self.bits)
        signs = jnp.zeros(0, jnp.uint8)
        if self.signed:
            # Read from the packed codes: XLA's CPU would keep the float32 steps in memory for a second use.
            codes = _bits.unpack(packed, self.bits, x.size)
            signs = _bits.pack(((x < 0) & (codes > 0) & (codes < self._top)).astype(jnp.uint8), 1)
        return MaskPayload(x[top.positions], packed, signs)

    def _encode_vector_numpy(self, x):
        if x.size == 0:
            return MaskPayload(x, np.zeros(0, np.uint8), np.zeros(0, np.uint8))
        scores = _numpy.score(x, by_magnitude=self.signed)
        kept, tau = _numpy.largest(scores, _select.num_kept(self.ratio, x.size))
        codes, scale = np.zeros(x.size, np.uint8), _numpy.scale(tau)
        for piece in _numpy.pieces(x.size if tau > 0 else 0):
            steps = scores[piece] * np.float32(self._top * scale)
            steps /= tau * np.float32(scale)
            codes[piece] = _numpy.to_codes(steps, self._top - 1, self.rounding)
        codes[kept] = self._top
        signs = np.zeros(0, np.uint8)
        if self.signed:
            signs = _numpy.pack((x < 0) & (codes > 0) & (codes < self._top), 1)
        return MaskPayload(x[kept], _numpy.pack(codes, self.bits), signs)

    def _decode_vector(self, payload, like):
        d = like.size
        if d == 0:
            return jnp.zeros(0, like.dtype)
        codes = _bits.unpack(payload.codes, self.bits, d)
        score = _select.score(payload.values, by_magnitude=self.signed)
        tau = _select.smallest(score)
        x = self._levels(codes.astype(jnp.float32), tau)
        if self.signed:
            x = jnp.where(_bits.unpack(payload.signs, 1, d) == 1, -x, x)
        kept = _select.positions(codes == self._top, payload.values.size)
        return _select.put(x.astype(like.dtype), kept, payload.values.astype(like.dtype))

    def _roundtrip_vector(self, x, key):
        if x.size == 0:
            return x
        top, codes = self._quantize(x)
        levels = self._levels(codes, top.kth)
        if self.signed:
            levels = jnp.where((x < 0) & (codes > 0), -levels, levels)
        return jnp.where(_bits.unpack_words(top.words, x.size), x, levels.astype(x.dtype))

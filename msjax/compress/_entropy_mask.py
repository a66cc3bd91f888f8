"""EntropyMask: a uniform quantizer made for lossless coding behind it, with rate control."""

import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from msjax.compress import _bits, _finite, _random, _select
from msjax.compress._arrays import shaped
from msjax.compress._codec import on_any_mesh, rounded
from msjax.compress._options import check_choice, check_ratio
from msjax.compress._step_choice import DEFAULT_ERROR, choose_step
from msjax.compress._vector_codec import VectorCodec

_HALF_MAX = 65504.0


class EntropyPayload(NamedTuple):
    codes: jax.Array
    """uint8 (⌈d/g⌉,) g codes in a byte, as digits to the base levels + 1, the first one lowest; zeros behind the last.
    `levels` is the code of an outlier. Signed, the code of a value of c steps is m + c, m the largest c."""
    outliers: jax.Array
    """float16 (k,) outliers in the order of their positions, in steps; zeros behind the last."""
    means: jax.Array
    """float16 (m + 1,) what values of 0 … m steps decode to, in steps; signed, with the value's own sign."""
    step: jax.Array
    """float32 () the step of the quantizer."""


@dataclasses.dataclass(frozen=True, repr=False)
class EntropyMask(VectorCodec):
    """Uniform quantization with a dead zone, conditional means and outliers, for lossless coding in `msjax.wire`.

    A value x becomes the code nearest to x/step; what is beyond the last code is an outlier and travels in 16 bits. The
    payload is made to be entropy-coded, as `msjax.wire` always does with it: nominal `payload_bytes` are four or eight
    bits an element, real bytes what `bits` or `error` ask for. `wire.estimate_bytes` predicts them within `jit`. Where
    most codes are zero, the wire codes runs of them, and a message is shorter than `bits` says; gradients, whose energy
    is in few samples, are such where `error` allows much noise: 0.2 to 0.5 bits an element. A vector of some hundred
    values or fewer takes more than `bits`: 33 bytes or more go with it, and its code has to be described.

    Attributes:
      error: the relative squared error ‖h − ĥ‖²/‖h‖² to aim at; 0.07, about that of MS, where `bits` is not given.
        Unsigned, what negative values lose comes on top.
      bits: the bits an element to aim at, of bytes coded without their neighbours and without the header of a message;
        with `error`, the most that it may take. What the wire saves by neighbours comes on top: feature maps of a
        trained network take 17 to 44 % less (`experiments.asked_bits`), so that these bits are a bound there. Elsewhere
        they are about right: synchronization of 2 bits took 2.1, and 2.6 in a small part. The step is chosen from a
        sample in which no value knows its neighbours; to know real bits, `wire.estimate_bytes` needs the codes, and
        half as much time again. What is to meet real bits asks from step to step, by `encode_at_bits`, for more or less
        than before, as training does with `cut_bits`.
      levels: codes of values that are no outliers, 2 to 255; odd where signed. By default 15, 63 or 255, as the target
        needs where tails are no heavier than Student's t with 4 degrees of freedom and, for `bits`, half of the values
        at most are zeros. 15 put two codes in a byte. Fewer serve low rates: with 5, three codes fill a byte.
        `dataclasses.replace` keeps them: give `levels=None` along with another target.
      ratio: at most k = ⌊(1 − ratio)·d⌋ values (at least 1) are outliers; the step is never so fine that there
        would be more in the sample, whatever the target. Further ones get the last code. Where whole channels are
        outliers and more than that, the target is missed by far: then a smaller ratio, or granularity="channel".
      signed: False codes a negative value as 0, for features behind a ReLU.
      rounding: "nearest", or "stochastic", which needs a key and is unbiased: for gradients.
      dead_zone: by how many steps the zone that becomes 0 is wider than the others at either end; only "nearest".
      keep_zeros: unsigned, small values decode to 0, as the zeros of a ReLU among them are, instead of to their mean.
        The squared error is a little larger, but the features' zeros stay zeros: below a bit an element networks bear
        this better. Signed codecs always do so.
      granularity: see `VectorCodec`. Each vector has outliers, means, a step and a target of its own, by default
        in 22 bytes or more beside its codes: "token" is for long vectors.

    Why each part is there. Of quantizers with an entropy coder behind them the uniform one is within 0.25 bits of the
    rate–distortion limit at all rates (Gish & Pierce, IEEE Trans. IT 14, 1968), and with a dead zone and conditional
    means closer than that at low rates (Sullivan, IEEE Trans. IT 42, 1996). Outliers in full range let few codes do
    where tails are heavy, as in the paper's MS (arXiv 2408.13787). Two or more codes in a byte make a byte's Huffman
    code a code of blocks, which comes below a bit an element and uses that neighbours are alike. Stochastic rounding
    is QSGD's (arXiv 1610.02132). The step follows from a sample of the input in every call: no state, no recompilation.

    Payload: ⌈d/g⌉ + 2k + 2(m + 1) + 4 bytes before coding, with g = ⌊8/log2(levels + 1)⌋. Of a code
    c below `levels`, unsigned, the value is means[c] · step, and m is levels − 1. Signed, m is (levels − 1)/2, and the
    value is sign(c − m) · means[|c − m|] · step. The code `levels` says that the value is the next outlier, times step.
    Arithmetic is float32; the result has the input's dtype.

    Corners: all zeros decode to zeros. NaN and Inf are outliers, but unsigned −Inf is a negative value; where more than
    k values are outliers and any value is not finite, everything decodes to NaN. The step is at least the largest value
    / 32768, stochastic / 2048: values that are so much smaller than that all decode to zero, or at random to a step,
    whatever the target. Values above 2¹²⁵, 4·10³⁷, may be cut down to less, as their step cannot be larger.

    Bias: "nearest" is biased, though by its conditional means not in the sum. "stochastic" is unbiased while there are
    no more than k outliers; its variance is at most step²/4 a value. A target beyond what `levels` and `ratio` allow is
    not reached: see `ratio`.

    >>> import jax, jax.numpy as jnp
    >>> h = jax.nn.relu(jax.random.normal(jax.random.key(0), (100_000,)))
    >>> error = jnp.sum((EntropyMask(error=0.01).roundtrip(h) - h) ** 2) / jnp.sum(h**2)
    >>> bool(0.0095 < error < 0.0105)
    True
    """

    error: float | None = None
    bits: float | None = None
    levels: int | None = None
    ratio: float = 0.99
    signed: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    dead_zone: float = 0.1
    keep_zeros: bool = dataclasses.field(default=False, metadata={"hide_default": True})

    entropy_coded: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("error", "bits"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < float("inf")):
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if self.levels is None:
            object.__setattr__(self, "levels", self._enough_levels())
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 2 <= self.levels <= 255:
            raise ValueError(f"levels must be an integer in 2..255, got {self.levels!r}")
        check_ratio(self.ratio)
        check_choice("signed", self.signed, (False, True))
        check_choice("keep_zeros", self.keep_zeros, (False, True))
        if self.signed and self.levels % 2 == 0:
            raise ValueError(f"levels must be odd for a signed codec, got {self.levels}")
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        if not (_is_number(self.dead_zone) and 0 <= self.dead_zone < 0.5):
            raise ValueError(f"dead_zone must be a number in [0, 0.5), got {self.dead_zone!r}")

    def _enough_levels(self):
        """The fewest of 15, 63 and 255 that reach the target before `ratio` stops the step."""
        beyond = []
        if self.bits is not None:
            beyond.append(sum(self.bits > limit for limit in ((2.75, 4.75) if self.signed else (2.5, 4.0))))
        if self.error is not None or self.bits is None:
            error = self.error or DEFAULT_ERROR
            beyond.append(sum(error < limit for limit in ((0.02, 0.0015) if self.signed else (0.01, 0.001))))
        return (15, 63, 255)[min(beyond)]

    def encode_at_bits(
        self, h: Float[Array, "..."], bits: Float[Array, ""], key: jax.Array | None = None
    ) -> tuple[Array, ...]:
        """Returns the payload of `h`, as `encode` does, with `bits` in place of the field.

        Args:
          bits: float32 (), the bits an element to aim at, as the field; an array, so that no number compiles anew.

        Raises:
          TypeError, ValueError: as `encode`; `bits` is no number above 0, as far as its value is known.
        """
        h = jnp.asarray(self._checked(h, key))
        if not (_is_number(bits) or hasattr(bits, "dtype")) or jnp.shape(bits) != ():
            raise TypeError(f"bits must be one number, got {bits!r}")
        if not isinstance(bits, jax.core.Tracer) and not 0 < float(bits) < float("inf"):
            raise ValueError(f"bits must be a number above 0, got {bits}")
        return _encode_at_bits(self, h, jnp.asarray(bits, jnp.float32), key)

    @property
    def needs_key(self) -> bool:  # type: ignore[override]  # of others a class variable
        """Whether it rounds at random."""
        return self.rounding == "stochastic"

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether it rounds at random and takes values of both signs: without, those below 0 are lost."""
        return self.rounding == "stochastic" and self.signed

    @property
    def _most(self) -> int:
        """m: the largest code of a magnitude."""
        levels = self.levels or 0  # filled in by the constructor
        return levels // 2 if self.signed else levels - 1

    @property
    def _zero_is_zero(self) -> bool:
        """Whether the code 0 decodes to 0, not to a mean."""
        return self.signed or self.keep_zeros

    @property
    def _per_byte(self) -> int:
        """g: codes in a byte."""
        return next(g for g in range(8, 0, -1) if ((self.levels or 0) + 1) ** g <= 256)

    def _vector_like(self, d, dtype):
        codes, outliers = -(-d // self._per_byte), _select.num_kept(self.ratio, d)
        half = functools.partial(shaped, dtype=jnp.float16)
        return EntropyPayload(shaped(codes), half(outliers), half(self._most + 1), shaped((), jnp.float32))

    # -- Quantization. ----------------------------------------------------------------------------------------------

    def _magnitude(self, x):
        x = x.astype(jnp.float32)
        return jnp.abs(x) if self.signed else jnp.where(x < 0, jnp.float32(0), x)

    def _codes(self, steps, uniform):
        """Float32 codes of magnitudes in steps, outliers' too; `uniform` numbers in [0, 1) round at random."""
        if self.rounding == "stochastic":
            return jnp.floor(steps + uniform)
        return jnp.where(steps < jnp.float32(0.5 + self.dead_zone), jnp.float32(0), jnp.floor(steps + 0.5))

    def _with_sign(self, codes, x):
        """From 0 on: codes of magnitudes, or, where signed, of values from −m to m."""
        if not self.signed:
            return codes
        return jnp.where(x < 0, -codes, codes) + jnp.float32(self._most)

    def _encode_vector(self, x, key, bits=None):
        if x.size == 0:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._vector_like(0, x.dtype))
        d, most = x.size, jnp.float32(self._most)
        step, means, finite = choose_step(self, x, self.bits if bits is None else bits)
        inverse = jnp.where(step > 0, 1 / jnp.where(step > 0, step, jnp.float32(1)), jnp.float32(0))

        steps = self._magnitude(x) * inverse
        codes = self._codes(steps, _random.uniform(key, d) if self.needs_key else None)
        is_beyond = ~(codes <= most)  # NaN is beyond, too
        beyond = _bits.pack_words(is_beyond)
        positions = _select.packed_positions(beyond, _select.num_kept(self.ratio, d), d)
        # Whole steps where that is unbiased: float16 holds them up to 2048.
        outliers = (codes if self.needs_key else steps)[jnp.minimum(positions, d - 1)]
        outliers = jnp.where(jnp.isfinite(outliers), jnp.minimum(outliers, jnp.float32(_HALF_MAX)), outliers)
        outliers = jnp.where(x[jnp.minimum(positions, d - 1)] < 0, -outliers, outliers)
        outliers = jnp.where(positions < d, outliers, jnp.float32(0)).astype(jnp.float16)
        codes = self._with_sign(jnp.where(is_beyond, most, codes), x).astype(jnp.uint8)
        codes = _select.put(codes, positions, jnp.full(positions.size, self.levels, jnp.uint8))
        many = jnp.sum(lax.population_count(beyond), dtype=jnp.uint32) > positions.size
        step = _finite.nan_where(many & ~finite, step)
        return EntropyPayload(self._pack(codes), outliers, means, step)

    def _decode_vector(self, payload, like):
        if like.size == 0:
            return jnp.zeros(0, like.dtype)
        codes = self._unpack(payload.codes, like.size)
        levels = _finite.product(payload.means, payload.step, like.dtype).astype(jnp.float32)
        levels = jnp.concatenate([-levels[:0:-1], levels]) if self.signed else levels
        # A scatter's result is in memory; else XLA's CPU would make the table anew for every value, despite a barrier.
        levels = _select.put(jnp.zeros_like(levels), lax.iota(jnp.int32, levels.size), levels)
        x = levels[jnp.minimum(codes, self.levels - 1)].astype(like.dtype)
        outliers = _finite.product(payload.outliers, payload.step, like.dtype)
        return _select.put(x, _select.positions(codes == self.levels, outliers.size), outliers)

    def _is_kept(self, payload, like):
        rows, d = self._rows(like)
        unpack = functools.partial(self._unpack, d=d)
        codes = unpack(payload.codes) if rows is None else jax.vmap(unpack)(payload.codes)
        return self._joined(codes != (self._most if self.signed else 0), like.shape)

    def _pack(self, codes):
        """uint8 (⌈d/g⌉,) of uint8 codes (d,)."""
        g = self._per_byte
        if (self.levels + 1) ** g == 256:
            return _bits.pack(codes, 8 // g)
        digits = jnp.pad(codes, (0, -codes.size % g)).reshape(-1, g).astype(jnp.uint32)
        places = np.uint32(self.levels + 1) ** np.arange(g, dtype=np.uint32)[None]
        return jnp.sum(digits * places, axis=1, dtype=jnp.uint32).astype(jnp.uint8)

    def _unpack(self, packed, d):
        """int32 (d,): the inverse of `_pack`."""
        g, base = self._per_byte, self.levels + 1
        if base**g == 256:
            return _bits.unpack(packed, 8 // g, d).astype(jnp.int32)
        # Divided by one constant after another, since XLA makes multiplications of that.
        left, digits = packed.astype(jnp.int32), []
        for _ in range(g):
            digits.append(left % jnp.int32(base))
            left = left // jnp.int32(base)
        return jnp.stack(digits, axis=1).reshape(-1)[:d]


@functools.partial(jax.jit, inline=True, static_argnames="codec")
def _encode_at_bits(codec, h, bits, key):
    def encode(h, bits, key):
        payload = codec._over_rows(functools.partial(codec._encode_vector, bits=bits), h, key)
        return jax.tree.map(rounded, payload)

    return on_any_mesh(encode, h, bits, key)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)

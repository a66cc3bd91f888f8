"""C3-SL: several samples' features added up into one, each bound to a key."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from msjax.compress import Codec, DensePayload
from msjax.compress._arrays import shaped
from msjax.compress._options import check_integer


@dataclasses.dataclass(frozen=True, repr=False)
class C3SL(Codec):
    """Circular convolution of each of `group` samples' features with a fixed random key; the sum is sent.

    The receiver correlates it with each key, which gives every sample's features, and the others' as noise. Keys are
    normal with norm 1. Payload: ⌈B/group⌉·D values of the input's dtype, where a sample has D: `group` times fewer
    bytes. Source: arXiv 2207.12397.

    For gradients the same codec is the source's backward pass: the derivative of decoding is binding, and that of
    binding is decoding. So `C3SL` up and down is the end-to-end derivative of the features' way.

    Bias: biased for the keys that there are (over random keys it would not be). NaN and Inf spread over their group.
    Deviations: a last group of fewer samples is filled with zeros; keys are drawn from `seed` at both ends, not sent.

    Attributes:
      group: R, samples in a sum; the source has 2 to 16.
      seed: of the keys.
    """

    group: int = 4
    seed: int = 0

    def __post_init__(self):
        check_integer("group", self.group, 1, 1024)

    def _shape(self, like):
        """(samples, groups, values of a sample)."""
        if not like.shape:
            raise ValueError("h must have a batch axis, got a scalar")
        return like.shape[0], -(-like.shape[0] // self.group), math.prod(like.shape[1:])

    def _keys(self, d):
        keys = jax.random.normal(jax.random.key(self.seed), (self.group, d), jnp.float32)
        return jnp.fft.rfft(keys / jnp.linalg.norm(keys, axis=1, keepdims=True))[None]

    def _payload_like(self, like):
        return DensePayload(shaped(self._shape(like)[1:], like.dtype))

    def _encode(self, h, key):
        samples, groups, d = self._shape(h)
        if h.size == 0:
            return DensePayload(jnp.zeros((groups, d), h.dtype))
        rows = jnp.pad(h.reshape(samples, d).astype(jnp.float32), ((0, groups * self.group - samples), (0, 0)))
        bound = jnp.fft.rfft(rows.reshape(groups, self.group, d)) * self._keys(d)
        return DensePayload(jnp.fft.irfft(bound.sum(1), n=d).astype(h.dtype))

    def _decode(self, payload, like):
        samples, groups, d = self._shape(like)
        if 0 in (samples, d):
            return jnp.zeros(like.shape, like.dtype)
        sums = jnp.fft.rfft(payload.values.astype(jnp.float32))[:, None]
        rows = jnp.fft.irfft(sums * jnp.conj(self._keys(d)), n=d).reshape(groups * self.group, d)
        return rows[:samples].reshape(like.shape).astype(like.dtype)

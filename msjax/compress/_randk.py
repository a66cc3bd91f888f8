"""Unbiased random-k sparsification."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from msjax.compress import _bits, _random, _select
from msjax.compress._topk import Sparsifier


@dataclasses.dataclass(frozen=True, repr=False)
class RandK(Sparsifier):
    """k values at random positions, scaled by d/k; zeros elsewhere.

    See `Sparsifier` for k and the payload. Every set of k positions is equally likely. Values travel unscaled. Needs a
    key. Unbiased: the mean over keys is `h` (to the rounding of h's dtype); the variance is (d/k − 1)·‖h‖². NaN and Inf
    are kept where they are drawn; what is beyond the dtype's largest number · k/d decodes to the largest. Source: Stich
    et al., arXiv 1809.07599.

    >>> import jax, jax.numpy as jnp
    >>> RandK(ratio=0.5).roundtrip(jnp.ones(4), jax.random.key(0)).sum()
    Array(4., dtype=float32)
    """

    needs_key: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    def _kept(self, x, k, key):
        return _random.subset(key, _bits.ones(x.size), jnp.int32(k))

    def _scale(self, d):
        return d / max(_select.num_kept(self.ratio, d), 1)

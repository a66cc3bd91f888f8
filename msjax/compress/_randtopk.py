"""RT, randomized top-k sparsification."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from msjax.compress import _bits, _random, _select
from msjax.compress._topk import Sparsifier, TopK


@dataclasses.dataclass(frozen=True, repr=False)
class RandTopK(Sparsifier):
    """RT: k draws without replacement, each from the top k with probability 1 − alpha, else from the rest.

    Within either group every value is equally likely, so the number taken from the rest is Binomial(k, alpha), at most
    d − k. It is drawn as such, with alpha to 2⁻²⁴: the same distribution as k draws, without a loop. (The MS paper's
    program gives the top k a fixed weight for all draws, which takes more than alpha from the rest.) See `Sparsifier`
    for k and the payload; "top" is by magnitude as in `TopK`, which is used on test data. Needs a key.

    Bias: biased toward 0. Source: Zheng et al., IJCAI 2023, arXiv 2305.18469.

    >>> import jax, jax.numpy as jnp
    >>> h = jnp.array([3.0, 1.0, 4.0, 2.0])
    >>> jnp.count_nonzero(RandTopK(ratio=0.5, alpha=0.1).roundtrip(h, jax.random.key(0))).item()
    2
    """

    alpha: float = 0.1
    needs_key: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a number in [0, 1], got {self.alpha!r}")

    def at_inference(self):
        return TopK(self.ratio, granularity=self.granularity)

    def _kept(self, x, k, key):
        top = _select.select(x, k, by_magnitude=True).words
        rest = top ^ _bits.ones(x.size)
        count_key, top_key, rest_key = jax.random.split(key, 3)
        swapped = jnp.sum(_random.words(count_key, k) >> 8 < round(self.alpha * 2**24), dtype=jnp.int32)
        swapped = jnp.minimum(swapped, x.size - k)
        from_top = _random.subset(top_key, top, k - swapped)
        return from_top | _random.subset(rest_key, rest, swapped)

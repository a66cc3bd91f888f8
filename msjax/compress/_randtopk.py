"""RT, randomized top-k sparsification."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from msjax.compress import _select
from msjax.compress._topk import Sparsifier, TopK


@dataclasses.dataclass(frozen=True, repr=False)
class RandTopK(Sparsifier):
    """RT: k draws without replacement, each from the top k with probability 1 − alpha, else from the rest.

    Within either group every value is equally likely, so the number taken from the rest is Binomial(k, alpha), at most
    d − k. It is drawn as such: the same distribution as k draws, without a loop. (The MS paper's program gives the top
    k a fixed weight for all draws, which takes more than alpha from the rest.) See `Sparsifier` for k and the payload;
    "top" is by magnitude as in `TopK`, which is used on test data. Needs a key.

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

    def _positions(self, x, k, key):
        top = _select.select(x, k, by_magnitude=True).positions
        rest = x.size - k
        count_key, drop_key, draw_key = jax.random.split(key, 3)
        swapped = jnp.count_nonzero(jax.random.bernoulli(count_key, float(self.alpha), (k,)))
        if rest == 0:
            return top
        # The first `swapped` of the top k, in a random order, give way to the first of the rest, in a random order.
        rank = jax.random.permutation(drop_key, k)
        drawn = jax.random.uniform(draw_key, (x.size,)).at[top].set(-1.0)
        last = _select.select(drawn, min(k, rest), by_magnitude=False).positions
        drawn = last[lax.top_k(drawn[last], last.size)[1]]
        drawn = jnp.pad(drawn, (0, k - drawn.size))
        return jnp.sort(jnp.where(rank < jnp.minimum(swapped, rest), drawn[rank], top))

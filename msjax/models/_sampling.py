"""How the next token is chosen from logits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key

from msjax.checks import integer, number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A rule that chooses a token from its logits.

    Logits are divided by `temperature`, all but the `top_k` largest are left out, then of those that are left all but
    the most probable ones that together reach `top_p`; a token is drawn from the softmax of the rest. That is the order
    of the package transformers.

    Attributes:
      temperature: 0, the default, takes the largest logit (greedy).
      top_k: how many are left; None: all.
      top_p: in (0, 1]; None: 1.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        number("temperature", self.temperature, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
        if self.top_k is not None:
            integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} must be None where temperature is 0, which draws nothing, got {value}")

    @property
    def candidates(self) -> int | None:
        """How many of the largest logits the rule looks at; None for all. The others change nothing."""
        return 1 if self.temperature == 0 else self.top_k

    def choose(self, logits: Float32[Array, "n tokens"], key: Key[Array, ""] | None = None) -> Int32[Array, " n"]:
        """The places in `logits` of the tokens that are chosen.

        Args:
          logits: all, or the `candidates` largest ones in falling order.
          key: what draws; needed where the temperature is above 0.
        """
        if self.temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        if key is None:
            raise ValueError(f"key must be a JAX random key where temperature is above 0, got None for {self}")
        return _draw(self, logits, key)


@functools.partial(jax.jit, static_argnums=0)
def _draw(rule, logits, key):
    # Less the largest, and by no smaller temperature than float32 has: else small ones would make infinities of all.
    logits = logits - logits.max(-1, keepdims=True)
    logits = logits / max(rule.temperature, float(jnp.finfo(jnp.float32).tiny))
    order = jnp.argsort(-logits, -1)  # stable: of equal ones the first
    falling = jnp.take_along_axis(logits, order, -1)
    if rule.top_k is not None:
        falling = jnp.where(jnp.arange(falling.shape[-1]) < rule.top_k, falling, -jnp.inf)
    if rule.top_p is not None:
        probabilities = jax.nn.softmax(falling, -1)
        before = jnp.cumsum(probabilities, -1) - probabilities
        falling = jnp.where((before < rule.top_p) | (jnp.arange(falling.shape[-1]) == 0), falling, -jnp.inf)
    place = jax.random.categorical(key, falling, -1)
    return jnp.take_along_axis(order, place[:, None], -1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def largest(
    logits: Float32[Array, "n tokens"], count: int
) -> tuple[Float32[Array, "n count"], Int32[Array, "n count"]]:
    """The `count` largest logits in falling order, and which tokens they are of; of equal ones the first."""
    found, tokens = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    return found, tokens.astype(jnp.int32)

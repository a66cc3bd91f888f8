"""Low-rank adapters (Hu et al., arXiv 2106.09685) beside weights that stay as they are."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The dense layers of a decoder's block that may have adapters."""
ADAPTERS = ("lora_a", "lora_b")
"""What the arrays of an adapter are called."""
_INIT = nnx.initializers.normal(0.02)
_BITS = {jnp.dtype("bfloat16"): jnp.uint16, jnp.dtype("float32"): jnp.uint32}


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters of some dense layers: to x·W they add dropout(x)·A·B·alpha/rank, and A and B alone are trained.

    A (in, rank) is drawn from U(±1/√in), B (rank, out) starts at 0, so that a network starts as it is without them.

    Attributes:
      rank: of A·B.
      alpha: alpha / rank is what A·B is multiplied by.
      targets: which layers, of `TARGETS`; by default those of the paper.
      dropout: the share of the adapters' inputs that is dropped in training.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, got {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be above 0 and finite, got {self.alpha}")
        if isinstance(self.targets, str) or not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"targets must be a tuple of some of {', '.join(TARGETS)}, got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Projection(nnx.Module):
    """A dense layer, with an adapter where `lora` is given: (…, in) -> (…, out) of `dtype`."""

    def __init__(self, in_features, out_features, *, use_bias, lora=None, dtype, rngs):
        self.dtype, self.lora = dtype, lora
        self.kernel = nnx.Param(_INIT(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else None
        if lora is not None:
            bound = 1 / math.sqrt(in_features)
            shape = (in_features, lora.rank)
            self.lora_a = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, out_features), jnp.float32))

    def __call__(self, x, key=None):
        """`key` draws the dropout of a training step; None drops nothing."""
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        if self.lora is None:
            return y
        if self.lora.dropout and key is not None:
            kept = jax.random.bernoulli(key, 1 - self.lora.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.lora.dropout), 0).astype(self.dtype)
        a, b = (array[...].astype(self.dtype) for array in (self.lora_a, self.lora_b))
        return y + (x @ a @ b) * (self.lora.alpha / self.lora.rank)


def partition(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of adapters, and all others, each as a nested dict."""
    adapters: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            for found, part in zip((adapters, others), partition(value), strict=True):
                if part:
                    found[name] = part
        else:
            (adapters if name in ADAPTERS else others)[name] = value
    return adapters, others


def combine(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts that `partition` made, as one."""
    found = one | other
    for name in one.keys() & other.keys():
        found[name] = combine(one[name], other[name])
    return found


def freeze(tree: Any, dtype: Any) -> Any:
    """Arrays as the bits of their values in `dtype`, float32 or bfloat16: unsigned integers of as many bits.

    So they can be kept among a part's `stats`: of those, floating arrays are averaged over clients and sent, and all
    others are equal everywhere and stay where they are. No gradient or optimizer state is made for them either. They
    are among the part's `constants`: clients in one program share one copy, and checkpoints leave them out.
    """
    bits = _BITS[jnp.dtype(dtype)]
    return jax.tree.map(lambda leaf: jax.lax.bitcast_convert_type(jnp.asarray(leaf).astype(dtype), bits), tree)


def thaw(tree: Any) -> Any:
    """The values of what `freeze` made; XLA reads the same memory as other numbers."""
    floats = {jnp.dtype(bits): dtype for dtype, bits in _BITS.items()}
    return jax.tree.map(lambda leaf: jax.lax.bitcast_convert_type(leaf, floats[jnp.dtype(leaf.dtype)]), tree)


def merge(adapters: dict[str, Any], base: dict[str, Any], lora: LoRA) -> dict[str, Any]:
    """The base with each adapter added to its layer's weights, which keep their dtype."""
    found = dict(base)
    for name, value in adapters.items():
        if isinstance(value, dict):
            found[name] = merge(value, base[name], lora)
    if "lora_a" in adapters:
        kernel = base["kernel"]
        change = adapters["lora_a"].astype(jnp.float32) @ adapters["lora_b"].astype(jnp.float32)
        found["kernel"] = (kernel.astype(jnp.float32) + change * (lora.alpha / lora.rank)).astype(kernel.dtype)
    return found

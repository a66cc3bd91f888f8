"""A part of a model: what one party has of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PARTS = ("client", "server", "tail")
"""Their names, in the order of computation."""


class ModelPart(NamedTuple):
    """A pure function and its arrays: `apply(params, stats, x, train=…, key=…) -> (y, new_stats)`.

    `apply` is hashable, and equal by value for equal parts, so that `jit` need not trace them anew. `params` are
    trained; `stats`, such as the running statistics of batch normalisation, are updated without a gradient, and are
    averaged over clients. Both are nested dicts of arrays. Where `apply` has an attribute `constants`, the names in
    `stats` of what never changes, `new_stats` are without these: one copy of them does for all clients. `x` and `y` are
    arrays or trees of arrays whose first axis is the batch. With `train`, random layers draw from `key`.
    """

    apply: Callable[..., tuple[Any, Any]]
    params: dict[str, Any]
    stats: dict[str, Any]

    def shapes(self) -> "ModelPart":
        """Returns the same part with shapes and dtypes in place of arrays."""
        return ModelPart(self.apply, *shapes_of((self.params, self.stats)))

    def scoped(self, name: str) -> "ModelPart":
        """Returns the same part with its arrays under `name`, so that they can be kept beside another part's."""
        stats = {name: self.stats} if jax.tree.leaves(self.stats) else {}
        return ModelPart(ScopedApply(self.apply, name), {name: self.params}, stats)

    def out_of(self, params: dict[str, Any], stats: dict[str, Any]) -> "ModelPart":
        """Returns the part with its arrays out of those of a party, and no longer under the name that it may have."""
        if isinstance(self.apply, ScopedApply):
            return ModelPart(self.apply.apply, params[self.apply.name], stats.get(self.apply.name, {}))
        return ModelPart(self.apply, {n: params[n] for n in self.params}, {n: stats[n] for n in self.stats})


def shapes_of(tree: Any) -> Any:
    """Returns shapes and dtypes in place of arrays, as JAX has them: of doubles those of float32."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), tree)


def constants_of(apply: Any) -> frozenset[str]:
    """Returns the names of those of a part's `stats` that never change; none where its function does not say."""
    return getattr(apply, "constants", frozenset())


class RemotePart(NamedTuple):
    """What this party knows of a part that another party has: what it returns, of one sample.

    In a preset it stands where the other's part would be: (RemotePart(features), server) at the server, and
    (client, RemotePart(outputs)) at a client. `outputs` is an array or a tree, or its shapes and dtypes, without the
    batch axis.
    """

    outputs: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class RemoteApply:
    """The function of a part that another party has."""

    outputs: Any

    def __call__(self, params, stats, x, *, train, key=None):
        raise ValueError("this part of the model is another party's; only what it returns is known here")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ScopedApply:
    """A part's function whose arrays are under a name, beside others that it does not touch.

    Client and tail are given the same key in a step. A tail of one's own draws from another that follows from it, as
    modules alike would else drop the same places in both; what msjax cuts draws by a block's place in the network.
    """

    apply: Callable[..., tuple[Any, Any]]
    name: str

    def __call__(self, params, stats, x, *, train, key=None):
        if key is not None and self.name == "tail" and not getattr(self.apply, "draws_by_place", False):
            key = jax.random.fold_in(key, 1 << 30)
        y, new_stats = self.apply(params[self.name], stats.get(self.name, {}), x, train=train, key=key)
        return y, {self.name: new_stats} if self.name in stats else {}

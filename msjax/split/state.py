"""What a party carries from step to step, and the random keys of a step."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from msjax.keys import make_key
from msjax.split.trees import is_float


class PartState(NamedTuple):
    """A part of the network in training. U-shaped, the client's holds the arrays of its tail, too."""

    params: PyTree
    stats: PyTree
    """What is updated without a gradient, as running statistics of batch normalisation; and what never changes, whose
    names are `RunSpec.client_constants` and `RunSpec.server_constants`."""
    opt_state: PyTree

    def without(self, names: frozenset[str]) -> "PartState":
        """Returns the part without those of its stats that never change, of these names."""
        return self._replace(stats=without_constants(self.stats, names))

    def with_constants_of(self, other: "PartState", names: frozenset[str]) -> "PartState":
        """Returns the part with those that another state of it has."""
        return self._replace(stats=self.stats | {name: other.stats[name] for name in names}) if names else self


def without_constants(stats: PyTree, names: frozenset[str]) -> PyTree:
    """Returns a part's `stats` without those of these names; as they are where there are no names."""
    return {name: tree for name, tree in stats.items() if name not in names} if names else stats


def changing(stats: PyTree, like: PyTree) -> PyTree:
    """Returns those of a part's `stats` that are in `like`, which is without what never changes."""
    return {name: stats[name] for name in like} if isinstance(like, dict) else stats


def with_changed(stats: PyTree, changed: PyTree) -> PyTree:
    """Returns a part's `stats` with new ones in place of those that change: the inverse of `changing`."""
    return {**stats, **changed} if isinstance(changed, dict) else changed


class TrainState(NamedTuple):
    """The state of a run in one program."""

    client: PartState
    server: PartState
    step: Int[Array, ""]
    memory: Any = ()
    """Where averages are compressed, an `averages.Averages`."""
    up_bits: Any = None
    """Where there is a budget for the cut, float32 (K,), what the clients aim their features at; see `budget`."""


def digest(*trees: PyTree) -> str:
    """Returns a hash of arrays by their names, as "sha256:" and 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        array = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return f"sha256:{found.hexdigest()[:16]}"


def check_constants(found: str | None, saved: str | None) -> None:
    """Raises ValueError where what never changes is not here what it was beside a checkpoint.

    Args:
      found, saved: digests, see `digest`; None where there is nothing of the kind.
    """
    if found != saved:
        raise ValueError(
            f"model.weights must be those that the run began with, which its checkpoints leave out: the weights beside "
            f"the adapters have the digest {saved}, got {found}"
        )


class StepKeys(NamedTuple):
    """The random keys of one client in one step, by use."""

    augment: jax.Array
    client: jax.Array
    server: jax.Array
    codec: jax.Array


def split_key(key: jax.Array) -> StepKeys:
    """Returns the keys of each use from the key of one client in one step."""
    return StepKeys(*jax.random.split(key, len(StepKeys._fields)))


def tail_key(key: jax.Array) -> jax.Array:
    """Returns the key of the codec between server and tail, given that of the codec between client and server."""
    return jax.random.fold_in(key, 1 << 30)


def train_key(seed: int) -> jax.Array:
    """Returns the key that those of all training steps are drawn from."""
    return jax.random.fold_in(make_key(seed), 1 << 31)  # the model's blocks take 0, 1, 2, …


def eval_key(seed: int) -> jax.Array:
    """Returns the key that those of all test batches are drawn from."""
    return jax.random.fold_in(make_key(seed), (1 << 31) + 1)


def prediction_key(seed: int) -> jax.Array:
    """Returns the key of every batch that is predicted: that of a test's first round, step and client."""
    key = jax.random.fold_in(eval_key(seed), 0)
    return client_keys(key, jnp.int32(0), jnp.zeros(1, jnp.int32))[0]


def client_keys(key: jax.Array, step: jax.Array, clients: jax.Array) -> jax.Array:
    """Returns the keys (K,) of the clients with these numbers in this step."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda client: jax.random.fold_in(key, client))(clients)


def with_update_count(state: PartState, count: int) -> PartState:
    """Returns a part whose optimizer has counted `count` updates: integers are not in the vector that is handed on."""
    counted = jax.tree.map(lambda leaf: leaf if is_float(leaf) else jnp.full_like(leaf, count), state.opt_state)
    return state._replace(opt_state=counted)

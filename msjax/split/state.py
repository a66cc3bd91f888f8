"""What a party carries from step to step, and the random keys of a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from msjax.split.trees import is_float


class PartState(NamedTuple):
    """A part of the network in training. U-shaped, the client's holds the arrays of its tail, too."""

    params: PyTree
    stats: PyTree
    """What is updated without a gradient, as running statistics of batch normalisation."""
    opt_state: PyTree


class TrainState(NamedTuple):
    """The state of a run in one program."""

    client: PartState
    server: PartState
    step: Int[Array, ""]
    memory: Any = ()
    """Where averages are compressed, an `averages.Averages`."""
    up_bits: Any = None
    """Where there is a budget for the cut, float32 (K,), what the clients aim their features at; see `budget`."""


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
    return jax.random.fold_in(jax.random.key(seed), 1 << 31)  # the model's blocks take 0, 1, 2, …


def eval_key(seed: int) -> jax.Array:
    """Returns the key that those of all test batches are drawn from."""
    return jax.random.fold_in(jax.random.key(seed), (1 << 31) + 1)


def client_keys(key: jax.Array, step: jax.Array, clients: jax.Array) -> jax.Array:
    """Returns the keys (K,) of the clients with these numbers in this step."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda client: jax.random.fold_in(key, client))(clients)


def with_update_count(state: PartState, count: int) -> PartState:
    """Returns a part whose optimizer has counted `count` updates: integers are not in the vector that is handed on."""
    counted = jax.tree.map(lambda leaf: leaf if is_float(leaf) else jnp.full_like(leaf, count), state.opt_state)
    return state._replace(opt_state=counted)

"""The parties' steps, compiled: module-level functions with the `RunSpec` as static argument.

Parties of one program share them, so that each is compiled once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msjax.split import averages, step, trees
from msjax.split.spec import RunSpec
from msjax.split.state import client_keys, eval_key, split_key, train_key

_jit = functools.partial(jax.jit, static_argnums=0)
_jit_batch = functools.partial(jax.jit, static_argnums=0, static_argnames="batch_size")
_jit_server = functools.partial(jax.jit, static_argnums=0, static_argnames=("batch_size", "mesh"))

client_forward = _jit(step.client_forward)
client_features = _jit(step.client_features)
client_tail = _jit_batch(step.client_tail)
client_tail_gradient = _jit_batch(step.client_tail_gradient)
client_backward = _jit_batch(step.client_backward)
next_up_bits = _jit_batch(step.next_up_bits)
update_part = _jit(step.update_part)
server_step = _jit_server(step.server_step)
server_forward = _jit_server(step.server_forward)
server_backward = _jit_server(step.server_backward)
server_test_outputs = _jit_server(step.server_test_outputs)
score = _jit(step.score)
encode_update = _jit(averages.encode_update)
decode_update = _jit(averages.decode_update)
encode_part = _jit(averages.encode_part)
decode_part = _jit(averages.decode_part)
encode_mean = _jit(averages.encode_mean)
to_vector = jax.jit(trees.to_vector)
from_vector = jax.jit(trees.from_vector)


@_jit
def augmented(spec: RunSpec, inputs: Any, labels: Any, key: jax.Array) -> tuple[Any, Any]:
    """Returns the inputs of a training batch as the network takes them, augmented, and its labels."""
    return spec.preprocess.augmented(inputs, labels, split_key(key).augment)


@_jit
def client_test_payload(
    spec: RunSpec, client: Any, inputs: Any, key: jax.Array, up_bits: jax.Array | None = None
) -> Any:
    """Returns the payload of a client's features of a test batch, from inputs as the data set stores them.

    Args:
      up_bits: where there is a budget for the cut, what the client aims its features at; see `budget`.
    """
    h = step.client_test_features(spec, client, spec.preprocess(inputs))
    return spec.test_payload(jax.tree.leaves(inputs)[0].shape[0]).encode(h, key, up_bits)


@_jit
def client_test_features(spec: RunSpec, client: Any, inputs: Any) -> Any:
    """Returns the same before it is encoded."""
    return step.client_test_features(spec, client, spec.preprocess(inputs))


@_jit_batch
def client_test_score(spec: RunSpec, client: Any, payload: Any, y: Any, *, batch_size: int) -> step.StepMetrics:
    """Returns loss and metrics of a client's tail on a test batch."""
    return step.score(spec, step.client_test_outputs(spec, client, payload, batch_size=batch_size), y)


def mean_vectors(vectors: list[Any]) -> jax.Array:
    """Returns the mean of vectors (n,)."""
    return _mean(np.stack([np.asarray(vector) for vector in vectors]))


_mean = jax.jit(lambda vectors: vectors.mean(0))


# Jitted, since one by one the operations on keys take longer than a small net's step.
@functools.partial(jax.jit, static_argnums=(0, 1))
def keys(seed: int, testing: bool, at: jax.Array, clients: jax.Array) -> jax.Array:
    """Returns the keys (K,) of these clients in step `at`, or in test round `at`."""
    key = jax.random.fold_in(eval_key(seed), at) if testing else train_key(seed)
    return client_keys(key, jnp.int32(0) if testing else at, clients)


@functools.partial(jax.jit, static_argnums=(0, 1))
def key(seed: int, testing: bool, at: jax.Array, client: jax.Array) -> jax.Array:
    """Returns the key of one client there."""
    return keys(seed, testing, at, client[None])[0]

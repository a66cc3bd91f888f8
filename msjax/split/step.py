"""One training step as the parties take it, with payloads between them.

    payload, pending = client_forward(spec, client, x, key)                                     # on each client
    server, replies, metrics = server_step(spec, server, payloads, y, keys, batch_size=B)       # on the server, for K
    update = client_backward(spec, pending, reply, batch_size=B)                                # on each client
    client = update_part(spec, client, mean_of(updates))                                        # averaged

U-shaped, the last layers and the labels stay with the client, and the server's turn becomes two:

    payloads, pending = server_forward(spec, server, payloads, keys, batch_size=B)
    payload, update, metrics = client_tail(spec, client, payload, y, key, batch_size=B)         # on each client
    server, replies = server_backward(spec, server, pending, payloads, keys, present, batch_size=B)
    update = client_backward(spec, pending, reply, update, batch_size=B)                        # on each client

`fused` computes the same in one program. Both follow the paper: the loss of a step is the mean over the K clients, and
so are the gradients of the server and of the clients (arXiv 2408.13787, section 2); each client normalises by its own
batch, and the running statistics are averaged over the clients.

The two agree to float32 rounding, as their sums have another order, except where rounding moves a value over the edge
between two codes; with codecs that round nothing the tests hold every array to 1e-5 of its norm.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from msjax.split import budget, shards
from msjax.split.payloads import Payload
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, split_key, tail_key, with_changed
from msjax.split.trees import float_leaves, mean, with_float_leaves


class StepMetrics(NamedTuple):
    """Of one step or one test batch: the mean loss, and each metric's sums, over all clients."""

    loss: jax.Array
    sums: dict[str, jax.Array]
    uplink_bytes: jax.Array | float = 0.0
    """About the bytes of all clients' messages of features and gradients; only of the fused step, where a codec is
    `entropy_coded`, since all others' bytes follow from shapes. See `wire.estimate_bytes`. Where averages are
    compressed, (2,): of features and gradients, and of averages."""
    downlink_bytes: jax.Array | float = 0.0
    losses: jax.Array | None = None
    """(K,), each client's mean loss, of a training step."""


class Pending(NamedTuple):
    """What a party keeps between its forward and its backward pass."""

    vjp: Any
    stats: PyTree
    payload: Payload = ()
    """Of the features, where their gradient is sent only for what was kept of them, or both have one budget: what a
    client sent; at the server, U-shaped, what it got from the clients and what it sent to their tails."""


class PartUpdate(NamedTuple):
    """What a client contributes to the average of a step: gradients, and those new statistics that change."""

    grads: PyTree
    stats: PyTree


def client_forward(
    spec: RunSpec, client: PartState, x: Any, key: jax.Array, up_bits: jax.Array | None = None
) -> tuple[Payload, Pending]:
    """Returns the payload of one client's features of its batch `x`, and what its backward pass needs.

    Args:
      up_bits: where there is a budget for the cut, what the client aims its features at; see `budget`.
    """
    h, pending = client_features(spec, client, x, key)
    batch_size = jax.tree.leaves(x)[0].shape[0]
    payload = spec.feature_payload(batch_size).encode(h, split_key(key).codec, up_bits)
    return payload, with_payload(spec, pending, payload)


def with_payload(spec: RunSpec, pending: Pending, payload: Payload) -> Pending:
    """Returns what is kept, with the payload that was sent where the backward pass needs it."""
    needed = spec.grad_kept_only or spec.cut_bits is not None
    return pending._replace(payload=payload) if needed else pending


def client_features(spec: RunSpec, client: PartState, x: Any, key: jax.Array) -> tuple[Any, Pending]:
    """Returns one client's features before they are encoded, and what its backward pass needs."""

    def forward(params):
        h, stats = spec.client(params, client.stats, x, train=True, key=split_key(key).client)
        return float_leaves(h), (stats, h)

    _, vjp, (stats, h) = jax.vjp(forward, client.params, has_aux=True)
    return h, Pending(vjp, stats)


def server_step(
    spec: RunSpec,
    server: PartState,
    payloads: Payload,
    y: Any,
    keys: jax.Array,
    grad_bits: jax.Array | None = None,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[PartState, Payload, StepMetrics]:
    """Takes the server's step on the stacked payloads of K clients.

    Decodes, differentiates each client's loss at its decoded features, updates the server with the mean gradient.

    Args:
      payloads: the clients' payloads, each array with a leading axis K.
      y: labels (K, B, …).
      keys: the clients' keys of this step (K,), the same that `client_forward` got.
      grad_bits: where the budget follows each client's link, the most bits that their gradients may take, float32 (K,).
      batch_size: B.
      mesh: over whose devices the server's part is sharded and the batch spread, see `shards`; None for one device.

    Returns:
      The new state; the replies, payloads of the features' gradients with a leading axis K; and the metrics.
    """
    h = shards.by_client(mesh, spec.feature_payload(batch_size).decode, (), (payloads,))

    def total_loss(params, floats):
        # The sum, not the mean: the gradient of a client's features is then that of its own loss.
        outputs, stats = server_outputs(spec, params, server.stats, with_float_leaves(h, floats), keys, mesh)
        losses = jax.vmap(lambda outputs, y: spec.task.losses(outputs, y, train=True).mean())(outputs, y)
        return losses.sum(), (losses, stats, jax.vmap(spec.task.sums)(outputs, y))

    def reply(payload, g, key, grad_bits):
        gradients = spec.gradient_payload(batch_size)
        return gradients.encode(gradients.take_kept(payload, g), split_key(key).codec, grad_bits)

    differentiated = jax.grad(total_loss, argnums=(0, 1), has_aux=True)
    (grads, g), (losses, stats, sums) = differentiated(server.params, float_leaves(h))
    replies = shards.by_client(mesh, reply, (), (payloads, g, keys, grad_bits))
    grads = jax.tree.map(lambda leaf: leaf / len(keys), grads)
    server = update_server(spec, server, PartUpdate(grads, mean(stats)), mesh)
    return server, replies, StepMetrics(losses.mean(), add_up(sums), losses=losses)


def server_outputs(
    spec: RunSpec, params: PyTree, stats: PyTree, h: Any, keys: jax.Array, mesh: Mesh | None = None
) -> tuple[Any, PyTree]:
    """Returns the server's outputs of the features of K clients in a training step, and statistics, one a client.

    Args:
      h: features (K, B, …); keys: the clients' of this step.
      mesh: as of `server_step`.
    """

    def run(params, stats, h, keys):
        def one_client(h, key):
            return spec.server(params, stats, h, train=True, key=split_key(key).server)

        return jax.vmap(one_client)(h, keys)

    return shards.with_gathered(mesh, run, (params, stats), shards.spread_batch(mesh, h), keys)


def update_server(spec: RunSpec, server: PartState, update: PartUpdate, mesh: Mesh | None = None) -> PartState:
    """Returns the server's new state after the optimizer's step, sharded where there is a mesh."""
    update = update._replace(grads=shards.constrain(mesh, update.grads))
    return shards.constrain(mesh, update_part(spec, server, update))


def server_forward(
    spec: RunSpec,
    server: PartState,
    payloads: Payload,
    keys: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[Payload, Pending]:
    """Returns the payloads for the clients' tails, with a leading axis K, and what the backward pass needs."""
    features = payloads
    h = shards.by_client(mesh, spec.feature_payload(batch_size).decode, (), (features,))

    def forward(params, floats):
        outputs, stats = server_outputs(spec, params, server.stats, with_float_leaves(h, floats), keys, mesh)
        return float_leaves(outputs), (stats, outputs)

    _, vjp, (stats, outputs) = jax.vjp(forward, server.params, float_leaves(h), has_aux=True)

    def encode(outputs, key):
        return spec.tail_feature_payload(batch_size).encode(outputs, tail_key(split_key(key).codec))

    payloads = shards.by_client(mesh, encode, (), (outputs, keys))
    kept = (features, payloads) if spec.grad_kept_only else ()
    return payloads, Pending(vjp, stats, kept)


def client_tail(
    spec: RunSpec, client: PartState, payload: Payload, y: Any, key: jax.Array, *, batch_size: int
) -> tuple[Payload, PartUpdate, StepMetrics]:
    """Returns the payload of one client's gradient for the server, the tail's part of its update, and the metrics."""
    g, update, metrics = client_tail_gradient(spec, client, payload, y, key, batch_size=batch_size)
    payload = spec.tail_gradient_payload(batch_size).encode(g, tail_key(split_key(key).codec))
    return payload, update, metrics


def client_tail_gradient(
    spec: RunSpec, client: PartState, payload: Payload, y: Any, key: jax.Array, *, batch_size: int
) -> tuple[list, PartUpdate, StepMetrics]:
    """Returns the same with the gradient, what is sent of it, before it is encoded."""
    h = spec.tail_feature_payload(batch_size).decode(payload)

    def loss(params, floats):
        h_ = with_float_leaves(h, floats)
        outputs, stats = spec.tail(params, client.stats, h_, train=True, key=split_key(key).client)
        return spec.task.losses(outputs, y, train=True).mean(), (stats, outputs)

    differentiated = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, (stats, outputs)), (grads, g) = differentiated(client.params, float_leaves(h))
    g = spec.tail_gradient_payload(batch_size).take_kept(payload, g)
    return g, PartUpdate(grads, stats), StepMetrics(value, spec.task.sums(outputs, y))


def server_backward(
    spec: RunSpec,
    server: PartState,
    pending: Pending,
    payloads: Payload,
    keys: jax.Array,
    present: jax.Array,
    grad_bits: jax.Array | None = None,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
) -> tuple[PartState, Payload]:
    """Takes the server's backward pass from the tails' payloads.

    Args:
      present: bool (K,): the gradient is the mean over these clients; of the others the payload does not count.
      grad_bits: as of `server_step`.

    Returns:
      The new state, and the replies with a leading axis K.
    """

    def only_present(g):
        return jnp.where(present.reshape(-1, *(1,) * (g.ndim - 1)), g, 0)

    features, outputs = pending.payload or ((), ())
    received, sent = spec.tail_gradient_payload(batch_size), spec.gradient_payload(batch_size)

    def decode(outputs, payload):
        return received.put_kept(outputs, received.decode(payload))

    def reply(features, g, key, grad_bits):
        return sent.encode(sent.take_kept(features, g), split_key(key).codec, grad_bits)

    g = shards.by_client(mesh, decode, (), (outputs, payloads))
    grads, g = pending.vjp(jax.tree.map(only_present, g))
    grads = jax.tree.map(lambda leaf: leaf / present.sum(), grads)
    replies = shards.by_client(mesh, reply, (), (features, g, keys, grad_bits))
    return update_server(spec, server, PartUpdate(grads, mean(pending.stats)), mesh), replies


def client_backward(
    spec: RunSpec, pending: Pending, reply: Payload, tail: PartUpdate | None = None, *, batch_size: int
) -> PartUpdate:
    """Takes one client's backward pass from the server's reply.

    Args:
      tail: what `client_tail` gave, where there is one.

    Returns:
      Its gradients and statistics, to be averaged over the clients or applied.
    """
    gradients = spec.gradient_payload(batch_size)
    (grads,) = pending.vjp(gradients.put_kept(pending.payload, gradients.decode(reply)))
    if tail is None:
        return PartUpdate(grads, pending.stats)
    # Each is zero where the other is not.
    return PartUpdate(jax.tree.map(jnp.add, grads, tail.grads), pending.stats | tail.stats)


def next_up_bits(
    spec: RunSpec,
    up_bits: jax.Array,
    pending: Pending,
    reply: Payload,
    budgets: tuple[jax.Array, jax.Array] | None = None,
    *,
    batch_size: int,
) -> jax.Array:
    """Returns the bits that a client aims its next features at, given its last messages; see `budget`."""
    sent = spec.feature_payload(batch_size).estimated_bytes(pending.payload)
    sent += spec.gradient_payload(batch_size).estimated_bytes(reply)
    return budget.next_up_bits(spec, up_bits, sent, batch_size, budgets)


def update_part(spec: RunSpec, part: PartState, update: PartUpdate) -> PartState:
    """Returns a part's new state after the optimizer's step; what of its stats never changes is not in the update."""
    updates, opt_state = spec.optimizer.update(update.grads, part.opt_state, part.params)
    return PartState(optax.apply_updates(part.params, updates), with_changed(part.stats, update.stats), opt_state)


def add_up(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns each metric's sums over the leading axis."""
    return {name: value.sum(0) for name, value in sums.items()}


def score(spec: RunSpec, outputs: Any, y: Any) -> StepMetrics:
    """Returns the test loss and metrics of one batch."""
    return StepMetrics(spec.task.losses(outputs, y, train=False).mean(), spec.task.sums(outputs, y))


def client_test_features(spec: RunSpec, client: Any, x: Any) -> Any:
    """Returns a client's features of a test batch, with running statistics, before they are encoded.

    `client` is anything with `params` and `stats`.
    """
    return spec.client(client.params, client.stats, x, train=False, key=None)[0]


def server_test_outputs(
    spec: RunSpec, server: Any, payload: Payload, key: jax.Array, *, batch_size: int, mesh: Mesh | None = None
) -> Any:
    """Returns the server's outputs of such a payload; U-shaped, the payload for the client's tail."""
    h = spec.test_payload(batch_size).decode(payload)
    run = functools.partial(spec.server, train=False, key=None)
    h = shards.spread_batch(mesh, h, axes=1)
    outputs, _ = shards.with_gathered(mesh, run, (server.params, server.stats), h)
    return spec.tail_test_payload(batch_size).encode(outputs, tail_key(key)) if spec.u_shaped else outputs


def client_test_outputs(spec: RunSpec, client: Any, payload: Payload, *, batch_size: int) -> Any:
    """Returns the outputs of a client's tail."""
    h = spec.tail_test_payload(batch_size).decode(payload)
    return spec.tail(client.params, client.stats, h, train=False, key=None)[0]

"""One training step, two ways: as the parties take it, and fused into one program.

As the parties take it, with a codec's payload between them:

    payload, pending = client_forward(setup, client, x, key)                   # on each client
    server, replies, info = server_step(setup, server, payloads, y, keys, features)    # on the server, for K clients
    update = client_backward(setup, pending, reply, features)                  # on each client
    client = client_update(setup, client, mean_of(updates))                    # averaged, so that all clients stay
    equal

In one program `fused_step` computes the same through `straight_through`. Both follow the paper: the loss of a step is
the mean over the K clients, and so are the gradients of the server and of the clients (arXiv 2408.13787, section 2);
each client normalises by its own batch, and the running statistics are averaged over the clients.

The two agree to float32 rounding, as their sums have another order, except where rounding moves a value over the edge
between two codes; the tests hold every updated parameter to 2e-4 of the largest in its array.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from msjax import compress, models


@dataclasses.dataclass(frozen=True)
class Setup:
    """What does not change from step to step: both halves' functions, the codecs and the optimizer."""

    client: models.Apply
    server: models.Apply
    codec: compress.Codec
    grad_codec: compress.Codec
    optimizer: optax.GradientTransformation
    label_smoothing: float = 0.0
    """Part of the training target that is spread over all classes; the loss on test data has none."""


class HalfState(NamedTuple):
    """What a party carries from step to step."""

    params: PyTree
    stats: PyTree
    opt_state: PyTree


class TrainState(NamedTuple):
    client: HalfState
    server: HalfState
    step: Int[Array, ""]


class Info(NamedTuple):
    """Of one step: the mean loss, and how many samples had their label first, or among the first five."""

    loss: Float[Array, ""]
    top1: Int[Array, ""]
    top5: Int[Array, ""]


class Pending(NamedTuple):
    """What a client keeps between its forward and its backward pass."""

    vjp: Any
    stats: PyTree


class ClientUpdate(NamedTuple):
    """What a client contributes to the average of a step."""

    grads: PyTree
    stats: PyTree


class Keys(NamedTuple):
    """The random keys of one client in one step."""

    augment: jax.Array
    client: jax.Array
    server: jax.Array
    codec: jax.Array


def split_key(key: jax.Array) -> Keys:
    """Returns the keys of each use from the key of one client in one step."""
    return Keys(*jax.random.split(key, len(Keys._fields)))


def init_state(setup: Setup, client: models.Half, server: models.Half) -> TrainState:
    """Returns the state before the first step."""

    def half(h):
        return HalfState(h.params, h.stats, setup.optimizer.init(h.params))

    return TrainState(half(client), half(server), jnp.int32(0))


def features_like(setup: Setup, client: HalfState, x: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of the feature map of a batch like `x`."""
    return jax.eval_shape(lambda p, s, x: setup.client(p, s, x, train=False)[0], client.params, client.stats, x)


def client_forward(setup: Setup, client: HalfState, x: Float[Array, "b ..."], key: jax.Array) -> tuple[tuple, Pending]:
    """One client's forward pass on its batch `x`: the payload for the server, and what the backward pass needs."""
    keys = split_key(key)

    def forward(params):
        return setup.client(params, client.stats, x, train=True, key=keys.client)

    h, vjp, stats = jax.vjp(forward, client.params, has_aux=True)
    return setup.codec.encode(h, keys.codec), Pending(vjp, stats)


def server_step(
    setup: Setup,
    server: HalfState,
    payloads: tuple,
    y: Int[Array, "k b"],
    keys: jax.Array,
    features: jax.ShapeDtypeStruct,
) -> tuple[HalfState, tuple, Info]:
    """The server's step on the stacked payloads of K clients.

    Decodes, differentiates each client's loss at its decoded features, updates the server with the mean gradient.

    Args:
      payloads: the clients' payloads, each array with a leading axis K.
      y: int labels (K, B).
      keys: the clients' keys of this step (K,), the same that `client_forward` got.
      features: shape and dtype of one client's feature map.

    Returns:
      The new state; the replies, payloads of the features' gradients with a leading axis K; and `Info`.
    """

    def one_client(payload, y, key):
        keys = split_key(key)
        h = setup.codec.decode(payload, features)

        def loss(params, h):
            logits, stats = setup.server(params, server.stats, h, train=True, key=keys.server)
            return cross_entropy(logits, y, setup.label_smoothing), (stats, logits)

        (value, (stats, logits)), (grads, g) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(server.params, h)
        reply = setup.grad_codec.encode(g, compress.downlink_key(keys.codec))
        return grads, stats, reply, value, count_correct(logits, y)

    grads, stats, replies, losses, counts = jax.vmap(one_client)(payloads, y, keys)
    server = _update(setup, server, _mean(grads), _mean(stats))
    return server, replies, Info(losses.mean(), counts[0].sum(), counts[1].sum())


def client_backward(setup: Setup, pending: Pending, reply: tuple, features: jax.ShapeDtypeStruct) -> ClientUpdate:
    """One client's backward pass from the server's reply: its gradients, to be averaged over the clients."""
    g = setup.grad_codec.decode(reply, features)
    (grads,) = pending.vjp(g)
    return ClientUpdate(grads, pending.stats)


def client_update(setup: Setup, client: HalfState, update: ClientUpdate) -> HalfState:
    """Every client's new state from the averaged `update`."""
    return _update(setup, client, update.grads, update.stats)


def fused_step(
    setup: Setup,
    state: TrainState,
    x: Float[Array, "k b ..."],
    y: Int[Array, "k b"],
    keys: jax.Array,
    *,
    axis_name: str | None = None,
) -> tuple[TrainState, Info]:
    """The step of K clients in one program; `client_forward` … `client_update` compute the same in several.

    The clients' batches are one `vmap`, whose weights carry no client axis: convolutions and weight gradients see one
    batch of K·B.

    Args:
      x: batches (K, B, …); y: labels (K, B); keys: one a client (K,).
      axis_name: under `shard_map`, the mesh axis over which the clients are spread; K is then this device's share.
    """

    def client_loss(params, x, y, key):
        keys = split_key(key)
        h, client_stats = setup.client(params[0], state.client.stats, x, train=True, key=keys.client)
        h = compress.straight_through(setup.codec, h, keys.codec, setup.grad_codec)
        logits, server_stats = setup.server(params[1], state.server.stats, h, train=True, key=keys.server)
        return cross_entropy(logits, y, setup.label_smoothing), ((client_stats, server_stats), count_correct(logits, y))

    def total_loss(params):
        # The sum, not the mean: the gradient that crosses the cut is then that of one client's loss, as over a network.
        losses, (stats, counts) = jax.vmap(client_loss, in_axes=(None, 0, 0, 0))(params, x, y, keys)
        return losses.sum(), (losses, stats, counts)

    params = (state.client.params, state.server.params)
    grads, (losses, stats, counts) = jax.grad(total_loss, has_aux=True)(params)
    grads = jax.tree.map(lambda g: g / x.shape[0], grads)
    stats, loss, counts = _mean(stats), losses.mean(), [c.sum() for c in counts]
    if axis_name is not None:
        grads, stats, loss = jax.lax.pmean((grads, stats, loss), axis_name)
        counts = jax.lax.psum(counts, axis_name)
    client = _update(setup, state.client, grads[0], stats[0])
    server = _update(setup, state.server, grads[1], stats[1])
    return TrainState(client, server, state.step + 1), Info(loss, *counts)


def evaluate(
    setup: Setup,
    state: TrainState,
    x: Float[Array, "b ..."],
    y: Int[Array, "b"],
    key: jax.Array,
    *,
    codec: compress.Codec | None = None,
) -> Info:
    """Test loss and counts of one batch, with running statistics; through `codec`, or uncompressed if it is None."""
    h, _ = setup.client(state.client.params, state.client.stats, x, train=False)
    if codec is not None:
        h = codec.roundtrip(h, key)
    logits, _ = setup.server(state.server.params, state.server.stats, h, train=False)
    return Info(cross_entropy(logits, y), *count_correct(logits, y))


def cross_entropy(logits: Float[Array, "b c"], y: Int[Array, "b"], label_smoothing: float = 0.0) -> Float[Array, ""]:
    """Returns the mean softmax cross-entropy in nats, in float32.

    With `label_smoothing` s the target is 1 − s at the label plus s/c everywhere (arXiv 1512.00567, section 7).
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    if label_smoothing:
        uniform = jax.nn.logsumexp(logits, axis=1) - logits.mean(axis=1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses.mean()


def count_correct(logits: Float[Array, "b c"], y: Int[Array, "b"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns how many labels have the largest logit, and how many one of the five largest.

    A label's rank is the number of classes above it or beside it with a smaller number; a row with NaN counts as wrong.
    """
    own = jnp.take_along_axis(logits, y[:, None], axis=1)
    before = (logits == own) & (jnp.arange(logits.shape[1])[None] < y[:, None])
    rank = jnp.sum((logits > own) | before, axis=1)
    valid = jnp.isfinite(logits).all(axis=1)
    return jnp.sum(valid & (rank < 1)), jnp.sum(valid & (rank < 5))


def _update(setup, half, grads, stats):
    updates, opt_state = setup.optimizer.update(grads, half.opt_state, half.params)
    return HalfState(optax.apply_updates(half.params, updates), stats, opt_state)


def _mean(tree):
    """The mean over the leading axis of every array."""
    return jax.tree.map(lambda leaf: leaf.mean(0), tree)

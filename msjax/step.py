"""One training step, two ways: as the parties take it, and fused into one program.

As the parties take it, with a codec's payload between them:

    payload, pending = client_forward(setup, client, x, key)                   # on each client
    server, replies, info = server_step(setup, server, payloads, y, keys, features)    # on the server, for K clients
    update = client_backward(setup, pending, reply, features)                  # on each client
    client = client_update(setup, client, mean_of(updates))                    # averaged, so that all clients stay
    equal

Where `Setup.head` is set, the last layers and the labels stay with the client too (U-shaped split learning), and the
server's turn becomes two:

    payloads, pending = server_forward(setup, server, payloads, keys, features)
    payload, update, info = client_head(setup, client, payload, y, key, head_features)          # on each client
    server, replies = server_backward(setup, server, pending, payloads, keys, here, head_features)
    update = client_backward(setup, pending, reply, features, update)                           # on each client

In one program `fused_step` computes the same through `straight_through`. Both follow the paper: the loss of a step is
the mean over the K clients, and so are the gradients of the server and of the clients (arXiv 2408.13787, section 2);
each client normalises by its own batch, and the running statistics are averaged over the clients.

The two agree to float32 rounding, as their sums have another order, except where rounding moves a value over the edge
between two codes; with codecs that round nothing the tests hold every array to 1e-5 of its norm.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from msjax import compress, models, wire


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
    head: models.Apply | None = None
    """The layers behind the server's, on the client, which then keeps its labels; its state is in the client's half."""


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
    uplink_bytes: Float[Array, ""] | float = 0.0
    """About the bytes of all clients' messages of features and gradients; only of `fused_step`, where a codec is
    `entropy_coded`, since all others' bytes follow from shapes. See `wire.estimate_bytes`."""
    downlink_bytes: Float[Array, ""] | float = 0.0


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


def head_key(key: jax.Array) -> jax.Array:
    """Returns the key of the codec between server and head, given that of the codec between client and server."""
    return jax.random.fold_in(key, 1 << 30)


def init_half(setup: Setup, *halves: models.Half) -> HalfState:
    """Returns what a party that has these parts of the model starts with."""
    params = {name: value for half in halves for name, value in half.params.items()}
    stats = {name: value for half in halves for name, value in half.stats.items()}
    return HalfState(params, stats, setup.optimizer.init(params))


def init_state(setup: Setup, client: models.Half, server: models.Half, *head: models.Half) -> TrainState:
    """Returns the state before the first step; `head` is given where `setup` has one."""
    return TrainState(init_half(setup, client, *head), init_half(setup, server), jnp.int32(0))


def features_like(setup: Setup, client: HalfState, x: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of the feature map of a batch like `x`."""
    return jax.eval_shape(lambda p, s, x: setup.client(p, s, x, train=False)[0], client.params, client.stats, x)


def head_features_like(setup: Setup, server: HalfState, features: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of what the server makes of features like `features`: what the head gets."""
    return jax.eval_shape(lambda p, s, h: setup.server(p, s, h, train=False)[0], server.params, server.stats, features)


def client_forward(setup: Setup, client: HalfState, x: Shaped[Array, "b ..."], key: jax.Array) -> tuple[tuple, Pending]:
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


def server_forward(
    setup: Setup, server: HalfState, payloads: tuple, keys: jax.Array, features: jax.ShapeDtypeStruct
) -> tuple[tuple, Pending]:
    """The server's forward pass where the head is the clients': payloads for their heads, with a leading axis K."""

    def forward(params, h):
        def one_client(h, key):
            return setup.server(params, server.stats, h, train=True, key=split_key(key).server)

        return jax.vmap(one_client)(h, keys)

    h = jax.vmap(lambda payload: setup.codec.decode(payload, features))(payloads)
    out, vjp, stats = jax.vjp(forward, server.params, h, has_aux=True)
    payloads = jax.vmap(lambda out, key: setup.codec.encode(out, head_key(split_key(key).codec)))(out, keys)
    return payloads, Pending(vjp, stats)


def client_head(
    setup: Setup, client: HalfState, payload: tuple, y: Int[Array, "b"], key: jax.Array, features: jax.ShapeDtypeStruct
) -> tuple[tuple, ClientUpdate, Info]:
    """One client's loss: the payload of its gradient for the server, the head's part of its update, and `Info`.

    `features` is shape and dtype of what the head gets.
    """
    keys = split_key(key)
    h = setup.codec.decode(payload, features)

    def loss(params, h):
        logits, stats = setup.head(params, client.stats, h, train=True, key=keys.client)
        return cross_entropy(logits, y, setup.label_smoothing), (stats, logits)

    (value, (stats, logits)), (grads, g) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(client.params, h)
    payload = setup.grad_codec.encode(g, compress.downlink_key(head_key(keys.codec)))
    return payload, ClientUpdate(grads, stats), Info(value, *count_correct(logits, y))


def server_backward(
    setup: Setup,
    server: HalfState,
    pending: Pending,
    payloads: tuple,
    keys: jax.Array,
    here: Bool[Array, "K"],
    features: jax.ShapeDtypeStruct,
) -> tuple[HalfState, tuple]:
    """The server's backward pass from the heads' payloads: its new state, and the replies with a leading axis K.

    The gradient is the mean over the clients that are `here`; of the others the payload does not count.
    """
    g = jax.vmap(lambda payload: setup.grad_codec.decode(payload, features))(payloads)
    g = jnp.where(here.reshape(-1, *(1,) * (g.ndim - 1)), g, 0)
    grads, g = pending.vjp(g)
    grads = jax.tree.map(lambda leaf: leaf / here.sum(), grads)
    encode = lambda g, key: setup.grad_codec.encode(g, compress.downlink_key(split_key(key).codec))  # noqa: E731
    return _update(setup, server, grads, _mean(pending.stats)), jax.vmap(encode)(g, keys)


def client_backward(
    setup: Setup,
    pending: Pending,
    reply: tuple,
    features: jax.ShapeDtypeStruct,
    head: ClientUpdate | None = None,
) -> ClientUpdate:
    """One client's backward pass from the server's reply: its gradients, to be averaged over the clients.

    `head` is what `client_head` gave.
    """
    g = setup.grad_codec.decode(reply, features)
    (grads,) = pending.vjp(g)
    update = ClientUpdate(grads, pending.stats)
    if head is None:
        return update
    # Each is zero where the other is not.
    return ClientUpdate(jax.tree.map(jnp.add, update.grads, head.grads), update.stats | head.stats)


def client_update(setup: Setup, client: HalfState, update: ClientUpdate) -> HalfState:
    """Every client's new state from the averaged `update`."""
    return _update(setup, client, update.grads, update.stats)


def fused_step(
    setup: Setup,
    state: TrainState,
    x: Shaped[Array, "k b ..."],
    y: Int[Array, "k b"],
    keys: jax.Array,
    *,
    axis_name: str | None = None,
    own_halves: bool = False,
) -> tuple[TrainState, Info]:
    """The step of K clients in one program; `client_forward` … `client_update` compute the same in several.

    The clients' batches are one `vmap`. Where all clients have the same half its weights carry no client axis:
    convolutions and weight gradients see one batch of K·B.

    Args:
      x: batches (K, B, …); y: labels (K, B); keys: one a client (K,).
      axis_name: under `shard_map`, the mesh axis over which the clients are spread; K is then this device's share.
      own_halves: every client has a half of its own and updates it by itself (SplitFed between two averages); the
        arrays of `state.client` then have a leading axis K.
    """

    def client_loss(params, meters, client_stats, x, y, key):
        keys = split_key(key)
        h, new_stats = setup.client(params[0], client_stats, x, train=True, key=keys.client)
        h, up = _cross(setup, h, keys.codec, meters[0])
        down = jnp.float32(0)
        logits, server_stats = setup.server(params[1], state.server.stats, h, train=True, key=keys.server)
        if setup.head is not None:
            h, down = _cross(setup, logits, head_key(keys.codec), meters[1])
            logits, head_stats = setup.head(params[0], client_stats, h, train=True, key=keys.client)
            new_stats = new_stats | head_stats
        loss = cross_entropy(logits, y, setup.label_smoothing)
        return loss, ((new_stats, server_stats), count_correct(logits, y), (up, down))

    client_axis = 0 if own_halves else None

    def total_loss(params, meters):
        # The sum, not the mean: the gradient that crosses the cut is then that of one client's loss, as over a network.
        axes = ((client_axis, None), 0, client_axis, 0, 0, 0)
        losses, aux = jax.vmap(client_loss, in_axes=axes)(params, meters, state.client.stats, x, y, keys)
        return losses.sum(), (losses, *aux)

    def over_devices(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    params = (state.client.params, state.server.params)
    grads, aux = jax.grad(total_loss, argnums=(0, 1), has_aux=True)(params, jnp.zeros((x.shape[0], 2), jnp.float32))
    (client_grads, server_grads), gradient_bytes = grads
    grads_down, grads_up = gradient_bytes.sum(0)
    losses, (client_stats, server_stats), counts, (features_up, features_down) = aux
    if own_halves:
        client = jax.vmap(lambda *half: _update(setup, *half))(state.client, client_grads, client_stats)
    else:
        mean_grads = jax.tree.map(lambda g: g / x.shape[0], client_grads)
        client = _update(setup, state.client, *over_devices((mean_grads, _mean(client_stats))))
    mean_grads = jax.tree.map(lambda g: g / x.shape[0], server_grads)
    server = _update(setup, state.server, *over_devices((mean_grads, _mean(server_stats))))
    loss = over_devices(losses.mean())
    totals = [*(c.sum() for c in counts), features_up.sum() + grads_up, features_down.sum() + grads_down]
    if axis_name is not None:
        totals = jax.lax.psum(totals, axis_name)
    return TrainState(client, server, state.step + 1), Info(loss, *totals)


def _cross(setup, h, key, meter):
    """Features behind the cut, and about the bytes they take; those of their gradient are the gradient of `meter`."""
    passed = compress.straight_through(setup.codec, h, key, setup.grad_codec)
    if not (setup.codec.entropy_coded or setup.grad_codec.entropy_coded):
        return passed, jnp.float32(0)
    up = wire.estimate_bytes(setup.codec.encode(jax.lax.stop_gradient(h), key), setup.codec, h)
    return _metered(setup.grad_codec, passed, key, meter), up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _metered(grad_codec, h, key, meter):
    return h


def _metered_forward(grad_codec, h, key, meter):
    return h, key


def _metered_backward(grad_codec, key, g):
    payload = grad_codec.encode(g, compress.downlink_key(key))
    return g, None, wire.estimate_bytes(payload, grad_codec, g)


_metered.defvjp(_metered_forward, _metered_backward)


def average_halves(client: HalfState, *, axis_name: str | None = None) -> HalfState:
    """Gives every client the mean of all clients' weights and statistics, as SplitFed does; momenta stay their own.

    The arrays of `client` have a leading axis K; `axis_name` is as in `fused_step`.
    """

    def mean(leaf):
        value = leaf.mean(0)
        value = value if axis_name is None else jax.lax.pmean(value, axis_name)
        return jnp.broadcast_to(value, leaf.shape)

    return client._replace(params=jax.tree.map(mean, client.params), stats=jax.tree.map(mean, client.stats))


def evaluate(
    setup: Setup,
    state: TrainState,
    x: Shaped[Array, "b ..."],
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
    if setup.head is not None:
        h = logits if codec is None else codec.roundtrip(logits, head_key(key))
        logits, _ = setup.head(state.client.params, state.client.stats, h, train=False)
    return score(logits, y)


def infer_features(
    apply: models.Apply, codec: compress.Codec, client: Any, x: Shaped[Array, "b ..."], key: Any
) -> tuple:
    """A client's payload of a test batch, with running statistics; `client` is anything with `params` and `stats`."""
    h, _ = apply(client.params, client.stats, x, train=False)
    return codec.encode(h, key)


def infer_outputs(
    apply: models.Apply,
    codec: compress.Codec,
    server: Any,
    payload: tuple,
    key: Any,
    features: jax.ShapeDtypeStruct,
    *,
    to_head: bool,
) -> Any:
    """The server's logits of such a payload; with `to_head`, the payload for the client's head, by the same codec."""
    h, _ = apply(server.params, server.stats, codec.decode(payload, features), train=False)
    return codec.encode(h, head_key(key)) if to_head else h


def infer_logits(
    apply: models.Apply, codec: compress.Codec, client: Any, payload: tuple, features: jax.ShapeDtypeStruct
) -> Float[Array, "b c"]:
    """The logits of a client's head; `features` is shape and dtype of what it gets."""
    logits, _ = apply(client.params, client.stats, codec.decode(payload, features), train=False)
    return logits


def score(logits: Float[Array, "b c"], y: Int[Array, "b"]) -> Info:
    """Returns the test loss and counts of one batch."""
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

    A label's rank is the number of classes above it or beside it with a smaller number; a row with NaN or ±Inf counts
    as wrong.
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

"""One training step of K clients in one program; `step` computes the same in several."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from msjax import compress, wire
from msjax.split import averages, budget
from msjax.split.payloads import Codecs, encode_at_bits, leaf_key
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, TrainState, split_key, tail_key
from msjax.split.step import PartUpdate, StepMetrics, add_up, score, update_part
from msjax.split.trees import TreeSpec, is_float, mean


def fused_step(
    spec: RunSpec,
    state: TrainState,
    x: Any,
    y: Any,
    keys: jax.Array,
    *,
    axis_name: str | None = None,
    own_parts: bool = False,
) -> tuple[TrainState, StepMetrics]:
    """Takes the step of K clients in one program.

    The clients' batches are one `vmap`. Where all clients have the same part its weights carry no client axis:
    convolutions and weight gradients see one batch of K·B.

    Args:
      x: batches (K, B, …); y: labels (K, B, …); keys: one a client (K,).
      axis_name: under `shard_map`, the mesh axis over which the clients are spread; K is then this device's share.
      own_parts: every client has a part of its own and updates it by itself (SplitFed between two averages); the
        arrays of `state.client` then have a leading axis K, but for those that never change, which all share.

    Returns:
      The state after the step; and its metrics, over all devices but for `losses`, which are this device's clients'.
    """
    clients = keys.shape[0]
    grad_bits = None
    if spec.cut_seconds is not None:
        grad_bits = jnp.asarray(budget.grad_bits(spec, spec.link_bytes_per_second))
    compressed = spec.compresses_updates and not own_parts

    def client_loss(params, byte_slots, client_stats, x, y, key, bits):
        keys = split_key(key)
        h, new_stats = spec.client(params[0], client_stats, x, train=True, key=keys.client)
        kept_only = spec.grad_kept_only
        aims = {"bits": bits, "grad_bits": grad_bits}
        h, up = cross_cut(spec.codec, spec.grad_codec, h, keys.codec, byte_slots[0], kept_only=kept_only, **aims)
        down = jnp.float32(0)
        outputs, server_stats = spec.server(params[1], state.server.stats, h, train=True, key=keys.server)
        if spec.u_shaped:
            grad_codec = Codecs(spec.grad_codec.default)
            tail_keys = tail_key(keys.codec)
            h, down = cross_cut(spec.tail_codec, grad_codec, outputs, tail_keys, byte_slots[1], kept_only=kept_only)
            outputs, tail_stats = spec.tail(params[0], client_stats, h, train=True, key=keys.client)
            new_stats = new_stats | tail_stats
        loss = spec.task.losses(outputs, y, train=True).mean()
        return loss, ((new_stats, server_stats), spec.task.sums(outputs, y), (up, down))

    constants = spec.client_constants
    stats_axis = _axes_of(state.client.stats, constants) if own_parts else None
    params_axis = 0 if own_parts or compressed else None

    def total_loss(params, byte_slots):
        # The sum, not the mean: the gradient that crosses the cut is then that of one client's loss, as over a network.
        axes = ((params_axis, None), 0, stats_axis, 0, 0, 0, 0)
        args = (params, byte_slots, state.client.stats, x, y, keys, state.up_bits)
        losses, aux = jax.vmap(client_loss, in_axes=axes)(*args)
        return losses.sum(), (losses, *aux)

    def over_devices(tree):
        if axis_name is None:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axis_name) if is_float(leaf) else leaf, tree)

    client_params = state.client.params
    if compressed:  # the gradient of each client is needed, not of their sum alone
        client_params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), client_params)
    params = (client_params, state.server.params)
    byte_slots = jnp.zeros((clients, 2), jnp.float32)
    grads, aux = jax.grad(total_loss, argnums=(0, 1), has_aux=True)(params, byte_slots)
    (client_grads, server_grads), gradient_bytes = grads
    grads_down, grads_up = gradient_bytes.sum(0)
    losses, (client_stats, server_stats), sums, (features_up, features_down) = aux

    def mean_update(grads, stats):
        grads = jax.tree.map(lambda g: g / clients, grads)
        return PartUpdate(*over_devices((grads, mean(stats))))

    if own_parts:
        own = state.client.without(constants)
        client = jax.vmap(lambda part, *update: update_part(spec, part, PartUpdate(*update)))(
            own, client_grads, client_stats
        ).with_constants_of(state.client, constants)
    elif compressed:
        update, found = averages.average_update(
            spec, PartUpdate(client_grads, client_stats), state.client.stats, state.memory, keys, axis_name
        )
        client = update_part(spec, state.client, update)
    else:
        client = update_part(spec, state.client, mean_update(client_grads, client_stats))
    server = update_part(spec, state.server, mean_update(server_grads, server_stats))
    loss = over_devices(losses.mean())
    totals = (add_up(sums), features_up.sum() + grads_up, features_down.sum() + grads_down)
    if axis_name is not None:
        totals = jax.lax.psum(totals, axis_name)
    metrics = StepMetrics(loss, *totals, losses)
    memory = state.memory
    if compressed:
        sent = average_bytes(spec, found, clients)
        memory, metrics = found.memory, with_average_bytes(spec, metrics, sent, axis_name)
    up_bits = state.up_bits
    if spec.cut_bits is not None:
        sent, batch_size = features_up + gradient_bytes[:, 0], jax.tree.leaves(x)[0].shape[1]
        fixed = budget.budget_bits(spec, spec.link_bytes_per_second)
        up_bits = budget.next_up_bits(spec, up_bits, sent, batch_size, None if grad_bits is None else (fixed, fixed))
    return TrainState(client, server, state.step + 1, memory, up_bits), metrics


def _axes_of(stats, constants):
    """For `vmap`: the leading axis of clients, which what never changes has not."""
    return {name: None if name in constants else 0 for name in stats} if constants else 0


def average_bytes(spec: RunSpec, found: averages.Exchanged, clients: int) -> tuple[jax.Array, jax.Array]:
    """Returns about the bytes of an average's messages up and down, of this device's clients; 0 if they follow."""
    if not spec.update_codec.entropy_coded:
        return jnp.float32(0), jnp.float32(0)

    def size(payloads):
        likes = spec.average_payload().likes
        return sum(wire.estimate_bytes(p, spec.update_codec, like) for p, like in zip(payloads, likes, strict=True))

    return jax.vmap(size)(found.payloads).sum(), size(found.answer) * clients


def with_average_bytes(
    spec: RunSpec, metrics: StepMetrics, sent: tuple[jax.Array, jax.Array], axis_name: str | None
) -> StepMetrics:
    """Returns a step's metrics with the bytes of its average beside those that crossed the cut."""
    up, down = sent if axis_name is None else jax.lax.psum(sent, axis_name)
    return metrics._replace(
        uplink_bytes=jnp.stack([metrics.uplink_bytes, up]), downlink_bytes=jnp.stack([metrics.downlink_bytes, down])
    )


def cross_cut(
    codecs: Codecs,
    grad_codecs: Codecs,
    h: Any,
    key: jax.Array,
    byte_slot: jax.Array,
    *,
    kept_only: bool = False,
    bits: jax.Array | None = None,
    grad_bits: jax.Array | None = None,
) -> tuple[Any, jax.Array]:
    """Takes the features of one client over the cut, in one program.

    Args:
      h: features, a tree of arrays of a batch.
      byte_slot: float32 (), a zero. A backward pass returns nothing but gradients, so the bytes of the gradients'
        messages are returned as the gradient of this argument.
      kept_only: gradients are sent only where the features were kept.
      bits: what features are aimed at, in place of their codecs' own targets.
      grad_bits: the same of the gradients, of which `grad_codecs` may need fewer.

    Returns:
      The features as they are behind the cut, whose gradient goes through `grad_codecs`; and about the bytes of their
      message, 0 where they follow from shapes.
    """
    spec = TreeSpec.of(h)
    crossed, up = [], jnp.float32(0)
    pairs = zip(codecs.for_tree(spec), grad_codecs.for_tree(spec, "grad_codec"), strict=True)
    for place, (leaf, (codec, grad_codec)) in enumerate(zip(jax.tree.leaves(h), pairs, strict=True)):
        if not is_float(leaf):
            crossed.append(leaf)
            continue
        leaf_key_ = leaf_key(key, place)
        if codecs.entropy_coded or grad_codecs.entropy_coded:
            payload = encode_at_bits(codec, jax.lax.stop_gradient(leaf), leaf_key_, bits)
            up += wire.estimate_bytes(payload, codec, leaf)
            decoded = codec.decode(payload, leaf)
            args = (codec if kept_only else None, grad_codec, leaf, decoded, payload, leaf_key_, grad_bits, byte_slot)
            crossed.append(_cross_counted(*args))
        else:
            crossed.append(compress.straight_through(codec, leaf, leaf_key_, grad_codec, kept_only=kept_only))
    return jax.tree.unflatten(spec.structure, crossed), up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_counted(keeper, grad_codec, h, decoded, payload, key, grad_bits, byte_slot):
    """Returns `decoded`, the features `h` behind the cut, of which `keeper` kept some if there is one.

    The gradient of `h` is as `grad_codec` transmits it, and that of `byte_slot` is about the bytes of its message.
    """
    return decoded


def _cross_forward(keeper, grad_codec, h, decoded, payload, key, grad_bits, byte_slot):
    return decoded, (payload, key, grad_bits)


def _cross_backward(keeper, grad_codec, residuals, g):
    payload, key, grad_bits = residuals
    sent = g if keeper is None else keeper.take_kept(payload, g)
    message = encode_at_bits(grad_codec, sent, compress.downlink_key(key), grad_bits)
    received = grad_codec.decode(message, sent)
    received = received if keeper is None else keeper.put_kept(payload, received, g)
    return received, None, None, None, None, wire.estimate_bytes(message, grad_codec, sent)


_cross_counted.defvjp(_cross_forward, _cross_backward)


def average_parts(client: PartState, *, axis_name: str | None = None, momenta: bool = False) -> PartState:
    """Gives every client the mean of all clients' weights and statistics.

    Args:
      client: parts whose arrays have a leading axis K, without what never changes.
      axis_name: as in `fused_step`.
      momenta: whether these are averaged, too; else they stay each client's own.
    """

    def average(leaf):
        if not is_float(leaf):
            return leaf
        value = leaf.mean(0)
        value = value if axis_name is None else jax.lax.pmean(value, axis_name)
        return jnp.broadcast_to(value, leaf.shape)

    averaged = jax.tree.map(average, client)
    return averaged if momenta else averaged._replace(opt_state=client.opt_state)


def evaluate(spec: RunSpec, state: TrainState, x: Any, y: Any, key: jax.Array) -> StepMetrics:
    """Returns test loss and metrics of one batch, with running statistics, through the test codec."""

    def cross(codecs, h, key):
        leaves, structure = jax.tree.flatten(h)
        of_leaf = zip(codecs.for_tree(TreeSpec.of(h)), leaves, strict=True)
        through = [codec.roundtrip(leaf, leaf_key(key, place)) for place, (codec, leaf) in enumerate(of_leaf)]
        return jax.tree.unflatten(structure, through)

    client, server = state.client, state.server
    h, _ = spec.client(client.params, client.stats, x, train=False, key=None)
    outputs, _ = spec.server(server.params, server.stats, cross(spec.test_codec, h, key), train=False, key=None)
    if spec.u_shaped:
        h = cross(Codecs(spec.test_codec.default), outputs, tail_key(key))
        outputs, _ = spec.tail(client.params, client.stats, h, train=False, key=None)
    return score(spec, outputs, y)

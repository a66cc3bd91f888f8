"""One training step of K clients in one program; `step` computes the same in several.

A step is two parts, so that its clients may come in groups: `contribute` computes what some of them contribute, and
`finish` takes the step from what all of them have. The first holds all activations, and knows of no other devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from msjax.split import averages, budget, shards
from msjax.split.crossing import cross_cut, cross_in_test
from msjax.split.payloads import Codecs
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, TrainState, split_key, tail_key, without_constants
from msjax.split.step import PartUpdate, StepMetrics, add_up, score, server_outputs, update_part, update_server
from msjax.split.trees import add_floats, is_float, sum_floats, zero_floats


class Totals(NamedTuple):
    """What clients contribute to a step, added up over them; floating arrays in float32 at least, see `sum_floats`."""

    client: Any
    """Gradients and statistics, a `PartUpdate`. Where averages are compressed its `grads` are the vectors that the
    server decodes, and of its `stats` only what is not floating counts; () where every client has a part of its own."""
    server: PartUpdate
    sums: dict[str, jax.Array]
    """Of each metric."""


class PerClient(NamedTuple):
    """What a step finds of each client by itself, float32 with an axis of clients."""

    losses: jax.Array
    """(K,), its mean loss."""
    uplink_bytes: jax.Array
    """(K,), about the bytes of its messages over the cut, where a codec is entropy-coded; else 0."""
    downlink_bytes: jax.Array
    average_bytes: jax.Array
    """(K,), the same of what it sends to be averaged in every step."""


class Contribution(NamedTuple):
    """What some of a step's clients contribute to it."""

    totals: Totals
    found: PerClient
    own: Any
    """What each client has of its own after the step, as `own_of` returns it."""


def fused_step(
    spec: RunSpec,
    state: TrainState,
    x: Any,
    y: Any,
    keys: jax.Array,
    *,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Takes the step of K clients in one program, all at once.

    The clients' batches are one `vmap`. Where all clients have the same part its weights carry no client axis:
    convolutions and weight gradients see one batch of K·B. Where each has weights of its own, see `each_client`.

    Where every client has a part of its own and updates it by itself (SplitFed between two averages), the arrays of
    `state.client` have a leading axis K, but for those that never change, which all share.

    Args:
      x: batches (K, B, …); y: labels (K, B, …); keys: one a client (K,).
      axis_name: under `shard_map`, the mesh axis over which the clients are spread; K is then this device's share.
      mesh: over whose devices the server's part is sharded and the batch spread, see `shards`; then without an
        `axis_name`, as K are all clients.

    Returns:
      The state after the step; and its metrics, over all devices but for `losses`, which are this device's clients'.
    """
    totals, found, own = contribute(spec, state, x, y, keys, mesh=mesh)
    state = with_own(spec, state, own)
    return finish(spec, state, totals, found, keys[0], axis_name=axis_name, mesh=mesh)


def contribute(
    spec: RunSpec,
    state: TrainState,
    x: Any,
    y: Any,
    keys: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> Contribution:
    """Returns what clients contribute to a step, from their batches to their updates; arguments as of `fused_step`.

    They may be some of a step's clients, of whom `state` then has what is theirs alone, see `own_of`.
    """
    clients = keys.shape[0]
    grad_bits = None
    if spec.cut_seconds is not None:
        grad_bits = jnp.asarray(budget.grad_bits(spec, spec.link_bytes_per_second))
    compressed = spec.compresses_updates and not spec.mode.own_parts

    options = {"kept_only": spec.grad_kept_only, "counts": spec.cut_is_coded}

    def trained(network):
        """The part of one client, or its tail, as it computes outputs and new statistics in training."""
        return lambda params, stats, x, key: network(params, stats, x, train=True, key=split_key(key).client)

    def cross(h, key, byte_slot, bits):
        """One client's features as the server gets them, and about their bytes."""
        codecs, aims = (spec.codec, spec.grad_codec), {"bits": bits, "grad_bits": grad_bits}
        return cross_cut(*codecs, h, split_key(key).codec, byte_slot, **options, **aims)

    def cross_to_tail(h, key, byte_slot):
        """The server's outputs as one client's tail gets them, and about their bytes."""
        codecs = spec.tail_codec, Codecs(spec.grad_codec.default)
        return cross_cut(*codecs, h, tail_key(split_key(key).codec), byte_slot, **options)

    aims, constants = _aims(spec, state), spec.client_constants
    stats_axis = _axes_of(state.client.stats, constants) if spec.mode.own_parts else None
    axes = (0 if spec.mode.own_parts or compressed else None, stats_axis)

    def total_loss(params, byte_slots):
        of_clients, down = (params[0], state.client.stats), jnp.zeros(clients, jnp.float32)
        h, client_stats = shards.by_client(mesh, trained(spec.client), of_clients, (x, keys), axes)
        h, up = shards.by_client(mesh, cross, (), (h, keys, byte_slots[:, 0], aims))
        outputs, server_stats = server_outputs(spec, params[1], state.server.stats, h, keys, mesh)
        if spec.u_shaped:
            outputs, down = shards.by_client(mesh, cross_to_tail, (), (outputs, keys, byte_slots[:, 1]))
            outputs, tail_stats = shards.by_client(mesh, trained(spec.tail), of_clients, (outputs, keys), axes)
            client_stats = client_stats | tail_stats
        losses = jax.vmap(lambda outputs, y: spec.task.losses(outputs, y, train=True).mean())(outputs, y)
        aux = (losses, (client_stats, server_stats), jax.vmap(spec.task.sums)(outputs, y), (up, down))
        # The sum, not the mean: the gradient that crosses the cut is then that of one client's loss, as over a network.
        return losses.sum(), aux

    client_params = state.client.params
    if compressed:  # the gradient of each client is needed, not of their sum alone
        client_params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), client_params)
    params = (client_params, state.server.params)
    byte_slots = jnp.zeros((clients, 2), jnp.float32)
    grads, aux = jax.grad(total_loss, argnums=(0, 1), has_aux=True)(params, byte_slots)
    (client_grads, server_grads), gradient_bytes = grads
    losses, (client_stats, server_stats), sums, (features_up, features_down) = aux

    part, error, average_bytes = (), (), jnp.zeros(clients, jnp.float32)
    if spec.mode.own_parts:
        own = state.client.without(constants)
        part = jax.vmap(lambda part, *update: update_part(spec, part, PartUpdate(*update)))(
            own, client_grads, client_stats
        )
        client = ()
    elif compressed:
        vectors = averages.update_vectors(PartUpdate(client_grads, client_stats), state.client.stats)
        sent = averages.send(spec, vectors, state.memory.client.error, keys, mesh=mesh)
        client, error, average_bytes = PartUpdate(sent.total, sum_floats(client_stats)), sent.error, sent.nbytes
    else:
        client = PartUpdate(_wide(client_grads), sum_floats(client_stats))
    totals = Totals(client, PartUpdate(_wide(server_grads), sum_floats(server_stats)), add_up(sums))
    up_bits, batch_size = aims, jax.tree.leaves(x)[0].shape[1]
    if spec.cut_bits is not None:
        sent = features_up + gradient_bytes[:, 0]
        fixed = budget.budget_bits(spec, spec.link_bytes_per_second)
        up_bits = budget.next_up_bits(spec, up_bits, sent, batch_size, None if grad_bits is None else (fixed, fixed))
    up, down = features_up + gradient_bytes[:, 1], features_down + gradient_bytes[:, 0]
    if spec.cut_is_coded:
        up += spec.feature_payload(batch_size).exact_bytes
        down += spec.tail_feature_payload(batch_size).exact_bytes if spec.u_shaped else 0
    return Contribution(totals, PerClient(losses, up, down, average_bytes), (part, error, up_bits))


def _aims(spec, state):
    """What the clients aim their features at; where they hand their part on, each begins its turn anew."""
    if spec.cut_bits is None or not spec.mode.hands_parts_on(spec.schedule):
        return state.up_bits
    starts = spec.mode.turn_starts(spec.schedule, state.step)
    return jnp.where(starts, budget.first_up_bits(spec), state.up_bits)


def zero_totals(spec: RunSpec, state: TrainState) -> Totals:
    """Returns the totals of no client, to which `add_totals` adds those of groups."""
    client = ()
    if not spec.mode.own_parts:
        stats = without_constants(state.client.stats, spec.client_constants)
        grads = averages.no_vectors(spec) if spec.compresses_updates else state.client.params
        client = PartUpdate(*zero_floats((grads, stats)))
    stats = without_constants(state.server.stats, spec.server_constants)
    sums = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in spec.metric_sums_like.items()}
    return Totals(client, PartUpdate(*zero_floats((state.server.params, stats))), sums)


def add_totals(a: Totals, b: Totals) -> Totals:
    """Returns the totals of two groups of clients."""
    sums = jax.tree.map(jnp.add, a.sums, b.sums)
    return Totals(add_floats(a.client, b.client), add_floats(a.server, b.server), sums)


def own_of(spec: RunSpec, state: TrainState) -> Any:
    """Returns of a state what each client has of its own, with a leading axis of clients.

    They are its part but for what never changes, where it has one, the errors of compressed averages, and what it aims
    its features at; () or None for what there is not.
    """
    part = state.client.without(spec.client_constants) if spec.mode.own_parts else ()
    error = state.memory.client.error if spec.compresses_updates and not spec.mode.own_parts else ()
    return part, error, state.up_bits


def with_own(spec: RunSpec, state: TrainState, own: Any) -> TrainState:
    """Returns a state with what `own_of` returns of another: that of some clients, or after a step."""
    part, error, up_bits = own
    if spec.mode.own_parts:
        state = state._replace(client=part.with_constants_of(state.client, spec.client_constants))
    elif spec.compresses_updates:
        memory = state.memory._replace(client=state.memory.client._replace(error=error))
        state = state._replace(memory=memory)
    return state._replace(up_bits=up_bits)


def finish(
    spec: RunSpec,
    state: TrainState,
    totals: Totals,
    found: PerClient,
    first_key: jax.Array,
    *,
    axis_name: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Takes a step from what all of its clients have contributed; other arguments and results as of `fused_step`.

    Args:
      state: before the step, but for what clients have of their own.
      first_key: of the first client here in this step.
    """
    clients = found.losses.shape[0]

    def over_devices(tree):
        if axis_name is None:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axis_name) if is_float(leaf) else leaf, tree)

    def mean(total, like):
        wide = over_devices(jax.tree.map(lambda leaf: leaf / clients if is_float(leaf) else leaf, total))
        return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype) if is_float(leaf) else leaf, wide, like)

    def mean_update(total, part, constants):
        return PartUpdate(mean(total.grads, part.params), mean(total.stats, without_constants(part.stats, constants)))

    client, memory, answer_bytes = state.client, state.memory, jnp.float32(0)
    if spec.compresses_updates and not spec.mode.own_parts:
        vectors = averages.over_devices(totals.client.grads, clients, axis_name)
        first_key = averages.first_of_all(first_key, axis_name)
        means, error, answer_bytes = averages.answer(spec, vectors, state.memory.server.error, first_key)
        update = averages.mean_update(means, state.client, totals.client.stats)
        client = update_part(spec, client, update)
        memory = memory._replace(server=memory.server._replace(error=error))
    elif not spec.mode.own_parts:
        client = update_part(spec, client, mean_update(totals.client, client, spec.client_constants))
    server = mean_update(totals.server, state.server, spec.server_constants)
    server = update_server(spec, state.server, server, mesh)
    loss = over_devices(found.losses.mean())
    sent = (totals.sums, found.uplink_bytes.sum(), found.downlink_bytes.sum())
    if axis_name is not None:
        sent = jax.lax.psum(sent, axis_name)
    metrics = StepMetrics(loss, *sent, found.losses)
    if spec.compresses_updates and not spec.mode.own_parts:
        sent = found.average_bytes.sum(), answer_bytes * clients
        metrics = with_average_bytes(metrics, sent, axis_name)
    return TrainState(client, server, state.step + 1, memory, state.up_bits), metrics


def _wide(tree):
    """A sum over clients as `sum_floats` returns it."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def _axes_of(stats, constants):
    """For `vmap`: the leading axis of clients, which what never changes has not."""
    return {name: None if name in constants else 0 for name in stats} if constants else 0


def with_average_bytes(metrics: StepMetrics, sent: tuple[jax.Array, jax.Array], axis_name: str | None) -> StepMetrics:
    """Returns a step's metrics with the bytes of its average, up and down, beside those that crossed the cut."""
    up, down = sent if axis_name is None else jax.lax.psum(sent, axis_name)
    return metrics._replace(
        uplink_bytes=jnp.stack([metrics.uplink_bytes, up]), downlink_bytes=jnp.stack([metrics.downlink_bytes, down])
    )


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
        value = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)).mean(0)
        value = value if axis_name is None else jax.lax.pmean(value, axis_name)
        return jnp.broadcast_to(value.astype(leaf.dtype), leaf.shape)

    averaged = jax.tree.map(average, client)
    return averaged if momenta else averaged._replace(opt_state=client.opt_state)


def evaluate(
    spec: RunSpec,
    state: TrainState,
    x: Any,
    y: Any,
    keys: jax.Array,
    aims: jax.Array | None = None,
    *,
    mesh: Mesh | None = None,
) -> StepMetrics:
    """Returns test loss and metrics of K batches, each array with an axis K, with running statistics.

    Each goes through the test codec by itself. Arguments are as of `fused_step`, but that all clients have one part.

    Args:
      aims: where there is a budget for the cut, what each batch's features are aimed at, float32 (K,).
    """

    def before(params, stats, x, key, bits):
        return cross_in_test(spec.test_codec, spec.client(params, stats, x, train=False, key=None)[0], key, bits)

    def serve(params, stats, h):
        return jax.vmap(lambda h: spec.server(params, stats, h, train=False, key=None)[0])(h)

    def behind(params, stats, outputs, key):
        h = cross_in_test(Codecs(spec.test_codec.default), outputs, tail_key(key))
        return spec.tail(params, stats, h, train=False, key=None)[0]

    client, server = state.client[:2], state.server[:2]
    h = shards.by_client(mesh, before, client, (x, keys, aims))
    outputs = shards.with_gathered(mesh, serve, server, shards.spread_batch(mesh, h))
    if spec.u_shaped:
        outputs = shards.by_client(mesh, behind, client, (outputs, keys))
    return jax.vmap(lambda outputs, y: score(spec, outputs, y))(outputs, y)

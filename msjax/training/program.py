"""K clients and a server in one program: `vmap` on one device, `shard_map` over the mesh axis "client" on several.

Both give the same numbers. Every client gets its own share of each step's samples and its own random keys, drawn from
(seed, step, client), so nothing depends on how the clients are spread over devices or the steps over calls. Where K
clients need too much memory at once, they take their step in groups (`train_in_groups`).

With `shard_server` the mesh is that of `shards.mesh_of`, over which the server's part is sharded, and the program is
one for all devices: its arrays are whole, with an axis of all clients, and the compiler spreads them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msjax.split import budget, fused, shards
from msjax.split.averages import Averages, Memory
from msjax.split.metrics import MetricSums, add_step
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, TrainState, client_keys, split_key
from msjax.split.step import StepMetrics, add_up
from msjax.training.devices import AXIS, replicate, spread_by_client, whole_mesh


def place(spec: RunSpec, state: TrainState, mesh: Mesh | None, *, shard_server: bool = False) -> TrainState:
    """Returns the state on the devices, as `train_steps` takes it."""
    clients = spec.schedule.clients
    if spec.compresses_updates and not state.memory:
        own, server = spec.mode.client_memory(spec, state.client), spec.mode.server_memory(spec)
        errors = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), own.error)
        state = state._replace(memory=Averages(own._replace(error=errors), server))
    if spec.cut_bits is not None and state.up_bits is None:
        at_once = spec.mode.clients_per_step(spec.schedule)
        state = state._replace(up_bits=jnp.broadcast_to(budget.first_up_bits(spec), at_once))
    spread = spec.mode.spread(spec, state)
    if mesh is not None and shard_server:
        return jax.device_put(spread, _shardings(spec, mesh, spread))

    def put(where, tree):
        return spread_by_client(tree, mesh) if where == PartitionSpec(AXIS) else replicate(tree, mesh)

    return jax.tree.map(put, _state_specs(spec, spread), spread, is_leaf=lambda tree: isinstance(tree, PartitionSpec))


def _shardings(spec, mesh, state):
    """Where the arrays of a state are, if the server's part is sharded: a tree of which some ends are for many."""
    divides = spec.mode.clients_per_step(spec.schedule) % mesh.size == 0

    def where(of_part):
        if of_part == PartitionSpec(AXIS) and divides:
            return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return NamedSharding(mesh, PartitionSpec())

    specs = _state_specs(spec, state)
    found = jax.tree.map(where, specs, is_leaf=lambda tree: isinstance(tree, PartitionSpec))
    return found._replace(server=shards.shardings_of(mesh, state.server))


def _settled(spec, mesh, state):
    """The state where it belongs, if the server's part is sharded over `mesh`."""
    return state if mesh is None else jax.lax.with_sharding_constraint(state, _shardings(spec, mesh, state))


def gather(spec: RunSpec, state: TrainState, mesh: Mesh | None) -> TrainState:
    """Returns the parts of a state that `place` put on the devices in host memory, the clients' once."""
    if jax.process_count() == 1:
        return jax.device_get(spec.mode.gather(spec, state))
    # Of what the devices of other processes have only the result is here.
    everywhere = NamedSharding(whole_mesh(mesh), PartitionSpec())
    of_run = state._replace(memory=())
    return jax.device_get(jax.jit(functools.partial(spec.mode.gather, spec), out_shardings=everywhere)(of_run))


_jit = functools.partial(jax.jit, static_argnames=("shard_server",))


@functools.partial(_jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_steps(
    spec: RunSpec,
    mesh: Mesh | None,
    state: TrainState,
    sums: MetricSums,
    inputs: Any,
    labels: Any,
    order: Any,
    clients: Any,
    key: jax.Array,
    *,
    shard_server: bool = False,
) -> tuple[TrainState, MetricSums, jax.Array]:
    """Takes S steps; gives its state and sums away. The third is each client's mean loss in each step, (S, K).

    Args:
      order: int32 (S, K, B): for each step and each client the positions of its samples in `inputs` (N, …) and `labels`
        (N, …), both on the device; over a mesh, in its device's share of them, see `batching.make_resident`. Several
        steps are one `lax.scan`; a single one is none, since XLA's CPU runs convolutions slower inside a loop. With
        None, `inputs` (K, B, …) and `labels` (K, B, …) are one step's.
      clients: int32 (K,), which clients these are.
      key: `state.train_key` of the run.
      shard_server: whether the server's part is sharded over the mesh.
    """
    mesh, over = (None, mesh) if shard_server else (mesh, None)

    def run(state, sums, inputs, labels, order, clients, key):
        def one_step(carry, batch):
            state, sums = carry
            x, y = take(inputs, labels, order, batch)
            keys = client_keys(key, state.step, clients)
            x, y = _augmented(spec, over, x, y, keys)
            state, metrics = spec.mode.fused_step(spec, state, x, y, keys, axis_name=mesh and AXIS, mesh=over)
            samples = _batch_size(y) * keys.shape[0] * (mesh.size if mesh else 1)
            sums, losses = shards.everywhere(over, (add_step(sums, metrics, samples), metrics.losses))
            return (_settled(spec, over, state), sums), losses

        (state, sums), losses = _repeat(one_step, (state, sums), inputs, labels, order)
        return state, sums, losses

    specs = _state_specs(spec, state)
    out_specs = (specs, PartitionSpec(), PartitionSpec(None, AXIS))
    return _spread(specs, run, mesh, out_specs)(state, sums, inputs, labels, order, clients, key)


def train_in_groups(
    spec: RunSpec,
    mesh: Mesh | None,
    state: TrainState,
    sums: MetricSums,
    inputs: Any,
    labels: Any,
    order: Any,
    clients: Any,
    key: jax.Array,
    *,
    group: int,
    shard_server: bool = False,
) -> tuple[TrainState, MetricSums, jax.Array]:
    """Takes one step with `group` clients at a time on each device, where K would need too much memory at once.

    The numbers are those of `train_steps` up to the order of sums; other arguments and results, too, are its own. Each
    group is a call of one compiled program, and no `lax.scan`, in which XLA's CPU computes gradients of convolutions
    many times slower. If `group` does not divide a device's clients, the last group is smaller, and compiled by itself.
    """
    if order is not None:
        (order,) = np.asarray(order)
        order = order if shard_server else spread_by_client(order, mesh)
    so_far = _begin(spec, mesh, state, clients, shard_server=shard_server)
    here = clients_of_a_device(spec, mesh)
    for start in range(0, here, group):
        args = (inputs, labels, order, clients, key, np.int32(start))
        size = min(group, here - start)
        state, so_far = _add_group(spec, mesh, size, state, so_far, *args, shard_server=shard_server)
    samples = len(clients) * (jax.tree.leaves(labels)[0] if order is None else order).shape[1]
    return _end(spec, mesh, group, state, sums, so_far, clients, key, samples, shard_server=shard_server)


def clients_of_a_device(spec: RunSpec, mesh: Mesh | None) -> int:
    """Returns how many of the clients of a step each device has; all, where the devices do not divide them."""
    clients = spec.mode.clients_per_step(spec.schedule)
    return clients // _shares(mesh, clients)


def _shares(mesh, clients):
    """Over how many devices clients are spread."""
    return mesh.size if mesh and clients % mesh.size == 0 else 1


@functools.partial(_jit, static_argnums=(0, 1))
def _begin(spec, mesh, state, clients, *, shard_server=False):
    """What the clients of a step have contributed before the first group: totals of each device, and of each client."""
    mesh, over = (None, mesh) if shard_server else (mesh, None)

    def run(state, clients):
        totals = _settled_totals(over, fused.zero_totals(spec, state))
        return _each_device(totals), fused.PerClient(
            *(jnp.zeros(clients.shape, jnp.float32) for _ in fused.PerClient._fields)
        )

    by_client = PartitionSpec(AXIS)
    return _shard(run, mesh, (_state_specs(spec, state), by_client), by_client)(state, clients)


@functools.partial(_jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _add_group(spec, mesh, size, state, so_far, inputs, labels, order, clients, key, start, *, shard_server=False):
    """State and sums with what `size` clients of each device, from its client `start` on, have contributed."""
    mesh, over = (None, mesh) if shard_server else (mesh, None)
    shares = _shares(over, clients.shape[0])  # in one program for all devices each takes its own from whole arrays

    def run(state, so_far, inputs, labels, order, clients, key, start):
        totals, found = so_far
        everyone = fused.own_of(spec, state)

        def by_share(leaf):
            return leaf.reshape(shares, -1, *leaf.shape[1:])

        def of_group(tree):
            def take(leaf):
                group = jax.lax.dynamic_slice_in_dim(by_share(leaf), start, size, axis=1)
                return group.reshape(-1, *leaf.shape[1:])

            return jax.tree.map(take, tree)

        def with_group(tree, group):
            def put(leaf, new):
                found = jax.lax.dynamic_update_slice_in_dim(by_share(leaf), by_share(new), start, axis=1)
                return found.reshape(leaf.shape)

            return jax.tree.map(put, tree, group)

        x, y = of_group((inputs, labels)) if order is None else take(inputs, labels, order, of_group(order))
        keys = client_keys(key, state.step, of_group(clients))
        x, y = _augmented(spec, over, x, y, keys)
        group = fused.with_own(spec, state, of_group(everyone))
        added = fused.contribute(spec, group, x, y, keys, mesh=over)
        state = fused.with_own(spec, state, with_group(everyone, added.own))
        totals = fused.add_totals(jax.tree.map(lambda leaf: leaf[0], totals), added.totals)
        of_each = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), added.found)
        totals = _each_device(_settled_totals(over, totals))
        return _settled(spec, over, state), (totals, shards.everywhere(over, with_group(found, of_each)))

    specs, by_client, everywhere = _state_specs(spec, state), PartitionSpec(AXIS), PartitionSpec()
    in_specs = (specs, by_client, by_client, by_client, by_client, by_client, everywhere, everywhere)
    spread = _shard(run, mesh, in_specs, (specs, by_client))
    return spread(state, so_far, inputs, labels, order, clients, key, start)


@functools.partial(_jit, static_argnums=(0, 1, 2, 8), donate_argnums=(3, 4))
def _end(spec, mesh, group, state, sums, so_far, clients, key, samples, *, shard_server=False):
    """Takes the step to which all clients have contributed."""
    mesh, over = (None, mesh) if shard_server else (mesh, None)

    def run(state, sums, so_far, clients, key):
        totals, found = so_far
        keys = client_keys(key, state.step, clients)
        options = {"axis_name": mesh and AXIS, "mesh": over}
        args = (spec, state, jax.tree.map(lambda leaf: leaf[0], totals), found, keys[0])
        state, metrics = fused.finish(*args, **options)
        state, metrics = spec.mode.after_fused_step(spec, state, metrics, keys, clients_at_once=group, **options)
        found = shards.everywhere(over, (add_step(sums, metrics, samples), metrics.losses[None]))
        return _settled(spec, over, state), *found

    specs, by_client, everywhere = _state_specs(spec, state), PartitionSpec(AXIS), PartitionSpec()
    in_specs = (specs, everywhere, by_client, by_client, everywhere)
    out_specs = (specs, everywhere, PartitionSpec(None, AXIS))
    return _shard(run, mesh, in_specs, out_specs)(state, sums, so_far, clients, key)


def _settled_totals(mesh, totals):
    """Totals of which the server's gradients are where its parameters are, if these are sharded over `mesh`."""
    client, server, sums = totals
    return fused.Totals(shards.everywhere(mesh, client), shards.constrain(mesh, server), shards.everywhere(mesh, sums))


def _augmented(spec, mesh, x, y, keys):
    """The clients' training batches as the network takes them, and their labels."""

    def of_client(x, y, key):
        return spec.preprocess.augmented(x, y, split_key(key).augment)

    return shards.by_client(mesh, of_client, (), (x, y, keys))


def _each_device(tree):
    """What differs from device to device, with an axis of devices."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


@functools.partial(_jit, static_argnums=(0, 1), donate_argnums=(3,))
def eval_rounds(
    spec: RunSpec,
    mesh: Mesh | None,
    state: TrainState,
    sums: MetricSums,
    inputs: Any,
    labels: Any,
    order: Any,
    clients: Any,
    key: jax.Array,
    places: Any,
    *,
    shard_server: bool = False,
) -> MetricSums:
    """Tests on rounds of batches; arguments as of `train_steps`, but `sums` alone is given away.

    Each (B,) of `order` is one batch: it goes through the codec by itself, as a client's batch does. Where clients have
    parts of their own, they have just been averaged.

    Args:
      places: int32 (K,), the place of each of these clients among those that the state has.
    """
    mesh, over = (None, mesh) if shard_server else (mesh, None)
    aims = None if spec.cut_bits is None else state.up_bits[places]

    def run(state, sums, inputs, labels, order, clients, key, aims):
        state = spec.mode.gather(spec, state)

        def one_round(carry, batch):
            sums, round_ = carry
            x, y = take(inputs, labels, order, batch)
            keys = client_keys(key, round_, clients)
            found = fused.evaluate(spec, state, jax.vmap(spec.preprocess)(x), y, keys, aims, mesh=over)
            loss, totals = found.loss.mean(), add_up(found.sums)
            if mesh:
                loss, totals = jax.lax.pmean(loss, AXIS), jax.lax.psum(totals, AXIS)
            samples = _batch_size(y) * keys.shape[0] * (mesh.size if mesh else 1)
            return (add_step(sums, StepMetrics(loss, totals), samples), round_ + 1), None

        return shards.everywhere(over, _repeat(one_round, (sums, jnp.int32(0)), inputs, labels, order)[0][0])

    spread = _spread(_state_specs(spec, state), run, mesh, PartitionSpec(), (PartitionSpec(AXIS),))
    return spread(state, sums, inputs, labels, order, clients, key, aims)


def take(inputs: Any, labels: Any, order: Any, batch: Any) -> tuple[Any, Any]:
    """Returns the inputs and labels of one step: those at the positions `batch`, or `batch` itself without an order."""
    if order is None:
        return batch
    return jax.tree.map(lambda leaf: leaf[batch], (inputs, labels))


def _batch_size(y):
    return jax.tree.leaves(y)[0].shape[1]


def _repeat(one_step, carry, inputs, labels, order):
    """`one_step` over the steps of `order`, as `lax.scan`."""
    if order is not None and order.shape[0] > 1:
        return jax.lax.scan(one_step, carry, order)
    carry, found = one_step(carry, (inputs, labels) if order is None else order[0])
    return carry, jax.tree.map(lambda leaf: leaf[None], found)


def _state_specs(spec, state):
    """Where the arrays of a state are: on all devices, or each client's on its own."""
    everywhere, by_client = PartitionSpec(), PartitionSpec(AXIS)
    memory = Averages(Memory(by_client, everywhere), Memory(everywhere, everywhere)) if spec.compresses_updates else ()
    up_bits = None if spec.cut_bits is None else by_client
    client = by_client if spec.mode.own_parts else everywhere
    if constants := spec.client_constants:
        of_stats = {name: everywhere if name in constants else client for name in state.client.stats}
        client = PartState(client, of_stats, client)
    return TrainState(client, everywhere, everywhere, memory, up_bits)


def _spread(state_specs, run, mesh, out_specs, more_specs=()):
    """`run` with the arguments of `train_steps`, and more, on one device, or spread over the mesh."""
    everywhere, by_client = PartitionSpec(), PartitionSpec(AXIS)
    in_specs = (state_specs, everywhere, by_client, by_client, PartitionSpec(None, AXIS), by_client, everywhere)
    return _shard(run, mesh, (*in_specs, *more_specs), out_specs)


def _shard(run, mesh, in_specs, out_specs):
    """`run` on one device, or on each of the mesh."""
    if mesh is None:
        return run
    # Without the check of replication, which would sum gradients over devices by itself: the step takes their mean.
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

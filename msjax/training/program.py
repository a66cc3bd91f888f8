"""K clients and a server in one program: `vmap` on one device, `shard_map` over the mesh axis "client" on several.

Both give the same numbers. Every client gets its own share of each step's samples and its own random keys, drawn from
(seed, step, client), so nothing depends on how the clients are spread over devices or the steps over calls.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msjax.split import budget, fused
from msjax.split.averages import Averages, Memory
from msjax.split.metrics import MetricSums, add_step
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, TrainState, client_keys, split_key
from msjax.split.step import StepMetrics, add_up
from msjax.training.devices import AXIS, replicate, spread_by_client, whole_mesh


def place(spec: RunSpec, state: TrainState, mesh: Mesh | None) -> TrainState:
    """Returns the state on the devices, as `train_steps` takes it."""
    clients = spec.schedule.clients
    if spec.compresses_updates and not state.memory:
        own, server = spec.mode.client_memory(spec, state.client), spec.mode.server_memory(spec)
        errors = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), own.error)
        state = state._replace(memory=Averages(own._replace(error=errors), server))
    if spec.cut_bits is not None and state.up_bits is None:
        state = state._replace(up_bits=jnp.broadcast_to(budget.first_up_bits(spec), clients))
    spread = spec.mode.spread(spec, state)

    def put(where, tree):
        return spread_by_client(tree, mesh) if where == PartitionSpec(AXIS) else replicate(tree, mesh)

    return jax.tree.map(put, _state_specs(spec, spread), spread, is_leaf=lambda tree: isinstance(tree, PartitionSpec))


def gather(spec: RunSpec, state: TrainState, mesh: Mesh | None) -> TrainState:
    """Returns the parts of a state that `place` put on the devices in host memory, the clients' once."""
    if jax.process_count() == 1:
        return jax.device_get(spec.mode.gather(spec, state))
    # Of what the devices of other processes have only the result is here.
    of_run = state._replace(memory=(), up_bits=None)
    everywhere = NamedSharding(whole_mesh(mesh), PartitionSpec())
    return jax.device_get(jax.jit(functools.partial(spec.mode.gather, spec), out_shardings=everywhere)(of_run))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
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
) -> tuple[TrainState, MetricSums, jax.Array]:
    """Takes S steps; gives its state and sums away. The third is each client's mean loss in each step, (S, K).

    Args:
      order: int32 (S, K, B): for each step and each client the positions of its samples in `inputs` (N, …) and `labels`
        (N, …), both on the device; over a mesh, in its device's share of them, see `batching.make_resident`. Several
        steps are one `lax.scan`; a single one is none, since XLA's CPU runs convolutions slower inside a loop. With
        None, `inputs` (K, B, …) and `labels` (K, B, …) are one step's.
      clients: int32 (K,), which clients these are.
      key: `state.train_key` of the run.
    """

    def run(state, sums, inputs, labels, order, clients, key):
        def one_step(carry, batch):
            state, sums = carry
            x, y = take(inputs, labels, order, batch)
            keys = client_keys(key, state.step, clients)
            x = jax.vmap(lambda x, key: spec.preprocess(x, split_key(key).augment))(x, keys)
            state, metrics = spec.mode.fused_step(spec, state, x, y, keys, axis_name=mesh and AXIS)
            samples = _batch_size(y) * keys.shape[0] * (mesh.size if mesh else 1)
            return (state, add_step(sums, metrics, samples)), metrics.losses

        (state, sums), losses = _repeat(one_step, (state, sums), inputs, labels, order)
        return state, sums, losses

    specs = _state_specs(spec, state)
    out_specs = (specs, PartitionSpec(), PartitionSpec(None, AXIS))
    return _spread(specs, run, mesh, out_specs)(state, sums, inputs, labels, order, clients, key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
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
) -> MetricSums:
    """Tests on rounds of batches; arguments as of `train_steps`, but `sums` alone is given away.

    Each (B,) of `order` is one batch: it goes through the codec by itself, as a client's batch does. Where clients have
    parts of their own, they have just been averaged.
    """

    def run(state, sums, inputs, labels, order, clients, key):
        state = spec.mode.gather(spec, state)

        def one_round(carry, batch):
            sums, round_ = carry
            x, y = take(inputs, labels, order, batch)
            keys = client_keys(key, round_, clients)
            found = jax.vmap(lambda x, y, key: fused.evaluate(spec, state, spec.preprocess(x), y, key))(x, y, keys)
            loss, totals = found.loss.mean(), add_up(found.sums)
            if mesh:
                loss, totals = jax.lax.pmean(loss, AXIS), jax.lax.psum(totals, AXIS)
            samples = _batch_size(y) * keys.shape[0] * (mesh.size if mesh else 1)
            return (add_step(sums, StepMetrics(loss, totals), samples), round_ + 1), None

        return _repeat(one_round, (sums, jnp.int32(0)), inputs, labels, order)[0][0]

    spread = _spread(_state_specs(spec, state), run, mesh, PartitionSpec())
    return spread(state, sums, inputs, labels, order, clients, key)


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


def _spread(state_specs, run, mesh, out_specs):
    """`run` on one device, or spread over the mesh."""
    if mesh is None:
        return run
    everywhere, by_client = PartitionSpec(), PartitionSpec(AXIS)
    in_specs = (state_specs, everywhere, by_client, by_client, PartitionSpec(None, AXIS), by_client, everywhere)
    # Without the check of replication, which would sum gradients over devices by itself: the step takes their mean.
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

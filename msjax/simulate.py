"""K clients and a server in one program: `vmap` on one device, `shard_map` over a mesh axis "client" on several.

Both give the same numbers. Every client gets its own share of each step's samples and its own random keys, drawn from
(seed, step, client), so nothing depends on how the clients are spread over devices or the steps over calls.
"""

import contextlib
import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msjax import compress, data
from msjax.step import Info, Setup, TrainState, average_halves, evaluate, fused_step, split_key

AXIS = "client"


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """From inputs as a `data.Dataset` has them to those of the network, on the device."""

    augment: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str
    padding: int = data.CROP_PADDING

    def __call__(self, inputs, key=None):
        """Inputs (B, …) as the network takes them; augmented with `key`, as they are without."""
        if key is not None:
            inputs = data.augment(inputs, key, kind=self.augment, padding=self.padding)
        mean, std = (np.asarray(v, np.float32) for v in (self.mean, self.std))
        return data.normalize(inputs, mean, std, jnp.dtype(self.dtype))


class Averages(NamedTuple):
    """When SplitFed averages: every `steps` steps, and at the end of an epoch of `epoch_steps`."""

    steps: int
    epoch_steps: int

    def after(self, step: jax.Array) -> jax.Array:
        """Whether the halves are averaged after this step."""
        within = step % self.epoch_steps + 1
        return (within % self.steps == 0) | (within == self.epoch_steps)


class Sums(NamedTuple):
    """Sums over the samples seen so far in an epoch, over all clients."""

    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    samples: jax.Array
    uplink_bytes: jax.Array | float = 0.0
    """As of `step.Info`: of one program, where a codec is entropy-coded."""
    downlink_bytes: jax.Array | float = 0.0

    def means(self) -> dict[str, float]:
        """Returns the mean loss in nats, and top-1 and top-5 accuracy in percent."""
        n = int(self.samples)
        return {
            "loss": float(self.loss) / n,
            "top1_percent": 100 * int(self.top1) / n,
            "top5_percent": 100 * int(self.top5) / n,
        }


def zero_sums(mesh: Mesh | None = None) -> Sums:
    # Arrays of their own, since they are given away.
    kinds = Sums(jnp.float32, jnp.int32, jnp.int32, jnp.int32, jnp.float32, jnp.float32)
    return replicate(Sums(*(jnp.array(0, kind) for kind in kinds)), mesh)


def _add(sums, info, samples):
    return Sums(
        sums.loss + info.loss * samples,
        sums.top1 + info.top1,
        sums.top5 + info.top5,
        sums.samples + samples,
        sums.uplink_bytes + info.uplink_bytes,
        sums.downlink_bytes + info.downlink_bytes,
    )


def train_key(seed: int) -> jax.Array:
    """Returns the key that those of all training steps are drawn from."""
    return jax.random.fold_in(jax.random.key(seed), 1 << 31)  # the model's blocks take 0, 1, 2, …


def test_key(seed: int) -> jax.Array:
    """Returns the key that those of all test batches are drawn from."""
    return jax.random.fold_in(jax.random.key(seed), (1 << 31) + 1)


def client_keys(key: jax.Array, step: jax.Array, clients: jax.Array) -> jax.Array:
    """Returns the keys (K,) of the clients with these numbers in this step."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda client: jax.random.fold_in(key, client))(clients)


def split_cpu(clients: int, cores: int | None = None) -> None:
    """Makes JAX see the CPU as several devices, as many as the clients divide over and the cores allow.

    XLA uses two cores better as two devices with half of the clients each than as one: a ResNet9 step became 1.5 times
    faster. To be called before JAX runs anything; does nothing where JAX runs already or XLA_FLAGS sets the number.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _spread_over(clients, cores or _own_cores()))


def _own_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spread_over(clients, limit):
    """The most devices, up to `limit`, that the clients divide over evenly."""
    return max(n for n in range(1, min(clients, limit) + 1) if clients % n == 0)


def own_halves(state: TrainState, clients: int, mesh: Mesh | None) -> TrainState:
    """Returns a state in which each of K clients has a half of its own: its arrays get a leading axis K."""
    client = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), state.client)
    rest = replicate(state._replace(client=None), mesh)
    return rest._replace(client=jax.device_put(client, NamedSharding(mesh, PartitionSpec(AXIS)) if mesh else None))


def make_mesh(clients: int, devices: list | None = None) -> Mesh | None:
    """Returns a mesh over as many devices as divide the clients evenly, or None where that is one."""
    devices = jax.devices() if devices is None else devices
    size = _spread_over(clients, len(devices))
    return Mesh(np.array(devices[:size]), (AXIS,)) if size > 1 else None


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Returns `tree` on the device, or a copy of it on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()) if mesh else None)


def make_train(
    setup: Setup, preprocess: Preprocess, *, clients: int, mesh: Mesh | None = None, averages: Averages | None = None
):
    """Returns the jitted `train(state, sums, inputs, labels, order, key) -> (state, sums)`, which gives its state away.

    `order` is int32 (S, K, B): for each of S steps and each client the positions of its samples in `inputs` (N, …) and
    `labels` (N,), both on the device. Several steps are one `lax.scan`; a single one is none, since XLA's CPU runs
    convolutions slower inside a loop. With `order` None, `inputs` (K, B, …) and `labels` (K, B) are themselves one
    step's. A further argument `numbers`, int32 (K,), says which clients these are; by default all.

    With `averages` every client has a half of its own, see `fused_step`, and they are averaged at those steps.
    """

    def train(state, sums, inputs, labels, order, numbers, key):
        def one_step(carry, batch):
            state, sums = carry
            x, y = (inputs[batch], labels[batch]) if order is not None else batch
            keys = client_keys(key, state.step, numbers)
            x = jax.vmap(lambda x, key: preprocess(x, split_key(key).augment))(x, keys)
            axis = mesh and AXIS
            state, info = fused_step(setup, state, x, y, keys, axis_name=axis, own_halves=averages is not None)
            if averages is not None:
                mean = average_halves(state.client, axis_name=axis)
                now = averages.after(state.step - 1)
                client = jax.tree.map(lambda mean, own: jnp.where(now, mean, own), mean, state.client)
                state = state._replace(client=client)
            return (state, _add(sums, info, clients * y.shape[1])), None

        return _repeat(one_step, (state, sums), inputs, labels, order)

    return _spread(train, clients, mesh, donate=(0, 1), own_halves=averages is not None)


def make_eval(
    setup: Setup,
    preprocess: Preprocess,
    *,
    codec: compress.Codec | None,
    clients: int,
    mesh: Mesh | None,
    own_halves: bool = False,
):
    """Returns the jitted `evaluate(state, sums, inputs, labels, order, key) -> sums`; arguments as in `make_train`.

    Each (B,) of `order` is one batch: it goes through the codec by itself, as a client's batch does. Where clients have
    halves of their own, they have just been averaged.
    """

    def run(state, sums, inputs, labels, order, numbers, key):
        if own_halves:
            state = state._replace(client=jax.tree.map(lambda leaf: leaf[0], state.client))

        def one_step(carry, batch):
            sums, step = carry
            x, y = (inputs[batch], labels[batch]) if order is not None else batch
            keys = client_keys(key, step, numbers)
            infos = jax.vmap(lambda x, y, key: evaluate(setup, state, preprocess(x), y, key, codec=codec))(x, y, keys)
            info = Info(infos.loss.mean(), infos.top1.sum(), infos.top5.sum())
            if mesh:
                info = Info(jax.lax.pmean(info.loss, AXIS), *jax.lax.psum(info[1:3], AXIS))
            return (_add(sums, info, clients * y.shape[1]), step + 1), None

        return _repeat(one_step, (sums, jnp.int32(0)), inputs, labels, order)[0]

    return _spread(run, clients, mesh, donate=(1,), own_halves=own_halves)


def _repeat(one_step, carry, inputs, labels, order):
    """`one_step` over the steps of `order`."""
    if order is None:
        return one_step(carry, (inputs, labels))[0]
    if order.shape[0] == 1:
        return one_step(carry, order[0])[0]
    return jax.lax.scan(one_step, carry, order)[0]


def _spread(fun, clients: int, mesh: Mesh | None, donate: tuple[int, ...], own_halves: bool):
    """`fun` jitted, its clients' numbers filled in, spread over the mesh."""
    everyone = np.arange(clients, dtype=np.int32)

    def call(state: TrainState, sums: Sums, inputs: Any, labels: Any, order: Any, key: jax.Array, numbers: Any = None):
        numbers = jnp.asarray(everyone if numbers is None else numbers)
        if mesh is None:
            return fun(state, sums, inputs, labels, order, numbers, key)
        everywhere, by_client = PartitionSpec(), PartitionSpec(AXIS)
        batch = by_client if order is None else everywhere
        states = TrainState(by_client if own_halves else everywhere, everywhere, everywhere)
        in_specs = (states, everywhere, batch, batch, PartitionSpec(None, AXIS), by_client, everywhere)
        out_specs = (states, everywhere) if 0 in donate else everywhere
        # Without the check of replication, which would sum gradients over devices by itself: the step takes their mean.
        spread = jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return spread(state, sums, inputs, labels, order, numbers, key)

    return jax.jit(call, donate_argnums=donate)

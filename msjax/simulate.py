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
from msjax.step import Info, Setup, TrainState, evaluate, fused_step, split_key

AXIS = "client"


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """From stored uint8 images to network input, on the device."""

    augment: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str

    def __call__(self, images, key=None):
        """Images (…, H, W, C) as normalised floats; augmented with `key`, as they are without."""
        if key is not None:
            images = data.augment(images, key, kind=self.augment)
        mean, std = (np.asarray(v, np.float32) for v in (self.mean, self.std))
        return data.normalize(images, mean, std, jnp.dtype(self.dtype))


class Sums(NamedTuple):
    """Sums over the samples seen so far in an epoch, over all clients."""

    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    samples: jax.Array

    def means(self) -> dict[str, float]:
        """Returns the mean loss in nats, and top-1 and top-5 accuracy in percent."""
        n = int(self.samples)
        return {
            "loss": float(self.loss) / n,
            "top1_percent": 100 * int(self.top1) / n,
            "top5_percent": 100 * int(self.top5) / n,
        }


def zero_sums(mesh: Mesh | None = None) -> Sums:
    return replicate(Sums(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0)), mesh)


def _add(sums, info, samples):
    return Sums(sums.loss + info.loss * samples, sums.top1 + info.top1, sums.top5 + info.top5, sums.samples + samples)


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
        jax.config.update("jax_num_cpu_devices", _spread_over(clients, cores or os.cpu_count() or 1))


def _spread_over(clients, limit):
    """The most devices, up to `limit`, that the clients divide over evenly."""
    return max(n for n in range(1, min(clients, limit) + 1) if clients % n == 0)


def make_mesh(clients: int, devices: list | None = None) -> Mesh | None:
    """Returns a mesh over as many devices as divide the clients evenly, or None where that is one."""
    devices = jax.devices() if devices is None else devices
    size = _spread_over(clients, len(devices))
    return Mesh(np.array(devices[:size]), (AXIS,)) if size > 1 else None


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Returns `tree` on the device, or a copy of it on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()) if mesh else None)


def make_train(setup: Setup, preprocess: Preprocess, *, clients: int, mesh: Mesh | None = None):
    """Returns the jitted `train(state, sums, images, labels, order, key) -> (state, sums)`, which gives its state away.

    `order` is int32 (S, K, B): for each of S steps and each client the positions of its samples in `images` (N, H, W,
    C) and `labels` (N,), both on the device. Several steps are one `lax.scan`; a single one is none, since XLA's CPU
    runs convolutions slower inside a loop. With `order` None, `images` (K, B, H, W, C) and `labels` (K, B) are
    themselves one step's.
    """

    def train(state, sums, images, labels, order, numbers, key):
        def one_step(carry, batch):
            state, sums = carry
            x, y = (images[batch], labels[batch]) if order is not None else batch
            keys = client_keys(key, state.step, numbers)
            x = jax.vmap(lambda x, key: preprocess(x, split_key(key).augment))(x, keys)
            state, info = fused_step(setup, state, x, y, keys, axis_name=mesh and AXIS)
            return (state, _add(sums, info, clients * y.shape[1])), None

        return _repeat(one_step, (state, sums), images, labels, order)

    return _spread(train, clients, mesh, donate=(0, 1))


def make_eval(setup: Setup, preprocess: Preprocess, *, codec: compress.Codec | None, clients: int, mesh: Mesh | None):
    """Returns the jitted `evaluate(state, sums, images, labels, order, key) -> sums`; arguments as in `make_train`.

    Each (B,) of `order` is one batch: it goes through the codec by itself, as a client's batch does.
    """

    def run(state, sums, images, labels, order, numbers, key):
        def one_step(carry, batch):
            sums, step = carry
            x, y = (images[batch], labels[batch]) if order is not None else batch
            keys = client_keys(key, step, numbers)
            infos = jax.vmap(lambda x, y, key: evaluate(setup, state, preprocess(x), y, key, codec=codec))(x, y, keys)
            info = Info(infos.loss.mean(), infos.top1.sum(), infos.top5.sum())
            if mesh:
                info = Info(jax.lax.pmean(info.loss, AXIS), *jax.lax.psum(info[1:], AXIS))
            return (_add(sums, info, clients * y.shape[1]), step + 1), None

        return _repeat(one_step, (sums, jnp.int32(0)), images, labels, order)[0]

    return _spread(run, clients, mesh, donate=(1,))


def _repeat(one_step, carry, images, labels, order):
    """`one_step` over the steps of `order`."""
    if order is None:
        return one_step(carry, (images, labels))[0]
    if order.shape[0] == 1:
        return one_step(carry, order[0])[0]
    return jax.lax.scan(one_step, carry, order)[0]


def _spread(fun, clients: int, mesh: Mesh | None, donate: tuple[int, ...]):
    """`fun` jitted, its clients' numbers filled in, spread over the mesh."""
    numbers = np.arange(clients, dtype=np.int32)

    def call(state: TrainState, sums: Sums, images: Any, labels: Any, order: Any, key: jax.Array):
        if mesh is None:
            return fun(state, sums, images, labels, order, jnp.asarray(numbers), key)
        everywhere, by_client = PartitionSpec(), PartitionSpec(AXIS)
        batch = by_client if order is None else everywhere
        in_specs = (everywhere, everywhere, batch, batch, PartitionSpec(None, AXIS), by_client, everywhere)
        # Without the check of replication, which would sum gradients over devices by itself: the step takes their mean.
        spread = jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=everywhere, check_vma=False)
        return spread(state, sums, images, labels, order, jnp.asarray(numbers), key)

    return jax.jit(call, donate_argnums=donate)

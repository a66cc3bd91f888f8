"""The server's part on many devices: its arrays sharded by one rule, and each step's batch spread over them (FSDP).

Each array is cut along its largest axis that the number of devices divides, and so are its momenta; small arrays are on
every device. A layer's weights are gathered where they are used, forward and again backward, and their gradients go
back to the shards: what a device holds of the part shrinks with the number of devices. The batch of a step, K clients
of B samples, is spread over clients and samples as far as both divide; so are activations.

This is `jax.sharding` alone: the functions here are constraints, and XLA's partitioner adds what devices tell each
other. Sums over the batch have another order than on one device, and nothing else differs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msjax.split import each_client
from msjax.split.trees import is_float

LEAST_VALUES = 1024
"""Arrays of fewer values are on every device: to gather them would cost more than they take."""
_COMPUTED_AGAIN = ("convert_element_type", "reshape", "sharding_constraint", "squeeze", "transpose")
"""Operations whose results are not kept for the backward pass: they make of a shard what a layer multiplies by."""


def mesh_of(devices: list | None = None) -> Mesh | None:
    """Returns a mesh over all devices, or None where there is one.

    Its axes are of the prime factors of their number, so that clients and samples can share them out.
    """
    devices = jax.devices() if devices is None else devices
    factors, left = [], len(devices)
    for factor in range(2, left + 1):
        while left % factor == 0:
            factors.append(factor)
            left //= factor
    if not factors:
        return None
    return Mesh(np.array(devices).reshape(factors), tuple(f"device{n}" for n in range(len(factors))))


def shard_axis(shape: tuple[int, ...], devices: int) -> int | None:
    """Returns the axis along which an array is cut: the largest that `devices` divides; None for no axis."""
    if math.prod(shape) < LEAST_VALUES:
        return None
    return max((n for n, size in enumerate(shape) if size % devices == 0), key=lambda n: shape[n], default=None)


def sharding_of(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Returns where an array of the server's part is, by the rule above."""
    axis = shard_axis(tuple(leaf.shape), mesh.size) if is_float(leaf) else None
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, mesh.axis_names)
    return NamedSharding(mesh, spec)


def shardings_of(mesh: Mesh, tree: Any) -> Any:
    """Returns where each array of a tree is."""
    return jax.tree.map(functools.partial(sharding_of, mesh), tree)


def place(mesh: Mesh | None, tree: Any) -> Any:
    """Returns the arrays of the server's part on the devices; as they are without a mesh."""
    return tree if mesh is None else jax.device_put(tree, shardings_of(mesh, tree))


def constrain(mesh: Mesh | None, tree: Any) -> Any:
    """Returns such arrays where they belong; inside `jit`."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings_of(mesh, tree))


def everywhere(mesh: Mesh | None, tree: Any) -> Any:
    """Returns arrays on every device; inside `jit`."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def spread_batch(mesh: Mesh | None, tree: Any, *, axes: int = 2) -> Any:
    """Returns arrays (K, B, …) spread over as many devices as divide clients and samples; inside `jit`.

    Args:
      axes: 1 where arrays are (B, …).
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(
        tree, jax.tree.map(lambda leaf: batch_sharding(mesh, leaf.shape[:axes]), tree)
    )


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns where an array is whose first axes have these lengths: clients and samples, or samples alone."""
    left, spec = list(mesh.axis_names), []
    for length in shape:
        over = []
        for name in tuple(left):
            if length % mesh.shape[name] == 0:
                over.append(name)
                left.remove(name)
                length //= mesh.shape[name]
        spec.append(tuple(over))
    return NamedSharding(mesh, PartitionSpec(*spec))


def by_client(
    mesh: Mesh | None,
    function: Callable,
    shared: tuple[Any, ...],
    each: tuple[Any, ...],
    shared_axes: Any = None,
    *,
    clients_at_once: int | None = None,
) -> Any:
    """Returns `vmap` of `function(*shared, *each)` over the leading axis of `each`.

    On a mesh each device computes its own clients, as `shard_map`, where their number divides; otherwise every device
    computes all. So codecs select, pack and draw on whole arrays, which the partitioner would do badly.

    Args:
      shared_axes: as `in_axes` of `vmap`, where arrays of `shared` have an axis of clients after all.
      clients_at_once: without `shared`, how many clients a device computes at the same time; None for all.
    """
    shared_axes = (None,) * len(shared) if shared_axes is None else shared_axes
    # Of the axes None is no leaf.
    vmap = each_client.vmap if jax.tree.leaves(shared_axes) else jax.vmap
    mapped = vmap(function, (*shared_axes, *(0,) * len(each)))
    if clients_at_once is not None:
        mapped = lambda *each: jax.lax.map(lambda args: function(*args), each, batch_size=clients_at_once)  # noqa: E731
    if mesh is None:
        return mapped(*shared, *each)
    clients = jax.tree.leaves(each)[0].shape[0]
    if clients % mesh.size:
        return everywhere(mesh, mapped(*everywhere(mesh, shared), *everywhere(mesh, each)))
    own = PartitionSpec(mesh.axis_names)
    is_axis = lambda axis: axis is None or isinstance(axis, int)  # noqa: E731
    of_shared = jax.tree.map(lambda axis: PartitionSpec() if axis is None else own, shared_axes, is_leaf=is_axis)
    spread = jax.shard_map(
        mapped, mesh=mesh, in_specs=(*of_shared, *(own,) * len(each)), out_specs=own, check_vma=False
    )
    return spread(*shared, *each)


def with_gathered(mesh: Mesh | None, function: Callable, sharded: tuple[Any, ...], *args: Any) -> Any:
    """Returns `function(*sharded, *args)`, for which the arrays of `sharded` are gathered; inside `jit`.

    What is kept for the backward pass are the shards, not what is gathered of them.
    """
    if mesh is None:
        return function(*sharded, *args)

    def run(sharded, *args):
        return function(*_gather(mesh, sharded), *args)

    return jax.checkpoint(run, policy=_is_saved)(sharded, *args)


def _is_saved(operation, *_, **__):
    return operation.name not in _COMPUTED_AGAIN


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(mesh, tree):
    """Arrays of every device; their gradients go back to where the arrays are."""
    return everywhere(mesh, tree)


def _gather_forward(mesh, tree):
    return everywhere(mesh, tree), None


def _gather_backward(mesh, _, gradients):
    # Of what is no number gradients are of dtype float0, and of no use.
    where = lambda g: g if g.dtype == jax.dtypes.float0 else constrain(mesh, g)  # noqa: E731
    return (jax.tree.map(where, gradients),)


_gather.defvjp(_gather_forward, _gather_backward)

"""An epoch's order cut into calls of the compiled functions, and the batches that go with each."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from msjax import data
from msjax.split.schedule import Schedule
from msjax.training.devices import replicate, share_of_process, spread_blocks, spread_local


def epoch_calls(order: np.ndarray, batch_size: int, steps_per_call: int) -> list[np.ndarray]:
    """Cuts an epoch's order (K, n) into calls of int32 (S, K, B), the last step smaller where B does not divide n."""
    clients, n = order.shape
    full = n // batch_size
    body = order[:, : full * batch_size].reshape(clients, full, batch_size).transpose(1, 0, 2)
    calls = [body[i : i + steps_per_call] for i in range(0, full, steps_per_call)]
    if full * batch_size < n:
        calls.append(order[None, :, full * batch_size :])
    return calls


def schedule_calls(schedule: Schedule, order: np.ndarray, epoch: int, steps_per_call: int) -> list[np.ndarray]:
    """Cuts an epoch's order (K, n) into calls; in turns or rounds, of (S, M, B) of the M clients that take part."""
    if not schedule.mode.hands_parts_on(schedule):
        return epoch_calls(order, schedule.batch_size, steps_per_call)
    calls = []
    for step in range(schedule.epoch_steps):
        position = schedule.position(epoch * schedule.epoch_steps + step)
        if position.turn_starts:
            start = position.start
        if position.turn_ends:
            turn = order[list(position.clients), start : position.stop]
            calls += epoch_calls(turn, schedule.batch_size, steps_per_call)
    return calls


def client_groups(clients: int, mesh: Mesh | None, size: int | None) -> list[np.ndarray]:
    """Returns which of so many clients are computed at the same time: `size` of each device, group after group.

    Args:
      mesh: over which the clients are spread, in their order, if it divides them.
      size: of a group on one device; None for all clients at once.
    """
    devices = mesh.size if mesh is not None and clients % mesh.size == 0 else 1
    by_device = np.arange(clients).reshape(devices, -1)
    size = by_device.shape[1] if size is None else size
    return [by_device[:, start : start + size].ravel() for start in range(0, by_device.shape[1], size)]


class Resident(NamedTuple):
    """A split, or some of its samples, in the memory of the devices.

    Attributes:
      inputs, labels: (N, …), all on each device; or spread over a mesh, on each device what its clients hold.
      place: int32, for each sample of the split its position on the device that has it; None where that is its number.
    """

    inputs: Any
    labels: Any
    place: np.ndarray | None = None


def resident_of_clients(split: data.Split, mesh: Mesh | None, held: Sequence[np.ndarray]) -> Resident | None:
    """Returns a split as the steps of clients take it: on each device of the mesh what its clients hold, of `held`."""
    return make_resident(split, None) if mesh is None else spread_resident(split, mesh, held)


def make_resident(split: data.Split, mesh: Mesh | None, samples: np.ndarray | None = None) -> Resident | None:
    """Returns a split, or those of its samples, on every device; None of one that is not in memory."""
    if not split.in_memory:
        return None
    arrays, place = (split.inputs, split.targets), None
    if samples is not None:
        arrays, place = split.fetch(samples), _places(len(split), [samples])
    # Copied off the cache's memory map: on a CPU JAX would use that itself, and wait for the disk in every step.
    return Resident(*replicate(jax.tree.map(np.array, arrays), mesh), place)


def spread_resident(split: data.Split, mesh: Mesh, held: Sequence[np.ndarray]) -> Resident | None:
    """Returns a split spread over the mesh: each device has what its clients hold, and reads no more.

    Args:
      held: of each client the samples that it holds, no sample twice.

    Returns:
      All devices have as many rows, those that hold fewer samples have zeros behind them. None of a split that is not
      in memory.
    """
    if not split.in_memory:
        return None
    clients = len(held) // mesh.size
    shares = [np.concatenate(held[i : i + clients]) for i in range(0, len(held), clients)]
    rows = max(map(len, shares))

    def block(leaf, device):
        found = np.zeros((rows, *leaf.shape[1:]), leaf.dtype)
        found[: len(shares[device])] = leaf[shares[device]]
        return found

    arrays = (split.inputs, split.targets)
    spread = jax.tree.map(lambda leaf: spread_blocks(lambda device: block(leaf, device), mesh), arrays)
    return Resident(*spread, _places(len(split), shares))


def _places(count, shares):
    """Of each of `count` samples its position in the share that has it."""
    place = np.zeros(count, np.int32)
    for share in shares:
        place[share] = np.arange(len(share))
    return place


def batches_on_device(
    split: data.Split,
    resident: Resident | None,
    calls: list[np.ndarray],
    *,
    seed: int = 0,
    epoch: int = 0,
    done: int = 0,
    mesh: Mesh | None = None,
    read: Callable[[int], tuple[Any, Any]] | None = None,
    workers: int | None = None,
) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (inputs, labels, order) for each call after the first `done` steps, as `program.train_steps` takes them.

    Args:
      split: what the batches are of.
      resident: the split on the devices, or None to read it batch by batch: a step at a time, read ahead.
      mesh: over which the clients of the calls are spread. Of several processes each then reads its clients' samples.
      read: of a split that is not in memory: returns the batch of a step of the calls, by its number; by default
        `data.batches` reads them.
      workers: of `data.batches`.
    """
    if resident is not None:
        for call in _after(calls, done):
            yield resident.inputs, resident.labels, call if resident.place is None else resident.place[call]
        return
    if read is not None:
        for step in range(done, sum(map(len, calls))):
            yield *spread_local(read(step), mesh), None
        return
    for _, group in itertools.groupby(calls, key=lambda call: call.shape):
        steps = np.concatenate(list(group))
        start = min(done, len(steps))
        done -= start
        own = share_of_process(steps.shape[1], mesh)
        for batch in data.batches(split, steps[:, own], seed=seed, epoch=epoch, start=start, workers=workers):
            yield *spread_local(batch, mesh), None


def _after(calls, done):
    """`calls` without their first `done` steps."""
    for call in calls:
        if done < len(call):
            yield call[done:]
        done = max(0, done - len(call))

"""A run with its data and its first state, and where on the devices it goes."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

import msjax
from msjax import data
from msjax.data import digests
from msjax.split import shards
from msjax.split.spec import RunSpec
from msjax.split.state import TrainState, digest
from msjax.training import processes, program
from msjax.training.devices import make_mesh


class LoadedRun(NamedTuple):
    """A run with its data, before its first step.

    Attributes:
      spec: its description.
      state: its parts, the clients' once.
      dataset: what it is trained and tested on.
      client_indices: of each client the training samples that it holds, int32.
      seed: of orders, augmentation and codecs.
      title: what a person calls it.
      allow_nonfinite: whether it goes on where a loss is not finite.
      workers: how many processes read data that are not in memory, see `data.Reader`.
      clients_per_group: how many clients each device computes at the same time; None for all of its own.
      shard_server: whether the server's part is sharded over all devices, see `shards`.
    """

    spec: RunSpec
    state: TrainState
    dataset: data.Dataset
    client_indices: list[np.ndarray]
    seed: int
    title: str
    allow_nonfinite: bool = False
    workers: int | None = None
    clients_per_group: int | None = None
    shard_server: bool = False


def mesh_of(spec: RunSpec, *, shard_server: bool = False) -> Mesh | None:
    """Returns the mesh over which the clients of a run are spread, or its server's part is sharded.

    None is one device; where there are several processes, one of each, on which all compute the same: a step of one
    client is not spread, nor are those of clients that change from round to round: a device has its clients' data.

    Raises:
      ValueError: the clients do not divide over the processes, or a part is to be sharded over several.
    """
    if shard_server:
        if (count := jax.process_count()) > 1:
            raise ValueError(f"shard_server must be False with several processes, got True with {count}")
        return shards.mesh_of()
    if spec.mode.hands_parts_on(spec.schedule) or (spec.mode.one_at_a_time and jax.process_count() > 1):
        return None
    return make_mesh(spec.mode.clients_per_step(spec.schedule))


def placed(run: LoadedRun) -> tuple[TrainState, Mesh | None]:
    """Returns a run's first state on the devices, and their mesh; raises as `mesh_of`."""
    options = {"shard_server": run.shard_server}
    mesh = mesh_of(run.spec, **options)
    return program.place(run.spec, run.state, mesh, **options), mesh


def check_processes(run: LoadedRun, **more: Any) -> None:
    """Raises ValueError, in all processes, where they do not have the same run, or its clients do not divide over them.

    Args:
      more: what else must be the same, JSON-ready.
    """
    mesh_of(run.spec, shard_server=run.shard_server)
    if jax.process_count() == 1:
        return
    versions = {f"the version of {module.__name__}": module.__version__ for module in (jax, msjax)}
    counts = {"training samples": len(run.dataset.train), "test samples": len(run.dataset.test), "seed": run.seed}
    hashes = {
        "the data (their hashes; of what is streamed its length)": digests(run.dataset),
        "the division of the data (its hash)": digest(run.client_indices),
        "the first parameters (their hash)": digest(jax.device_get((run.state.client[:2], run.state.server[:2]))),
    }
    processes.check_same(versions | run.spec.describe() | counts | more | hashes)

"""Several processes of one program, as on several hosts: how they find each other, agree, and end together.

JAX connects them (`jax.distributed.initialize`) and runs every program on the devices of all. All take the same steps
in the same order; the first one, process 0, alone writes files and speaks. In a single process each function here does
what it says at once.
"""

import functools
import json
import pathlib
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msjax.training.devices import spread_blocks

T = TypeVar("T")
HEARTBEAT_SECONDS = 60
"""After how long without a sign of life a process is taken for dead."""
_LAST_PORT = 65535


class ProcessLostError(ConnectionError):
    """Another process of the run has ended, or cannot be reached any more."""


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Makes this process one of several; to be called before JAX runs anything.

    JAX aborts the process where the others do not come within five minutes, and says so.

    Args:
      coordinator_address: host and port of the first process; this and the next two are found where they are None and
        JAX knows the system: SLURM, Kubernetes, TPU pods, Open MPI.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      local_device_ids: which devices of its host it has; all, or as the system says, where it is None.
      heartbeat_seconds: see `HEARTBEAT_SECONDS`.

    Raises:
      ValueError: what was not given cannot be found, or does not fit; or the port of the first process, which this
        is, has been taken.
    """
    given = (coordinator_address, num_processes, process_id)
    if process_id == 0 and coordinator_address is not None:
        _check_free(coordinator_address)
    # Its handler of SIGTERM would come before that of the training loop, in which all agree to stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(*given, local_device_ids, heartbeat_timeout_seconds=heartbeat_seconds)
    except ValueError as error:
        if None not in given:
            raise
        raise ValueError(
            "the address of the first process, the number of processes and the id of this one must be given where they "
            f"are not found by SLURM, Kubernetes, a TPU pod or Open MPI, got {given}: {_first_line(error)}"
        ) from error


def _check_free(address):
    """Raises ValueError where the port of an address of this host has been taken, at which JAX would crash."""
    port, why = address.rpartition(":")[2], None
    if not port.isdecimal():
        return  # JAX says what is wrong
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    if int(port) > _LAST_PORT:
        why = f"ports are at most {_LAST_PORT}"
    else:
        try:
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
        except OSError as error:
            why = error.strerror
    if why is not None:
        raise ValueError(f"coordinator_address must have a free port of this host, got {address!r}: {why}")


def count() -> int:
    """Returns how many processes the run has."""
    return jax.process_count()


def is_first() -> bool:
    """Returns whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def from_first(function: Callable[[], T]) -> T:
    """Returns in all processes what `function` returns in the first, where alone it is called: JSON-ready values.

    Raises:
      Exception: what `function` raised; in the other processes a ValueError that says it.
    """
    if count() == 1:
        return function()
    found, error = None, None
    if is_first():
        try:
            found = function()
        except Exception as raised:
            error = raised
    answer = {"found": found, "error": None if error is None else str(error)}
    answer = json.loads(_gather(json.dumps(answer) if is_first() else "")[0])
    if error is not None:
        raise error
    if answer["error"] is not None:
        raise ValueError(f"process 0: {answer['error']}")
    return answer["found"]


def together(function: Callable[[], T]) -> T:
    """Returns what `function` returns in this process, once it has returned in all.

    It must not wait for other processes itself.

    Raises:
      Exception: what `function` raised here; a ValueError where it raised in another process alone.
    """
    if count() == 1:
        return function()
    found, error = None, None
    try:
        found = function()
    except Exception as raised:
        error = raised
    messages = _gather("" if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message:
            raise ValueError(f"process {number}: {message}")
    return found


def check_shared(name: str, folder: pathlib.Path, file: str) -> None:
    """Raises ValueError, in all processes, where one does not see a file that the first has written.

    Args:
      name: what the folder is called in the error.
    """

    def see():
        if not (folder / file).is_file():
            raise ValueError(f"{name} must be in a folder that all processes share, got {str(folder)!r}, not seen here")

    together(see)


def check_same(described: dict[str, Any]) -> None:
    """Raises ValueError, in all processes, where one describes the run in another way than the first.

    Args:
      described: JSON-ready values by name.
    """
    if count() == 1:
        return
    first, *others = map(json.loads, _gather(json.dumps(described)))
    for number, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{name} must be the same in all processes, got {first.get(name)!r} in process 0 and "
                    f"{other.get(name)!r} in process {number}"
                )


def agree(losses: jax.Array | None, stops: bool, mesh: Mesh) -> tuple[np.ndarray | None, bool]:
    """Returns the losses of all clients, and whether any process stops; a small all-reduce.

    Args:
      losses: (S, K), spread over the mesh or on all of it.
      stops: whether this process was asked to stop.
      mesh: with devices of all processes.
    """
    flags = spread_blocks(lambda device: np.array([stops]), mesh)
    losses, stops = _on_all(mesh)(losses, flags)
    return None if losses is None else np.asarray(losses), bool(stops)


@functools.cache
def _on_all(mesh):
    return jax.jit(lambda losses, stops: (losses, stops.any()), out_shardings=NamedSharding(mesh, PartitionSpec()))


def lost(error: Exception) -> ProcessLostError:
    """Returns what an error of JAX's means in a program of several processes."""
    return ProcessLostError(
        f"process {jax.process_index()} of {count()} cannot go on, most likely because another process has "
        f"ended: {_first_line(error)}"
    )


def _first_line(error):
    return (str(error).splitlines() or [repr(error)])[0][:300]


def _gather(text):
    """The texts of all processes, in their order."""
    encoded = text.encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(encoded))).max())
    row = np.zeros(1 << max(longest, 1 << 10).bit_length(), np.uint8)  # of few lengths, each of which is compiled
    row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    # JSON has no zero byte, and what is raised is not expected to.
    return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(multihost_utils.process_allgather(row))]

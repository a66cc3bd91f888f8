"""`--distributed`: one run in several processes, which end together whatever happens to one."""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Iterator

import jax

from msjax.checks import integer
from msjax.cli.options import EXPECTED
from msjax.logs import shorten
from msjax.split.finite import NonFiniteError
from msjax.training import Interrupted, processes

FLAG = "--distributed"
_SECONDS_FOR_OTHERS = 2.0


@dataclasses.dataclass(frozen=True)
class HostFlags:
    """How several processes find each other, read before all other options and listed with them."""

    distributed: bool = False
    """One run in several processes, each of which is given this. They find each other by themselves under SLURM,
    Kubernetes, Open MPI and on TPU pods, else by the next three options."""
    coordinator_address: str | None = None
    """HOST:PORT of the first process."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    local_device_ids: tuple[int, ...] | None = None
    """Which devices of its host this process has, by commas, where several processes share a host; by default all, or
    what the system of processes says."""
    heartbeat_seconds: int = processes.HEARTBEAT_SECONDS
    """A process that is silent for so long is taken for dead."""


FIELDS = tuple(field.name for field in dataclasses.fields(HostFlags)[1:])
OPTIONS = tuple(f"--{name.replace('_', '-')}" for name in FIELDS)
"""What says by hand what `--distributed` finds by itself, and how long a process may be silent."""


def join(options: argparse.Namespace) -> None:
    """Joins the processes of the run, where the options say that there are several.

    Raises:
      ValueError: an option does not fit, or what is not given cannot be found.
    """
    given = {option: getattr(options, field) for option, field in zip(OPTIONS, FIELDS, strict=True)}
    if not options.distributed:
        if also := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{also[0]} takes {FLAG} beside it")
        return
    address, count, number, devices, seconds = given.values()
    count = _integer("--num-processes", count, 1)
    number = _integer("--process-id", number, 0, None if count is None else count - 1)
    seconds = _integer("--heartbeat-seconds", seconds, 1)
    if devices is not None:
        numbers = [_integer("--local-device-ids", each, 0) for each in devices.split(",")]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"--local-device-ids must name each device once, got {devices}")
        devices = numbers
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator-address must be HOST:PORT, got {address!r}")
    seconds = processes.HEARTBEAT_SECONDS if seconds is None else seconds
    processes.join(address, count, number, devices, heartbeat_seconds=seconds)


def _integer(option, text, *bounds):
    """The number that an option says, within these bounds; None where it is not given."""
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{option} must be an integer, got {text!r}")
    return integer(option, int(text), *bounds)


@contextlib.contextmanager
def ending_together(command: str, advice: str) -> Iterator[None]:
    """Ends this process at once where it fails among several, so that no other waits for it for ever.

    That training was interrupted or diverged passes: all raise that at the same step.

    Args:
      command: what messages begin with.
      advice: what to do where another process has ended.
    """
    try:
        yield
    except (Interrupted, NonFiniteError):
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        status = 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, EXPECTED) else 1
        if isinstance(error, processes.ProcessLostError):
            print(f"msjax {command}: {shorten(str(error))}; {advice}", file=sys.stderr)
        elif isinstance(error, EXPECTED):
            print(f"msjax {command}: {shorten(str(error))}", file=sys.stderr)
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error)
        # No exit handlers: JAX's would wait for the other processes.
        sys.stdout.flush()
        sys.stderr.flush()
        if processes.is_first():
            # JAX aborts the others when the first has ended: they first say what they have to.
            time.sleep(_SECONDS_FOR_OTHERS)
        os._exit(status)

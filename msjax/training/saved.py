"""The state of a run as its checkpoints have it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from msjax.build import check_tokenizer
from msjax.runs import RunFolder
from msjax.split.metrics import MetricSums, zero_sums
from msjax.split.spec import RunSpec
from msjax.split.state import TrainState, check_constants, digest
from msjax.training import program
from msjax.training.devices import replicate
from msjax.training.loaded import LoadedRun, placed

CONSTANTS = "constants"
"""In a checkpoint: the digest of what never changes, which the checkpoint leaves out."""


def to_save(spec: RunSpec, state: TrainState) -> dict[str, Any]:
    """Returns what is saved of a `TrainState`: without what this run does not have, and what never changes."""
    lacking = {"memory": not state.memory, "up_bits": state.up_bits is None}
    state = state._replace(
        client=state.client.without(spec.client_constants), server=state.server.without(spec.server_constants)
    )
    return {name: value for name, value in state._asdict().items() if not lacking.get(name)}


def _restored(spec, saved, state):
    """The `TrainState` of what was saved, with what never changes of `state`."""
    found = TrainState(**saved)
    return found._replace(
        client=found.client.with_constants_of(state.client, spec.client_constants),
        server=found.server.with_constants_of(state.server, spec.server_constants),
    )


def digest_of_constants(spec: RunSpec, state: TrainState) -> str | None:
    """Returns the digest of what never changes in a state as `LoadedRun` has it; None where nothing is of that kind."""
    names = (spec.client_constants, spec.server_constants)
    if not any(names):
        return None
    parts = zip((state.client, state.server), names, strict=True)
    return digest(*({name: part.stats[name] for name in sorted(of_part)} for part, of_part in parts))


class _SumsBefore(NamedTuple):
    """What was saved in place of `MetricSums` before there were tasks other than classification."""

    loss: Any
    top1: Any
    top5: Any
    samples: Any
    uplink_bytes: Any
    downlink_bytes: Any


def restore(
    folder: RunFolder, run: LoadedRun, state: TrainState, mesh: Mesh | None
) -> tuple[TrainState, MetricSums, dict[str, Any]] | None:
    """Returns the newest checkpoint's state, sums and progress, or None where there is none.

    Raises:
      ValueError: it does not fit the run, or was trained on texts that were split into words by another tokenizer, or
        beside other weights that never change.
    """
    step = folder.checkpoints.latest()
    if step is None:
        return None
    sums = replicate(zero_sums(run.spec), mesh)
    like = to_save(run.spec, state)
    try:
        (saved, sums), progress = folder.checkpoints.restore(step, (like, sums))
    except ValueError as error:
        if run.spec.task.name != "classification":
            raise
        does_not_fit = error
    else:
        check_tokenizer(run.dataset.tokenizer, progress.get("tokenizer"))
        check_constants(digest_of_constants(run.spec, run.state), progress.pop(CONSTANTS, None))
        return _restored(run.spec, saved, state), sums, progress
    zero = lambda dtype: replicate(jnp.zeros((), dtype), mesh)  # noqa: E731
    kinds = (jnp.float32, jnp.int32, jnp.int32, jnp.int32, jnp.float32, jnp.float32)
    before = _SumsBefore(*map(zero, kinds))
    try:
        (saved, before), progress = folder.checkpoints.restore(step, (like, before))
    except ValueError:
        raise does_not_fit from None
    check_tokenizer(run.dataset.tokenizer, progress.get("tokenizer"))
    tops = {f"{n}_percent": jnp.stack([getattr(before, n), before.samples]) for n in ("top1", "top5")}
    sums = MetricSums(before.loss, before.samples, tops, before.uplink_bytes, before.downlink_bytes)
    return TrainState(**saved), replicate(sums, mesh), progress


def trained_state(run: LoadedRun, folder: RunFolder) -> TrainState | None:
    """Returns the parts that a finished run ended with, from its last checkpoint; None where that is not there."""
    if folder.checkpoints.latest() != run.spec.schedule.total_steps:
        return None
    state, mesh = placed(run)
    state, _, _ = restore(folder, run, state, mesh)
    return program.gather(run.spec, state, mesh)

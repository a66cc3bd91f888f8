"""What the folder of a served run holds beside its records: what it was built from, its counts and its results."""

import json
import re
import uuid
from typing import Any

from msjax import build, config
from msjax.distributed import agreement
from msjax.distributed.own_parts import SERVER, OwnParts
from msjax.distributed.stores import ServerStore
from msjax.models import RemoteApply
from msjax.parts import save_trained
from msjax.runs import RunFolder, environment, plots, write_atomically
from msjax.split import parties
from msjax.split.spec import RunSpec

_COUNTS = "counts.json"
_FIRST_SECONDS = "first_seconds"
_BUILT_FROM = "built_from.json"
PART_RUN_ID = "part_run_id"
"""In the progress that goes with the checkpoint of the end: the `run_id` of the server's part."""
BuiltFrom = tuple[int, int, dict[str, Any]]
"""Samples, test samples, and the clients' description of the run; see `agreement`."""


def write_results(
    cfg: config.Config, folder: RunFolder, spec: RunSpec, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """Writes what a finished run leaves in its folder beside the server's part; returns the summary."""
    last, headline = history[-1], spec.task.headline
    summary = {"headline": headline}
    summary |= {name: last[name] for name in ("train", "test", "test_samples", "traffic") if name in last}
    summary |= {"config": config.to_json(cfg), "environment": environment()}
    folder.write_history(history)
    if plots.available():
        title = f"{cfg.model.name} {cfg.data.name} {cfg.model.cut}, served: {cfg.codec}"
        plots.draw_curves(history, headline, title, folder.path / "curves.png")
    folder.write_summary(summary)  # last: a run that has one is finished
    return summary


def finish(cfg: config.Config, folder: RunFolder) -> list[str]:
    """Writes what a run lacks that is trained to the end, without its clients, which may have gone.

    Returns:
      The names of the files: server.safetensors where it is gone, and summary.json where the server ended before it was
      written. An empty list where nothing is missing, or there is no checkpoint of the end.
    """
    path = folder.path / "server.safetensors"
    lacks_part, lacks_summary = not path.exists(), folder.read_summary() is None
    if not (lacks_part or lacks_summary) or (found := read_built_from(folder)) is None:
        return []
    summary, progress = agreement.summary_of(found[2]), {}
    spec = _spec_of(cfg, found)
    store = ServerStore(folder.path / "checkpoints", progress)
    try:
        step = store.latest()
        if step != spec.schedule.total_steps:
            return []
        parts = OwnParts(build.to_go_on(cfg), summary, SERVER)
        party = parties.Server(spec, parts.first_state(spec.optimizer), cfg.seed)
        store.restore(step, party)
    finally:
        store.close()
    if lacks_part:
        part_id = progress.get(PART_RUN_ID, run_id(folder))  # of earlier versions' parts it is the run's name
        save_trained(path, "server", party.state, cfg, summary, run_id=part_id, step=step)
    if lacks_summary:
        write_results(cfg, folder, spec, progress["history"])
    return lacks_part * ["server.safetensors"] + lacks_summary * ["summary.json"]


def _spec_of(cfg, built_from):
    samples, test_samples, description = built_from
    without_weights = config.with_fields(cfg, {"model.weights": None})
    parts = OwnParts(without_weights, agreement.summary_of(description))
    return describe(cfg, parts, samples, test_samples, description)


def epoch_steps(cfg: config.Config, folder: RunFolder) -> int | None:
    """Returns the steps of an epoch of a run; None of one that has no checkpoint yet."""
    found = read_built_from(folder)
    return None if found is None else _spec_of(cfg, found).schedule.epoch_steps


def describe(
    cfg: config.Config, parts: OwnParts, samples: int, test_samples: int, description: dict[str, Any]
) -> RunSpec:
    """Returns the `RunSpec` of the run that clients with this description have."""
    run = description["run"]
    values = run.get("client values"), run.get("client state values"), run.get("client statistics", 0)
    remote = any(isinstance(part.apply, RemoteApply) for part in parts.shapes[::2])
    options = {"parts": parts.shapes, "client_values": values if remote else None}
    options["own_tests"] = run.get("own_tests") is True
    return build.build(cfg, parts.summary, samples=samples, test_samples=test_samples, **options).spec


def write_built_from(folder: RunFolder, built_from: BuiltFrom) -> None:
    """Keeps what the run is built from, for a later process."""
    write_atomically(folder.path / _BUILT_FROM, json.dumps(built_from))


def read_built_from(folder: RunFolder) -> BuiltFrom | None:
    """Returns what an earlier process has built the run from; None where it wrote none.

    Raises:
      ValueError: the file is damaged.
    """
    file = folder.path / _BUILT_FROM
    if not file.exists():
        return None
    try:
        samples, test_samples, description = json.loads(file.read_text("utf-8"))
        agreement.summary_of(description)
        return int(samples), int(test_samples), description
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} must be a description of clients, but it is damaged: {error}") from None


def write_counts(folder: RunFolder, counts: dict[str, Any], first_seconds: Any) -> None:
    """Keeps what this and earlier processes of the run have counted, and `Membership.first_seconds`."""
    write_atomically(folder.path / _COUNTS, json.dumps(counts | {_FIRST_SECONDS: first_seconds}))


def read_counts(folder: RunFolder) -> dict[str, float] | None:
    """Returns what earlier processes of the run have counted; None where there is no file, or a damaged one."""
    try:
        counts = json.loads((folder.path / _COUNTS).read_bytes())
        return {name: float(counts[name]) for name in ("received_bytes", "sent_bytes", "seconds", "waited_seconds")}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_first_seconds(folder: RunFolder) -> Any:
    """Returns `Membership.first_seconds` of earlier processes of the run; nothing where that is not there."""
    try:
        learned = json.loads((folder.path / _COUNTS).read_bytes())[_FIRST_SECONDS]
        kinds = lambda kind: None if kind is None else tuple(map(int, kind))  # noqa: E731
        return tuple(((kinds(last), kinds(kind)), float(seconds)) for (last, kind), seconds in learned)
    except (OSError, ValueError, TypeError, KeyError):
        return ()


def run_id(folder: RunFolder) -> str:
    """Returns the name of a folder's run, the same when it is resumed."""
    file = folder.path / "run"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex)
    name = file.read_bytes().decode("ascii", "replace")
    if not re.fullmatch("[0-9a-f]{32}", name):
        raise ValueError(f"{file} must hold the run's name, 32 hexadecimal digits, but it is damaged")
    return name

"""A run as a config describes it: its data loaded, its model built, its results in a run folder."""

import dataclasses
import shlex
import sys
import uuid
from typing import Any

import jax
import jax.numpy as jnp

from msjax import build, config
from msjax.checks import integer
from msjax.compress import Identity
from msjax.data import digests
from msjax.parts import part_run_id, save_trained
from msjax.runs import RunFolder, environment, plots
from msjax.runs.environment import commit
from msjax.split.budget import check_known_link, mean_up_bits
from msjax.split.early import check_labels
from msjax.split.state import TrainState
from msjax.split.traffic import run_traffic
from msjax.training import loaded, loop, processes, saved

_PARTS = ("client", "server")


def load_run(cfg: config.Config) -> loaded.LoadedRun:
    """Loads the data of a config, builds its model and divides the data among the clients.

    All parts of the model must be here.

    Raises:
      ValueError: a field of the config has a value that does not fit.
      data.DataError: the data set cannot be had.
    """
    cfg = build.resolved(cfg)
    dataset = build.load_data(cfg)
    indices, samples = build.shares(cfg, dataset)
    summary = build.DataSummary.of(dataset).normalized_as(cfg.data)
    built = build.build(cfg, summary, samples=samples, test_samples=len(dataset.test))
    if built.spec.client is None or built.spec.server is None:
        raise ValueError("model.name must make all parts of the model in one program, got a RemotePart among them")
    check_known_link(built.spec)
    check_labels(built.spec, dataset)
    state = TrainState(built.client, built.server, jnp.int32(0))
    if config.is_reference(cfg.model.name):  # a run gives its state away, but what a preset keeps is not its own
        state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True) if isinstance(leaf, jax.Array) else leaf, state)
    title = f"{cfg.model.name} {cfg.data.name} {cfg.model.cut} {type(cfg.codec).__name__}"
    options = (cfg.allow_nonfinite, cfg.data.workers, cfg.clients_per_group, cfg.shard_server)
    return loaded.LoadedRun(built.spec, state, dataset, indices, cfg.seed, title, *options)


def load_run_everywhere(cfg: config.Config) -> loaded.LoadedRun:
    """Returns `load_run(cfg)`, in every process where there are several.

    Raises:
      ValueError, data.DataError: see `load_run`; or the processes have not the same config and data.
    """
    processes.check_same(_fields(config.to_json(config.without_paths(cfg))))
    run = processes.together(lambda: load_run(cfg))
    loaded.check_processes(run)
    return run


def _fields(tree, prefix=""):
    """The fields of a config in JSON, by names such as optim.learning_rate."""
    found = {}
    for name, value in tree.items():
        found |= _fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def load_run_to_go_on(cfg: config.Config, folder: RunFolder) -> loaded.LoadedRun:
    """Returns `load_run_everywhere` of a config for the run in `folder`, in which nothing is changed.

    Raises:
      ValueError, data.DataError: see `load_run_everywhere`; or the data are not those with which the run began.
    """
    run = _load_for(cfg, folder)
    processes.from_first(lambda: folder.check_data(digests(run.dataset)))
    return run


def _load_for(cfg, folder):
    return load_run_everywhere(cfg if folder.checkpoints.latest() is None else build.to_go_on(cfg))


def open_or_create(cfg: config.Config, name: str) -> tuple[RunFolder, config.Config]:
    """Opens the run `name` under `cfg.out`, or makes it; of several processes the first does."""
    return RunFolder.open(processes.from_first(lambda: str(RunFolder.open_or_create(cfg, name)[0].path)))


def train_config(
    cfg: config.Config, folder: RunFolder, *, run: loaded.LoadedRun | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains, or goes on training, in `folder`; returns the summary, which is also in summary.json.

    Args:
      run: `load_run_everywhere(cfg)` or `load_run_to_go_on(cfg, folder)`, if it was called already.

    Raises:
      loop.Interrupted: SIGINT or SIGTERM came; the state was saved.
      NonFiniteError: a loss is NaN or infinite.
      ValueError, data.DataError: see `load_run_everywhere`; or the data are not those with which the run in `folder`
        began.
      processes.ProcessLostError: another process has ended, where there are several.
    """
    commit()  # as the sources are now
    cfg = build.resolved(cfg)
    if run is None:
        run = _load_for(cfg, folder)
    found = digests(run.dataset)
    processes.from_first(lambda: folder.keep_data(found))
    finished = loop.train(run, folder, quiet=quiet)
    return processes.from_first(lambda: _write_results(cfg, folder, run, finished, found))


def _write_results(cfg, folder, run, finished, data_digests):
    """Writes what a finished run leaves in its folder; returns the summary."""
    spec, schedule = run.spec, run.spec.schedule
    last, headline = finished.history[-1], spec.task.headline
    _save_parts(_PARTS, cfg, folder, run, finished.state, uuid.uuid4().hex)
    samples = schedule.samples_before(schedule.total_steps)
    dense = spec.feature_payload(1).dense()
    plain = run_traffic(dataclasses.replace(spec, update_codec=Identity()), cfg.epochs)
    summary = {
        "headline": headline,
        **{name: last[name] for name in ("test", "train", "traffic") if name in last},
        "uncompressed_feature_bytes": samples * dense.nbytes,
        "uncompressed_synchronization_bytes": plain.uplink_synchronization_bytes + plain.downlink_synchronization_bytes,
        "data_sha256": data_digests,
        "wall_seconds": round(finished.wall_seconds, 1),
        "images_per_second": round(samples / finished.train_seconds, 1),
        "command": shlex.join(sys.argv),
        "config": config.to_json(cfg),
        "environment": environment(),
    }
    if plots.available():
        plots.draw_curves(finished.history, headline, f"{run.title}: {cfg.codec}", folder.path / "curves.png")
    folder.write_summary(summary)  # last: a run that has one is finished
    return summary


def with_more_epochs(
    cfg: config.Config, folder: RunFolder, epochs: int, *, epoch_steps: int | None = None
) -> config.Config:
    """Returns the config of a run that is to have so many epochs; with `RunFolder.set_config` the folder has it.

    The run then goes on from its last checkpoint with all of its state. The learning rate is from there on that of the
    new config: a cosine that had come to 0 is again where one of `epochs` epochs is at that step.

    Args:
      epoch_steps: where it is known; else it follows from the records.

    Raises:
      ValueError: the run has done as many epochs or more, or has no checkpoint left.
    """
    integer("epochs", epochs, 1)
    if epochs == cfg.epochs:
        return cfg
    history = folder.read_history() if (folder.path / "metrics.jsonl").exists() else []
    step = folder.checkpoints.latest()
    if step is None and history:
        raise ValueError(f"the run must have a checkpoint to go on from, got {str(folder.path)!r} without one")
    epoch_steps = history[0]["step"] if epoch_steps is None and history else epoch_steps
    done = -(-(step or 0) // epoch_steps) if epoch_steps else int(step is not None)  # also one that it is in
    if epochs <= done:
        raise ValueError(f"epochs must be above {done}, which the run has done or is in, got {epochs}")
    return dataclasses.replace(cfg, epochs=epochs)


def write_missing_parts(cfg: config.Config, folder: RunFolder) -> list[str]:
    """Writes those trained parts of a finished run anew whose files are gone, from its last checkpoint.

    Returns:
      Their names; none where nothing is missing or the checkpoint is not there.
    """
    missing = processes.from_first(lambda: [part for part in _PARTS if not _part_file(folder, part).exists()])
    if not missing or folder.checkpoints.latest() is None:
        return []
    run = load_run_everywhere(build.to_go_on(cfg))
    state = saved.trained_state(run, folder)
    if state is None:
        return []
    processes.from_first(lambda: _write_parts_anew(missing, cfg, folder, run, state))
    return missing


def _write_parts_anew(missing, cfg, folder, run, state):
    run_id = uuid.uuid4().hex
    for part in _PARTS:
        if part not in missing:  # parts of one run have the same
            run_id = part_run_id(_part_file(folder, part)) or run_id
    _save_parts(missing, cfg, folder, run, state, run_id)


def _part_file(folder, part):
    return folder.path / f"{part}.safetensors"


def _save_parts(parts, cfg, folder, run, state, run_id):
    data_summary = build.DataSummary.of(run.dataset).normalized_as(cfg.data)
    names = {"run_id": run_id, "step": int(state.step)}
    for part in parts:
        names["up_bits"] = mean_up_bits(state.up_bits) if part == "client" else None
        save_trained(_part_file(folder, part), part, getattr(state, part), cfg, data_summary, **names)


def uncompressed(cfg: config.Config) -> config.Config:
    """Returns the same run without compression in either direction: what `compare` compares with."""
    plain = {name: Identity() for name in ("codec", "grad_codec", "update_codec")}
    budget = dict.fromkeys(("cut_bits", "cut_seconds", "link_bytes_per_second"))
    return dataclasses.replace(cfg, **plain, **budget, grad_kept_only=False, array_codecs=(), compare=False)

"""A run as a config describes it: its data loaded, its model built, its results in a run folder."""

import dataclasses
import sys
import uuid
from typing import Any

import jax.numpy as jnp

from msjax import build, config
from msjax.compress import Identity
from msjax.parts import save_trained
from msjax.runs import RunFolder, environment, plots
from msjax.split.state import TrainState
from msjax.training import loop
from msjax.training.api import check_labels


def load_run(cfg: config.Config) -> loop.LoadedRun:
    """Loads the data of a config, builds its model and divides the data among the clients.

    All parts of the model must be here.

    Raises:
      ValueError: a field of the config has a value that does not fit.
      data.DataError: the data set cannot be had.
    """
    dataset = build.load_data(cfg)
    indices, samples = build.divide(dataset, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed)
    summary = build.DataSummary.of(dataset).normalized_as(cfg.data)
    built = build.build(cfg, summary, samples=samples, test_samples=len(dataset.test))
    if built.spec.client is None or built.spec.server is None:
        raise ValueError("model.name must make all parts of the model in one program, got a RemotePart among them")
    check_labels(built.spec, dataset)
    state = TrainState(built.client, built.server, jnp.int32(0))
    title = f"{cfg.model.name} {cfg.data.name} {cfg.model.cut} {type(cfg.codec).__name__}"
    return loop.LoadedRun(built.spec, state, dataset, indices, cfg.seed, title, cfg.allow_nonfinite)


def train_config(
    cfg: config.Config, folder: RunFolder, *, run: loop.LoadedRun | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains, or goes on training, in `folder`; returns the summary, which is also in summary.json.

    Args:
      run: `load_run(cfg)`, if it was called already.

    Raises:
      loop.Interrupted: SIGINT or SIGTERM came; the state was saved.
      NonFiniteError: a loss is NaN or infinite.
      ValueError, data.DataError: see `load_run`.
    """
    if run is None:
        resumed = folder.checkpoints.latest() is not None  # which has newer weights than those of the file
        weights = None if resumed else cfg.model.weights
        run = load_run(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, weights=weights)))
    spec, schedule = run.spec, run.spec.schedule
    finished = loop.train(run, folder, quiet=quiet)
    last, headline = finished.history[-1], spec.task.headline
    if plots.available():
        plots.draw_curves(finished.history, headline, f"{run.title}: {cfg.codec}", folder.path / "curves.png")
    samples = cfg.epochs * cfg.clients * schedule.samples
    dense = spec.feature_payload(1).dense()
    summary = {
        "headline": headline,
        **{name: last[name] for name in ("test", "train", "traffic") if name in last},
        "uncompressed_feature_bytes": samples * dense.nbytes,
        "wall_seconds": round(finished.wall_seconds, 1),
        "images_per_second": round(samples / finished.train_seconds, 1),
        "command": " ".join(sys.argv),
        "config": config.to_json(cfg),
        "environment": environment(),
    }
    run_id, step = uuid.uuid4().hex, int(finished.state.step)
    data_summary = build.DataSummary.of(run.dataset).normalized_as(cfg.data)
    for part, state in (("client", finished.state.client), ("server", finished.state.server)):
        save_trained(folder.path / f"{part}.safetensors", part, state, cfg, data_summary, run_id=run_id, step=step)
    folder.write_summary(summary)
    return summary


def uncompressed(cfg: config.Config) -> config.Config:
    """Returns the same run without compression in either direction: what `compare` compares with."""
    return dataclasses.replace(cfg, codec=Identity(), grad_codec=Identity(), array_codecs=(), compare=False)

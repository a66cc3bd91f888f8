"""`msjax train`: train a split network in one program and count the bytes."""

import dataclasses
import sys

import tyro

from msjax import build, config, training
from msjax.cli.options import DEFAULT, check_early, preset_of, split_options
from msjax.runs import RunFolder
from msjax.runs.folder import check_new
from msjax.runs.tables import check_summary, print_summaries
from msjax.training.devices import split_cpu
from msjax.training.from_config import load_run, train_config, uncompressed, write_missing_parts


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config", "--resume", "--name")
    if where.resume is not None:
        if rest or where.config is not None or where.name is not None:
            raise ValueError(f"--resume takes the run's own config, got also {' '.join(rest) or '--config or --name'}")
        folder, cfg = RunFolder.open(where.resume, name="resume")
        if folder.is_served:
            raise ValueError(
                f"resume must be a run of msjax train, got {where.resume!r}, which goes on with msjax serve --resume"
            )
        split_cpu(cfg.clients)
        run = None
    else:
        default = preset_of(where) or DEFAULT
        description = (
            "Train a split network. Also: --config FILE.py (a preset), --resume RUN, --name NAME (of the run)."
        )
        cfg = tyro.cli(config.Config, args=rest, default=default, prog="msjax train", description=description)
        check_early(cfg)
        check_new(cfg, where.name)
        split_cpu(cfg.clients)
        # Before there is a folder, so that a config that does not work leaves none behind.
        run = load_run(cfg)
        if small := build.batch_of_small_share(cfg, run.spec.schedule.samples):
            print(f"msjax train: {small}", file=sys.stderr)
        folder = RunFolder.create(cfg, where.name)
    summaries = []
    try:
        if cfg.compare:
            base = dataclasses.replace(uncompressed(cfg), out=str(folder.path))
            summaries.append(_finish(*RunFolder.open_or_create(base, "uncompressed")))
        summaries.append(_finish(folder, cfg, run))
    except training.Interrupted:
        print(f"interrupted and saved; continue with: msjax train --resume {folder.path}")
        return 130
    print_summaries(summaries)
    return 0


def _finish(folder, cfg, run=None):
    """The summary of a run: read where it is there, else trained for."""
    try:
        if (summary := folder.read_summary()) is not None:
            check_summary(summary, str(folder.path / "summary.json"))
            for part in write_missing_parts(cfg, folder):
                print(f"written anew from the last checkpoint: {folder.path / part}.safetensors")
            return summary
        return train_config(cfg, folder, run=run)
    finally:
        folder.close()

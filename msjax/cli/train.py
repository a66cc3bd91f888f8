"""`msjax train`: train a split network in one program and count the bytes."""

import dataclasses
import sys

from msjax import build, config, training
from msjax.cli.options import DEFAULT, RunFlags, check_early, fields_of, parse, preset_of, split_options
from msjax.runs import RunFolder
from msjax.runs.folder import check_new
from msjax.runs.tables import check_summary, print_summaries
from msjax.training.devices import split_cpu
from msjax.training.from_config import load_run, train_config, uncompressed, with_more_epochs, write_missing_parts


@dataclasses.dataclass(frozen=True)
class _Flags(config.Config, RunFlags):
    """The config's, and which run."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config", "--resume", "--name")
    if where.resume is not None:
        more, rest = split_options(rest, "--epochs")
        if rest or where.config is not None or where.name is not None:
            also = " ".join(rest) or "--config or --name"
            raise ValueError(f"--resume takes the run's own config, and beside it --epochs alone, got also {also}")
        folder, cfg = RunFolder.open(where.resume, name="resume")
        if folder.is_served:
            raise ValueError(
                f"resume must be a run of msjax train, got {where.resume!r}, which goes on with msjax serve --resume"
            )
        split_cpu(cfg.clients)
        if more.epochs is not None:
            cfg = _with_epochs(folder, cfg, more.epochs)
        run = None
    else:
        default = preset_of(where) or DEFAULT
        description = (
            "Train a split network. With --resume RUN --epochs N a run goes on to N epochs, also where it is finished; "
            "the learning rate from there on is that of a run of N epochs."
        )
        flags = parse(_Flags, rest, default=_Flags(**vars(default)), prog="msjax train", description=description)
        cfg = fields_of(config.Config, flags)
        cfg = check_early(cfg)
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


def _with_epochs(folder, cfg, text):
    """The config of a run that goes on to another number of epochs, as the one beside it does."""
    if not text.isdecimal():
        raise ValueError(f"epochs must be an integer of at least 1, got {text!r}")
    new = with_more_epochs(cfg, folder, int(text))
    if cfg.compare and (folder.path / "uncompressed" / "config.json").is_file():
        beside, base = RunFolder.open(folder.path / "uncompressed")
        try:
            with_more_epochs(base, beside, int(text))
        finally:
            beside.close()
    return new


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

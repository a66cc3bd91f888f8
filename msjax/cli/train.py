"""`msjax train`: train a split network in one program and count the bytes."""

import dataclasses
import sys

from msjax import build, config, training
from msjax.cli import hosts
from msjax.cli.options import (
    DEFAULT,
    PLACES,
    RunFlags,
    check_early,
    check_new_config,
    fields_of,
    naming_the_way_on,
    number_of,
    parse,
    preset_of,
    split_options,
    with_places,
)
from msjax.runs import RunFolder
from msjax.runs.folder import check_new
from msjax.runs.tables import check_summary, print_summaries
from msjax.split.signs import warn_of_lost_signs
from msjax.training import processes
from msjax.training.devices import split_cpu
from msjax.training.from_config import (
    load_run_everywhere,
    load_run_to_go_on,
    open_or_create,
    train_config,
    uncompressed,
    with_more_epochs,
    write_missing_parts,
)


@dataclasses.dataclass(frozen=True)
class _Flags(hosts.HostFlags, config.Config, RunFlags):
    """The config's, which run, and how processes find each other."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config", "--resume", "--name", *hosts.OPTIONS, flag=hosts.FLAG)
    if where.resume is not None:
        more, rest = split_options(rest, "--epochs")
        preset = preset_of(where)
        folder, cfg = RunFolder.open(where.resume, name="resume", preset=preset)
        moved, unknown = with_places(cfg, rest)
        if unknown or where.name is not None:
            raise ValueError(
                "--resume takes the run's own config, and beside it --epochs and where files are now "
                f"({PLACES}, and --config for the functions of a preset), got also {' '.join(unknown) or '--name'}"
            )
        if folder.is_served:
            raise ValueError(
                f"resume must be a run of msjax train, got {where.resume!r}, which goes on with msjax serve --resume"
            )
        if moved != cfg:
            check_early(moved)
    else:
        preset = preset_of(where)
        default = preset or DEFAULT
        description = (
            "Train a split network. With --resume RUN --epochs N a run goes on to N epochs, also where it is finished; "
            "the learning rate from there on is that of a run of N epochs. Beside --resume, where files of the run are "
            f"now: {PLACES}."
        )
        flags = parse(_Flags, rest, default=_Flags(**vars(default)), prog="msjax train", description=description)
        cfg = fields_of(config.Config, flags)
        cfg = check_new_config(cfg, preset)
        check_new(cfg, where.name)
    hosts.join(where)
    split_cpu(cfg.clients)
    with hosts.ending_together("train", "start all processes again"):
        folder, run = _begin(cfg, where.name) if where.resume is None else (folder, None)
        processes.from_first(folder.checkpoints.lock)
        if where.resume is not None:
            cfg, run = _go_on(folder, cfg, rest, more.epochs, preset)
        return _train(folder, cfg, run)


def _go_on(folder, cfg, places, epochs, preset):
    """The config of a run that goes on, and its data where they were looked at.

    Files that have moved and other epochs are written down, also of the run beside it, once nothing is left to refuse.
    """
    folders = [(folder, cfg)]
    if cfg.compare and (folder.path / "uncompressed" / "config.json").is_file():
        folders.append(RunFolder.open(folder.path / "uncompressed", preset=preset))
    changes, run = [], None
    for one, own in folders:
        moved = with_places(own, places)[0]
        new = moved if epochs is None else with_more_epochs(moved, one, number_of(epochs))
        if new != own or preset is not None:
            changes.append((one.set_places if new.epochs == own.epochs else one.set_config, new))
        if one is folder:
            cfg = new
    if changes:
        run = load_run_to_go_on(cfg, folder)  # of all processes: all have read what is changed below
        processes.from_first(lambda: [write(new) for write, new in changes])
    for one, _ in folders[1:]:
        one.close()
    return cfg, run


def _begin(cfg, name):
    """The folder and the data of a new run."""
    # Before there is a folder, so that a config that does not work leaves none behind.
    run = load_run_everywhere(cfg)
    build.check_tail(cfg, run.spec)
    small = build.batch_of_small_share(cfg, run.spec.schedule.samples)
    if small and processes.is_first():
        print(f"msjax train: {small}", file=sys.stderr)
    if build.may_be_negative(cfg) and processes.is_first():
        warn_of_lost_signs(run.spec, run.state.client, run.dataset.train, server=run.state.server)
    folder = RunFolder(processes.from_first(lambda: str(RunFolder.create(cfg, name).path)))
    processes.check_shared("out", folder.path, "config.json")
    return folder, run


def _train(folder, cfg, run):
    """Trains what is not trained yet, and prints the result; returns the exit status."""
    again = f"msjax train --resume {folder.path}"
    if processes.is_first() and processes.count() > 1:  # where JAX aborts a process, that says nothing more
        print(f"if one of the {processes.count()} processes ends, start all again with {again}", flush=True)
    summaries = []
    try:
        with naming_the_way_on(again), hosts.ending_together("train", f"start all processes again, with {again}"):
            if cfg.compare:
                base = dataclasses.replace(uncompressed(cfg), out=str(folder.path))
                summaries.append(_finish(*open_or_create(base, "uncompressed")))
            summaries.append(_finish(folder, cfg, run))
    except training.Interrupted:
        if processes.is_first():
            print(f"interrupted and saved; continue with: {again}")
        return 130
    if processes.is_first():
        print_summaries(summaries)
    return 0


def _finish(folder, cfg, run=None):
    """The summary of a run: read where it is there, else trained for."""
    try:
        if (summary := processes.from_first(lambda: _read_summary(folder))) is not None:
            for part in write_missing_parts(cfg, folder):
                if processes.is_first():
                    print(f"written anew from the last checkpoint: {folder.path / part}.safetensors")
            return summary
        return train_config(cfg, folder, run=run)
    finally:
        folder.close()


def _read_summary(folder):
    if (summary := folder.read_summary()) is not None:
        check_summary(summary, str(folder.path / "summary.json"))
    return summary

"""`msjax eval`: test a trained run, what a config starts from, or a client's part with a server elsewhere."""

import argparse
import dataclasses
import pathlib
import sys

from msjax import build, config
from msjax.cli.options import (
    DEFAULT,
    PresetFlag,
    check_new_config,
    fields_of,
    network,
    parse,
    preset_of,
    split_options,
)
from msjax.compress import Identity
from msjax.data import digests
from msjax.runs import RunFolder, to_json
from msjax.split.budget import mean_up_bits
from msjax.split.spec import RunSpec
from msjax.training import evaluator, loaded, saved
from msjax.training.devices import split_cpu
from msjax.training.from_config import load_run


@dataclasses.dataclass(frozen=True)
class _Flags(config.Config, PresetFlag):
    """The config's, and its preset."""


_OF_RUN = ("--help", "--uncompressed", "--data-dir", "--test")
"""Options of a run, which may come before it; those of a config have other names."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    if split_options(arguments, "--server")[0].server is not None:
        return network().evaluate(arguments)
    _, rest = split_options(arguments, "--config")
    if not rest or (rest[0].startswith("--") and rest[0].partition("=")[0] not in _OF_RUN):
        return _evaluate_config(arguments)
    parser = argparse.ArgumentParser(
        prog="msjax eval",
        allow_abbrev=False,
        description="Test a trained run on its test set. With the options of msjax train in place of a run: test what "
        "such a run starts from, as published weights (--model.weights). With --server: test a client's part.",
    )
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--uncompressed", action="store_true", help="send test features as they are")
    parser.add_argument("--data-dir", help="where the data set is on this machine")
    parser.add_argument("--test", metavar="FILE", help="of a language model: a text to test on in place of the run's")
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="of a client's part, CLIENT.safetensors, in place of a run: where the "
        "server's is (msjax serve --part); `--server HOST:PORT --help` lists what that takes",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.py",
        help="without a run: a preset to test; any option of msjax train overrides it. After a run: the file where the "
        "functions of its preset are now, if it has moved",
    )
    options = parser.parse_args(arguments)
    if options.run.endswith(".safetensors"):
        raise ValueError(f"the run must be a folder; a part is tested with --server, got {options.run!r} without it")
    folder, cfg = RunFolder.open(options.run, read_only=True, preset=preset_of(options))
    if folder.is_served:
        raise ValueError(
            f"the run must be one of msjax train, got {options.run!r} of msjax serve, whose clients have their parts: "
            f"serve its own with msjax serve --part {folder.path / 'server.safetensors'}, and test a client's with "
            "msjax eval CLIENT.safetensors --server HOST:PORT"
        )
    if options.data_dir and (config.is_local_path(cfg.data.name) or pathlib.Path(cfg.data.name).is_absolute()):
        raise ValueError(
            f"data_dir must not be given for a file or folder of one's own, {cfg.data.name!r}: if it has moved, say so "
            f"with msjax train --resume {options.run} --data.name PATH"
        )
    if options.data_dir:
        cfg = config.with_fields(cfg, {"data.data_dir": options.data_dir})
    if options.test is not None:
        cfg = config.with_fields(cfg, {"data.test": options.test})
    if options.uncompressed:
        cfg = dataclasses.replace(cfg, eval_compressed=False)
    split_cpu(cfg.clients)
    run = load_run(build.to_go_on(cfg))
    if options.test is None:  # with it the data are divided otherwise
        _check_data(folder, run)
    state, mesh = loaded.placed(run)
    found = saved.restore(folder, run, state, mesh)
    folder.close()
    if found is None:
        raise ValueError(f"the run must have a checkpoint, got {options.run!r} without one")
    schedule, step = run.spec.schedule, int(found[0].step)
    if run.spec.mode.own_parts and step and not schedule.mode.averages_after(schedule, step - 1) and cfg.clients > 1:
        raise ValueError(
            f"the run must have been stopped where its clients' parts are equal, got {options.run!r}, stopped at step "
            f"{step} between two averages: msjax train --resume {options.run} first"
        )
    return _print_result({"run": str(folder.path)}, run, found[0], mesh)


def _check_data(folder, run):
    """Refuses other data to train, from which classes and standardization are, and says so of others to test."""
    others = folder.other_data(found := digests(run.dataset))
    if "train" in others:
        folder.check_data(found)
    if others:
        print("msjax eval: the data to test are not those that the run was tested on", file=sys.stderr)


def _evaluate_config(arguments):
    """Tests what a config starts from."""
    where, rest = split_options(arguments, "--config")
    preset = preset_of(where)
    default = preset or DEFAULT
    description = "Test what a run starts from, as published weights."
    flags = parse(_Flags, rest, default=_Flags(**vars(default)), prog="msjax eval", description=description)
    cfg = check_new_config(fields_of(config.Config, flags), preset)
    split_cpu(cfg.clients)
    run = load_run(cfg)
    state, mesh = loaded.placed(run)
    said = {"model": cfg.model.name, "weights": cfg.model.weights, "cut": cfg.model.cut, "data": cfg.data.name}
    return _print_result(said, run, state, mesh)


def _print_result(said, run, state, mesh):
    result = evaluator.Evaluator(run, mesh)(state)
    how = describe_features(run.spec, mean_up_bits(state.up_bits))
    print(to_json({**said, "step": int(state.step), "features": how, **result}, indent=2))
    return 0


def describe_features(spec: RunSpec, up_bits: float | None) -> str:
    """Returns how features cross the cut in a test; `up_bits` as of `parts.TrainedPart`."""
    if all(isinstance(codec, Identity) for codec in spec.test_codec.all):
        return "no compression"
    return str(spec.test_codec) + ("" if up_bits is None else f", aimed at {up_bits:.2f} bits by the budget")

"""Does the runs of studies, each in a process of its own, and is the command line of every study."""

import argparse
import concurrent.futures
import dataclasses
import importlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import Any

from experiments import study
from msjax import config as config_lib
from msjax.cli.main import large_pages

INTERRUPTED = 130
NOT_BEGUN = 1000  # no status of a process
"""Of a run before which the call has ended, as it was interrupted, or another run failed."""
_AMONG = ("coordinator_address", "num_processes", "process_id", "local_device_ids", "heartbeat_seconds")


def do(scale: str, run: study.Run, command: str, results: pathlib.Path = study.RESULTS) -> study.Record:
    """Trains, or goes on with it, or measures; in the folder of the run under its config's `out`. Writes the record.

    Of several processes the first one writes it.
    """
    from msjax import runs  # these start JAX
    from msjax.training import processes
    from msjax.training.devices import split_cpu

    file = results / scale / f"{study.key(run)}.json"
    cfg = run.config if isinstance(run, study.Measured) else run
    split_cpu(cfg.clients)
    made = _measure(scale, run) if isinstance(run, study.Measured) else _train(run)
    made |= {"config": config_lib.to_json(config_lib.without_paths(cfg)), "command": command}

    def write():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():  # of a network that is trained anew for a measurement the record stands
            runs.write_atomically(file, runs.to_json(made, indent=1) + "\n")

    processes.from_first(write)
    return made


def _train(cfg):
    from msjax.data import digests
    from msjax.training import processes
    from msjax.training.from_config import load_run_everywhere, open_or_create, train_config

    # Before there is a folder, so that a data set that is not there leaves none behind.
    run = load_run_everywhere(cfg)
    folder, opened = open_or_create(cfg, study.key(cfg))
    if study.key(opened) != study.key(cfg):
        raise ValueError(f"{folder.path} must be a run of this config, and was given another: name another --out")
    if (summary := folder.read_summary()) is None or not (folder.path / "metrics.jsonl").exists():
        summary = train_config(cfg, folder, run=run)
    else:  # of whatever version and machine
        processes.from_first(lambda: folder.check_data(digests(run.dataset)))
        print(f"{folder.path}: trained before; with another --out it is trained anew", flush=True)
    folder.close()
    return summary | {"history": processes.from_first(folder.read_history)}


def _measure(scale, run):
    from msjax import runs

    if not _is_trained(run.config):
        _train(run.config)
    module, _, function = run.by.partition(":")
    start = time.monotonic()
    rows = getattr(importlib.import_module(module), function)(_folder(run.config), run.config, scale)
    made = {"by": run.by, "wall_seconds": round(time.monotonic() - start, 1), "environment": runs.environment()}
    data = _folder(run.config) / "data.json"
    return made | ({"data_sha256": json.loads(data.read_text())} if data.exists() else {}) | {"rows": rows}


def _folder(cfg):
    return pathlib.Path(cfg.out) / study.key(cfg)


def _is_trained(cfg):
    return (_folder(cfg) / "summary.json").exists()  # what a run writes last


def run_missing(
    scale: str,
    wanted: dict[str, study.Run],
    *,
    command: str,
    results: pathlib.Path = study.RESULTS,
    jobs: int = 1,
    among: dict[str, Any] | None = None,
) -> int:
    """Does those of `wanted` that have no record, each in a process of its own, `jobs` at a time.

    Measurements come last, and after the training of networks whose folders they need.

    Args:
      among: of a run in several processes, which this is, as `cli.hosts.join` takes it; each of them makes the same
        call, with the same records at hand. Measurements are then left for a call without it, and a run that fails
        ends the call.

    Returns 0; 1 where a run failed, which does not keep the others from running; else 130 where it was interrupted,
    when the states of all runs are saved.
    """
    missing = {study.key(run): (name, run) for name, run in wanted.items() if study.record(scale, run, results) is None}
    measured = {k: pair for k, pair in missing.items() if isinstance(pair[1], study.Measured)}
    trained = {k: pair for k, pair in missing.items() if k not in measured}
    for name, run in measured.values():
        if not _is_trained(run.config):
            trained.setdefault(study.key(run.config), (f"network of {name}", run.config))
    print(f"{len(wanted)} runs at scale {scale}, {len(missing)} to go", flush=True)
    codes = _run_all(scale, trained, command, results, jobs, among)
    if measured and among:
        print(f"{len(measured)} measurements are left for a call without --distributed", flush=True)
    elif not codes & {INTERRUPTED, NOT_BEGUN}:
        codes |= _run_all(scale, measured, command, results, jobs)
    failed = codes - {0, INTERRUPTED, NOT_BEGUN}
    return INTERRUPTED if codes & {INTERRUPTED, NOT_BEGUN} and not failed else int(bool(failed))


def _run_all(scale, todo, command, results, jobs, among=None):
    """The exit codes of all of `todo`, {key: (name, run)}."""
    stop, children, start = threading.Event(), set(), time.monotonic()
    shares = queue.SimpleQueue()
    for cores in _shares(jobs):
        shares.put(cores)

    def process_of(run):
        if stop.is_set():
            return NOT_BEGUN
        cores = shares.get()
        # Of a session of its own, so that Ctrl-C does not reach it twice.
        arguments = [sys.executable, "-m", __name__, scale, str(results), command, *map(str, cores)]
        options = {"text": True, "start_new_session": True, "env": os.environ | large_pages()}
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, **options)
        children.add(process)
        cfg, by = run if isinstance(run, study.Measured) else (run, None)
        process.communicate(json.dumps({"config": config_lib.to_json(cfg), "by": by, "among": among}))
        children.remove(process)
        shares.put(cores)
        if process.returncode == INTERRUPTED or (among and process.returncode):
            stop.set()  # of several processes another one may be at the next run, or gone
        return process.returncode

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        names = {pool.submit(process_of, run): name for name, run in todo.values()}
        ended, codes = 0, set()
        left = set(names)
        while left:
            try:
                now, left = concurrent.futures.wait(left, return_when=concurrent.futures.FIRST_COMPLETED)
            except KeyboardInterrupt:
                stop.set()
                for process in tuple(children):
                    process.send_signal(signal.SIGINT)
                continue
            for future in now:
                ended += 1
                codes.add(future.result())
                minutes = (time.monotonic() - start) / 60 / ended * len(left)
                words = {0: "done", INTERRUPTED: "interrupted", NOT_BEGUN: "not begun"}
                word = words.get(future.result(), "failed")
                print(f"{names[future]}: {word}; {len(left)} runs to go, about {minutes:.0f} min", flush=True)
    return codes


def _shares(jobs):
    """The cores of each of the runs at a time: all for a single one, which needs not be told."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[n::jobs] if jobs > 1 else [] for n in range(jobs)]


def main(*studies: ModuleType, description: str | None = None) -> int:
    """The command of one study, or of several: does what is missing and prints what comes out."""
    parser = argparse.ArgumentParser(
        description=description or studies[0].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if len(studies) > 1:
        by_name = {module.__name__.rpartition(".")[2]: module for module in studies}
        parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(by_name)}; by default all")
    parser.add_argument("--scale", choices=study.SCALES, default="lite")
    parser.add_argument("--data-dir", help="a TFDS data directory; of a study on texts, their folder")
    parser.add_argument("--cache-dir", help="where the decoded images are kept")
    parser.add_argument("--weights", help="the folder of published weights, for studies that start from some")
    parser.add_argument("--out", default="runs", help="where the run folders are")
    parser.add_argument("--results", type=pathlib.Path, default=study.RESULTS, help="where the records are")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", nargs="+", help="names of runs, or the beginning of them")
    several = parser.add_argument_group("runs in several processes, each of which has this command; see msjax train")
    several.add_argument("--distributed", action="store_true")
    for name in _AMONG:
        several.add_argument(f"--{name.replace('_', '-')}")
    parser.add_argument("--table", action="store_true", help="print what the records say, run nothing")
    options = parser.parse_args()
    # Runs are told to stop by either; a shell that runs something in the background has it ignore the second.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if not options.distributed and any(getattr(options, name) is not None for name in _AMONG):
        parser.error("the options of several processes take --distributed beside them")
    if options.distributed and options.jobs > 1:
        parser.error(f"--jobs must be 1 with --distributed, got {options.jobs}")
    if len(studies) > 1 and options.studies:
        if unknown := set(options.studies) - by_name.keys():
            parser.error(f"STUDY must be one of {', '.join(by_name)}, got {', '.join(sorted(unknown))}")
        studies = [by_name[name] for name in options.studies]
    wanted = {}
    for module in studies:
        of = f"{module.__name__.rpartition('.')[2]}: " if len(studies) > 1 else ""
        wanted |= {f"{of}{name}": run for name, run in module.runs(options.scale).items()}
    if options.only:
        named = list(wanted)
        wanted = {name: run for name, run in wanted.items() if name.startswith(tuple(options.only))}
        if not wanted:
            parser.error(f"--only must name runs of the study, {'; '.join(named)}, got {options.only}")
    code = 0
    if not options.table:
        wanted = {name: _placed(run, options) for name, run in wanted.items()}
        named = getattr(options, "studies", None) or []
        words = ["python", "-m", f"experiments.{pathlib.Path(sys.argv[0]).stem}", *named, "--scale", options.scale]
        command = " ".join(words) + (f" --jobs {options.jobs}" if options.jobs > 1 else "")
        # That they are needed belongs to how a record was made, where they lay does not.
        command += "".join(
            f" --{name} DIR" for name in ("data-dir", "weights") if getattr(options, name.replace("-", "_"))
        )
        results = options.results.absolute()
        among = {name: getattr(options, name) for name in ("distributed", *_AMONG)} if options.distributed else None
        code = run_missing(options.scale, wanted, command=command, results=results, jobs=options.jobs, among=among)
    for module in studies:
        page = module.report(options.scale, study.records(module, options.scale, options.results))
        print(f"\n## {module.TITLE}\n\n{page.text}")
    return code


def _placed(run, options):
    if isinstance(run, study.Measured):
        return run._replace(config=_placed(run.config, options))
    data = dataclasses.replace(run.data, data_dir=options.data_dir, cache_dir=options.cache_dir)
    if run.data.name.endswith(".txt"):
        texts = {name: getattr(data, name) for name in ("name", "test")}
        placed = {name: text and os.path.join(options.data_dir or "", text) for name, text in texts.items()}
        data = dataclasses.replace(data, **placed, data_dir=None)
    weights = run.model.weights and os.path.join(options.weights or "", run.model.weights)
    model = dataclasses.replace(run.model, weights=weights)
    return dataclasses.replace(run, data=data, model=model, out=options.out)


def _one_run(scale: str, results: str, command: str, *cores: str) -> int:
    """The process of one run: its config and what measures it come on standard input."""
    from msjax import training

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if cores:
        os.sched_setaffinity(0, map(int, cores))
    try:
        given = json.load(sys.stdin)
        cfg = config_lib.from_json(given["config"], own_code=True)
        run = study.Measured(cfg, given["by"]) if given["by"] else cfg
        if given.get("among") is None:
            do(scale, run, command, pathlib.Path(results))
        else:
            _do_among(given["among"], scale, run, command, pathlib.Path(results))
    except (training.Interrupted, KeyboardInterrupt):
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"{given['config']['model']['name']}, {given['config']['data']['name']}: {error}", file=sys.stderr)
        return 1
    return 0


def _do_among(among, *args):
    """Does a run in one of several processes."""
    from msjax.cli import hosts

    hosts.join(argparse.Namespace(**among))
    with hosts.ending_together("train", "start all processes again"):
        do(*args)


if __name__ == "__main__":
    sys.exit(_one_run(*sys.argv[1:]))

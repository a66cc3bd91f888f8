"""What the studies share: their training runs, each done once and recorded, and the command line.

A study is a module of this package with

    TITLE                            a line
    runs(scale) -> {name: Run}       what has to be trained or measured; `scale` is "smoke", "lite" or "paper"
    report(scale, records) -> Page   what comes out, of the records that there are, by name

and is run with `python -m experiments.<study> --scale lite`. A run is known by its config: a finished one has a record
in `experiments/results/<scale>/` and is never repeated, whichever study asks for it; an interrupted one goes on from
its checkpoint in the run folder.

smoke: seconds, on the embedded data, to see that a study works; its numbers mean nothing and are not committed.
lite: CIFAR-10, a narrow ResNet9 and a short schedule, about five minutes a run on two CPU cores; see `base`.
paper: the published setting, for a GPU or TPU.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

from msjax import config as config_lib
from msjax.config import Config, DataConfig, ModelConfig, OptimConfig

ROOT = pathlib.Path(__file__).parent
RESULTS = ROOT / "results"
SCALES = ("smoke", "lite", "paper")
CUTS = ("shallow", "medium", "deep")
INTERRUPTED = 130
Record = dict[str, Any]


class Measured(NamedTuple):
    """A measurement on a trained network: `by` names "module:function".

    That gets the run's folder, its config and the scale, and returns rows, JSON-ready dicts. A network whose folder is
    gone is trained anew.
    """

    config: Config
    by: str


Run = Config | Measured


class Page(NamedTuple):
    """What a study has to say: Markdown, and figures by name, which the Markdown names as ![…](name.png)."""

    text: str
    figures: dict[str, Any]


def base(scale: str) -> Config:
    """The network, data and schedule that a study varies, where it is not about those."""
    if scale == "smoke":
        return Config(model=ModelConfig(name="convnet", width=0.5), clients=2, batch_size=64, epochs=1)
    if scale == "paper":
        return preset("vgg19_cifar10")
    return Config(
        model=ModelConfig(name="resnet9", width=0.25),
        data=DataConfig(name="cifar10"),
        optim=OptimConfig(learning_rate=0.3, nesterov=True, weight_decay=7e-4, warmup_epochs=1.0, label_smoothing=0.1),
        clients=10,
        batch_size=25,
        epochs=3,
    )


def preset(name: str) -> Config:
    """The config of `configs/<name>.py`."""
    return config_lib.load_preset(str(ROOT.parent / "configs" / f"{name}.py"))


def seeds(scale: str, *, lite: int = 3) -> range:
    """At lite scale three, since differences are small, or as many as a study of large ones says; otherwise one."""
    return range(lite if scale == "lite" else 1)


def legend(axes: Any, **options: Any) -> None:
    """Matplotlib's legend, on the first of these axes with anything to explain."""
    for one in axes:
        if one.get_legend_handles_labels()[0]:
            one.legend(**options)
            return


def with_cut(cfg: Config, cut: str) -> Config:
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, cut=cut))


def key(run: Run) -> str:
    """The name of a run's record and folder: what it is, and a hash of all in which its config differs from `Config()`.

    So a record outlives new fields of the config. Where the data lies and where the run folder is does not count.
    """
    if isinstance(run, Measured):
        return f"{run.by.partition(':')[0].rpartition('.')[2]}-{key(run.config)}"
    cfg = run
    differing = _differing(config_lib.to_json(_nowhere(cfg)), config_lib.to_json(Config()))
    digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()
    codecs = "-".join(type(codec).__name__.lower() for codec in (cfg.codec, cfg.grad_codec))
    data = cfg.data.name.replace("/", "_")
    return f"{cfg.model.name}-{data}-{cfg.model.cut}-{codecs}-seed{cfg.seed}-{digest[:8]}"


def _differing(tree, default):
    """The part of `tree` that is not as in `default`."""
    parts = {n: _differing(v, default[n]) if isinstance(v, dict) else v for n, v in tree.items()}
    return {n: v for n, v in parts.items() if v != ({} if isinstance(v, dict) else default[n])}


def _nowhere(cfg):
    data = dataclasses.replace(cfg.data, data_dir=None, cache_dir=None)
    return dataclasses.replace(cfg, data=data, out=Config.out)


def record(scale: str, run: Run, results: pathlib.Path = RESULTS) -> Record | None:
    """The record of a run or measurement, or None where there is none."""
    file = results / scale / f"{key(run)}.json"
    return json.loads(file.read_text()) if file.exists() else None


def records(study: ModuleType, scale: str, results: pathlib.Path = RESULTS) -> dict[str, Record]:
    """The records that there are of a study's runs, by name."""
    found = {name: record(scale, run, results) for name, run in study.runs(scale).items()}
    return {name: one for name, one in found.items() if one is not None}


def cuts(scale: str) -> tuple[str, ...]:
    """The three of the paper; at smoke scale one."""
    return CUTS if scale != "smoke" else ("medium",)


def label(*parts: str) -> str:
    """The name of a run or a setting: the parts that are not empty, with commas between them."""
    return ", ".join(part for part in parts if part)


def with_seeds(arms: dict[str, Config], seeds: Iterable[int]) -> dict[str, Config]:
    """Each of the arms with each seed, the first seed of all of them first: “arm, seed 0”, …"""
    return {f"{arm}, seed {seed}": dataclasses.replace(cfg, seed=seed) for seed in seeds for arm, cfg in arms.items()}


def by_arm(records: dict[str, Record]) -> dict[str, list[Record]]:
    """The records of `with_seeds`, those of all seeds together."""
    found = {}
    for name, one in records.items():
        found.setdefault(name.rpartition(", ")[0], []).append(one)
    return found


def top1(found: list[Record]) -> str:
    """Test accuracy at the end, in percent, over seeds."""
    return mean_and_deviation([one["test"]["top1_percent"] for one in found])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def mean_and_deviation(values: list[float], digits: int = 2) -> str:
    """“mean ± standard deviation” of a sample; without the second of a single value."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def do(scale: str, run: Run, command: str, results: pathlib.Path = RESULTS) -> Record:
    """Trains, or goes on with it, or measures; in the folder of the run under its config's `out`. Writes the record."""
    from msjax import runs, simulate  # these start JAX

    cfg = run.config if isinstance(run, Measured) else run
    simulate.split_cpu(cfg.clients)
    made = _measure(scale, run) if isinstance(run, Measured) else _train(run)
    # Where the data lay on that machine says nothing about the result.
    made |= {"config": config_lib.to_json(_nowhere(cfg)), "command": command}
    (results / scale).mkdir(parents=True, exist_ok=True)
    file = results / scale / f"{key(run)}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(runs.to_json(made, indent=1) + "\n")
    temporary.replace(file)
    return made


def _train(cfg):
    from msjax import runs, train

    folder, cfg = runs.RunFolder.open_or_create(cfg, key(cfg))
    summary = train.train(cfg, folder)
    folder.close()
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return summary | {"history": [json.loads(line) for line in lines]}


def _measure(scale, run):
    from msjax import runs

    folder = _folder(run.config)
    if not (folder / _LAST_FILE).exists():
        _train(run.config)
    module, _, function = run.by.partition(":")
    start = time.monotonic()
    rows = getattr(importlib.import_module(module), function)(folder, run.config, scale)
    wall_seconds = round(time.monotonic() - start, 1)
    return {"by": run.by, "wall_seconds": wall_seconds, "environment": runs.environment(), "rows": rows}


_LAST_FILE = "summary.json"


def _folder(cfg):
    return pathlib.Path(cfg.out) / key(cfg)


def run_missing(
    scale: str, wanted: dict[str, Run], *, command: str, results: pathlib.Path = RESULTS, jobs: int = 1
) -> int:
    """Does those of `wanted` that have no record, each in a process of its own, `jobs` at a time.

    Measurements come last, and after the training of networks whose folders they need.

    Returns 0; 130 where it was interrupted, when the states of all runs are saved; 1 where a run failed, which does not
    keep the others from running.
    """
    missing = {key(run): (name, run) for name, run in wanted.items() if record(scale, run, results) is None}
    measured = {k: pair for k, pair in missing.items() if isinstance(pair[1], Measured)}
    trained = {k: pair for k, pair in missing.items() if k not in measured}
    for name, run in measured.values():
        if not (_folder(run.config) / _LAST_FILE).exists():
            trained.setdefault(key(run.config), (f"network of {name}", run.config))
    print(f"{len(wanted)} runs at scale {scale}, {len(missing)} to go", flush=True)
    codes = _run_all(scale, trained, command, results, jobs)
    if INTERRUPTED not in codes:
        codes |= _run_all(scale, measured, command, results, jobs)
    return INTERRUPTED if INTERRUPTED in codes else int(codes > {0})


def _run_all(scale, todo, command, results, jobs):
    """The exit codes of all of `todo`, {key: (name, run)}."""
    stop, children, start = threading.Event(), set(), time.monotonic()
    shares = queue.SimpleQueue()
    for cores in _shares(jobs):
        shares.put(cores)

    def process_of(run):
        if stop.is_set():
            return INTERRUPTED
        cores = shares.get()
        # Of a session of its own, so that Ctrl-C does not reach it twice.
        arguments = [sys.executable, "-m", __name__, scale, str(results), command, *map(str, cores)]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, text=True, start_new_session=True)
        children.add(process)
        cfg, by = run if isinstance(run, Measured) else (run, None)
        process.communicate(json.dumps({"config": config_lib.to_json(cfg), "by": by}))
        children.remove(process)
        shares.put(cores)
        if process.returncode == INTERRUPTED:
            stop.set()
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
                word = {0: "done", INTERRUPTED: "interrupted"}.get(future.result(), "failed")
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
        by_name = {study.__name__.rpartition(".")[2]: study for study in studies}
        parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(by_name)}; by default all")
    parser.add_argument("--scale", choices=SCALES, default="lite")
    parser.add_argument("--data-dir", help="a TFDS data directory")
    parser.add_argument("--cache-dir", help="where the decoded images are kept")
    parser.add_argument("--out", default="runs", help="where the run folders are")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="where the records are")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", nargs="+", help="names of runs, or the beginning of them")
    parser.add_argument("--table", action="store_true", help="print what the records say, run nothing")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if len(studies) > 1 and options.studies:
        if unknown := set(options.studies) - by_name.keys():
            parser.error(f"STUDY must be one of {', '.join(by_name)}, got {', '.join(sorted(unknown))}")
        studies = [by_name[name] for name in options.studies]
    wanted = {}
    for study in studies:
        of = f"{study.__name__.rpartition('.')[2]}: " if len(studies) > 1 else ""
        wanted |= {f"{of}{name}": run for name, run in study.runs(options.scale).items()}
    if options.only:
        wanted = {name: run for name, run in wanted.items() if name.startswith(tuple(options.only))}
        if not wanted:
            parser.error(f"--only must name runs of the study, got {options.only}")
    code = 0
    if not options.table:
        wanted = {name: _placed(run, options) for name, run in wanted.items()}
        command = " ".join(["python", "-m", f"experiments.{pathlib.Path(sys.argv[0]).stem}", "--scale", options.scale])
        results = options.results.absolute()
        code = run_missing(options.scale, wanted, command=command, results=results, jobs=options.jobs)
    for study in studies:
        print(
            f"\n## {study.TITLE}\n\n{study.report(options.scale, records(study, options.scale, options.results)).text}"
        )
    return code


def _placed(run, options):
    if isinstance(run, Measured):
        return run._replace(config=_placed(run.config, options))
    cfg = run
    data = dataclasses.replace(cfg.data, data_dir=options.data_dir, cache_dir=options.cache_dir)
    return dataclasses.replace(cfg, data=data, out=options.out)


def _one_run(scale: str, results: str, command: str, *cores: str) -> int:
    """The process of one run: its config and what measures it come on standard input."""
    from msjax import train

    if cores:
        os.sched_setaffinity(0, map(int, cores))
    try:
        given = json.load(sys.stdin)
        cfg = config_lib.from_json(given["config"])
        do(scale, Measured(cfg, given["by"]) if given["by"] else cfg, command, pathlib.Path(results))
    except train.Interrupted:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(_one_run(*sys.argv[1:]))

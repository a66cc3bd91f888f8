"""`msjax compare`: runs beside each other."""

import argparse
import statistics
import sys

from msjax.paths import expand
from msjax.runs import plots, to_json
from msjax.runs.overview import Overview
from msjax.runs.progress import bare_metric, column_name
from msjax.runs.tables import print_table


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="msjax compare",
        description="Print runs beside each other: accuracy, bytes and time, of all epochs so far. Bytes of "
        "entropy-coded codecs are those of messages. “saved” is in comparison with the first run, so name one without "
        "a codec first.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, of msjax train (also from Python) or msjax serve"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="also draw the metric against bytes and seconds: .png, .pdf or .svg"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row instead of a table")
    parser.add_argument(
        "--by-seed", action="store_true", help="runs that differ in their seeds alone as one: mean ± deviation"
    )
    options = parser.parse_args(arguments)
    picture = None if options.out is None else expand("--out", options.out)
    if picture is not None and picture.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out must be a file that ends in .png, .pdf or .svg, got {options.out!r}")
    if picture is not None and not plots.available():
        raise ImportError("--out needs matplotlib, which is not installed: pip install 'msjax[plots]'")
    runs = [Overview.read(path) for path in options.runs]
    if empty := [run.path for run in runs if not run.history]:
        raise ValueError(f"each run must have finished an epoch, got {', '.join(empty)} without one")
    headlines = {run.headline for run in runs}
    if len(headlines) > 1:
        raise ValueError(f"the runs must have the same first metric, got {', '.join(sorted(headlines))}")
    groups = _by_seed(runs) if options.by_seed else [[run] for run in runs]
    if options.json:
        for group in groups:
            print(to_json(_describe(group) if options.by_seed else group[0].describe()))
    else:
        _print(groups)
    if picture is not None:
        try:
            drawn = [(_name(group), [run.history for run in group]) for group in groups]
            plots.draw_comparison(drawn, runs[0].headline, picture)
        except OSError as error:
            why = error.strerror
            raise ValueError(f"--out must be a file that can be written, got {options.out!r}: {why}") from None
        print(f"picture: {picture}", file=sys.stderr)
    return 0


def _by_seed(runs):
    """Runs that differ in nothing but their seeds together, in the order of the first of each."""
    groups = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    for group in groups.values():
        seeds = [run.settings["seed"] for run in group]
        if len({*seeds}) < len(seeds):
            names = ", ".join(run.name for run in group)
            raise ValueError(f"runs that differ in nothing must have other seeds, got {names}")
        if len({len(run.history) for run in group}) > 1:
            epochs = ", ".join(f"{run.name} of {run.epochs}" for run in group)
            raise ValueError(f"runs that differ in their seeds must have equally many epochs, got {epochs}")
    return list(groups.values())


def _name(group):
    return group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"


def _describe(group):
    """What `--json` prints of runs that differ in their seeds: means and sample standard deviations."""
    each, headline = [run.describe() for run in group], group[0].headline
    values = [run.test.get(headline) for run in group if run.test is not None]
    found = {"runs": [run.path for run in group], "seeds": [run.settings["seed"] for run in group]}
    found |= {name: value for name, value in each[0].items() if name not in ("run", "seed", "train", "test")}
    known = values and None not in values  # of one that diverged there is no mean
    found["mean"] = statistics.fmean(values) if known else None
    found["deviation"] = statistics.stdev(values) if known and len(values) > 1 else None
    for name in ("finished", "served"):
        found[name] = all(one[name] for one in each)
    for name in ("cut_bytes", "total_bytes", "seconds"):
        found[name] = statistics.fmean(one[name] for one in each)
    return found


def _print(groups):
    described, rows = [_describe(group) for group in groups], []
    for group, said in zip(groups, described, strict=True):
        run = group[0]
        metric = "–" if said["mean"] is None else bare_metric(run.headline, said["mean"])
        if said["deviation"] is not None:
            metric = f"{metric} ± {bare_metric(run.headline, said['deviation'])} ({len(group)})"
        cells = [_name(group), said["cut"] or "–", run.codecs, run.epochs, metric]
        for name in ("cut_bytes", "total_bytes"):
            cells += [f"{said[name] / 1e6:,.2f}", f"{described[0][name] / said[name]:.2f}×" if said[name] else "–"]
        rows.append([*cells, f"{said['seconds']:,.1f}"])
    headline = column_name(groups[0][0].headline)
    numbers = ("epochs", headline, "features and gradients, MB", "saved", "all, MB", "saved", "seconds")
    print_table(("run", "cut", "codec"), numbers, rows)
    coded = [_name(group) for group, said in zip(groups, described, strict=True) if said["entropy_coded"]]
    if 0 < len(coded) < len(groups):
        print(
            f"Bytes of features and gradients are those of messages, entropy-coded, in {', '.join(coded)}, and of "
            "payloads in the others: over a network --compression codes these, too, and makes them fewer."
        )

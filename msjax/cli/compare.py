"""`msjax compare`: runs beside each other."""

import argparse
import sys

from msjax.paths import expand
from msjax.runs import plots, to_json
from msjax.runs.overview import Overview
from msjax.runs.progress import column_name
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
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each run instead of a table")
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
    if options.json:
        for run in runs:
            print(to_json(run.describe()))
    else:
        _print(runs)
    if picture is not None:
        try:
            plots.draw_comparison([(run.name, run.history) for run in runs], runs[0].headline, picture)
        except OSError as error:
            why = error.strerror
            raise ValueError(f"--out must be a file that can be written, got {options.out!r}: {why}") from None
        print(f"picture: {picture}", file=sys.stderr)
    return 0


def _print(runs):
    first, rows = runs[0].describe(), []
    for run in runs:
        said = run.describe()
        cells = [run.name, said["cut"] or "–", run.codecs, run.epochs, run.metric]
        for name in ("cut_bytes", "total_bytes"):
            cells += [f"{said[name] / 1e6:,.2f}", f"{first[name] / said[name]:.2f}×" if said[name] else "–"]
        rows.append([*cells, f"{said['seconds']:,.1f}"])
    headline = column_name(runs[0].headline)
    numbers = ("epochs", headline, "features and gradients, MB", "saved", "all, MB", "saved", "seconds")
    print_table(("run", "cut", "codec"), numbers, rows)
    coded = [run.name for run in runs if run.describe()["entropy_coded"]]
    if 0 < len(coded) < len(runs):
        print(
            f"Bytes of features and gradients are those of messages, entropy-coded, in {', '.join(coded)}, and of "
            "payloads in the others: over a network --compression codes these, too, and makes them fewer."
        )

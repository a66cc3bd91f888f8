"""`msjax runs`: what run folders there are."""

import argparse
import sys

from msjax.paths import expand
from msjax.runs import to_json
from msjax.runs.folder import is_of_python
from msjax.runs.overview import Overview
from msjax.runs.tables import print_table


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="msjax runs", description="List run folders, the oldest first.")
    parser.add_argument("folder", nargs="?", default="runs", help="where they are (default: runs)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each run instead of a table")
    options = parser.parse_args(arguments)
    folder = expand("folder", options.folder)
    if not folder.is_dir():
        raise ValueError(f"folder must be one that has run folders, got {options.folder!r}")
    found, damaged = [], 0
    files = [*folder.glob("*/config.json"), *(f for f in folder.glob("*/spec.json") if is_of_python(f.parent))]
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file)):
        try:
            found.append(Overview.read(str(file.parent)))
        except (ValueError, TypeError, OSError) as error:
            damaged += 1
            print(f"msjax runs: {error}", file=sys.stderr)
    if options.json:
        for run in found:
            print(to_json(run.describe()))
    elif found:
        print_table(
            ("run", "model", "data", "cut", "codec"), ("epochs", "test", "MB sent"), [_row(run) for run in found]
        )
    elif not damaged:
        print(f"no run folders in {folder}")
    return 2 if damaged else 0


def _row(run):
    said = run.describe()
    sent = "–" if said["total_bytes"] is None else f"{said['total_bytes'] / 1e6:,.1f}"
    return [
        run.name,
        *(said[name] or "–" for name in ("model", "data", "cut")),
        run.codecs,
        run.epochs,
        run.metric,
        sent,
    ]

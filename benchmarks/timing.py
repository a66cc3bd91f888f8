"""Timing side by side, and what is left of it: a table, a JSON record and a plot."""

import argparse
import gc
import json
import os
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from msjax import runs

RESULTS = pathlib.Path(__file__).parent / "results"


def interleaved(contenders: dict[str, Callable[[], Any]], *, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Returns each contender's median seconds of a call.

    Each of `repeats` rounds calls them all, in an order of its own: whatever else the machine does, and whatever the
    one before left behind, meets all of them alike. A contender must return JAX arrays, which are waited for, or be
    done when it returns.
    """
    order, rng = list(contenders), random.Random(0)
    for call in contenders.values():
        for _ in range(warmup):
            jax.block_until_ready(call())
    seconds = {name: [] for name in contenders}
    gc.disable()
    try:
        for _ in range(repeats):
            rng.shuffle(order)
            for name in order:
                start = time.perf_counter()
                jax.block_until_ready(contenders[name]())
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def parser(description: str, *, repeats: bool = True) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark has; `repeats` where it measures time."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        parser.add_argument("--repeats", type=int, default=15, help="calls of each contender; the median counts")
    parser.add_argument("--out", type=pathlib.Path, help="where the JSON record and the plot go, without a suffix")
    return parser


def record(options: argparse.Namespace, rows: list[dict[str, Any]], wall_seconds: float) -> dict[str, Any]:
    """Returns the rows with all that they depend on."""
    environment = runs.environment()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        environment["packages"]["torch"] = torch.__version__
        environment["torch_threads"] = torch.get_num_threads()
        if "OMP_WAIT_POLICY" in os.environ:  # how those threads wait
            environment["variables"]["OMP_WAIT_POLICY"] = os.environ["OMP_WAIT_POLICY"]
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else sys.argv[0]
    arguments = sys.argv[1:]
    if "--out" in arguments:
        del arguments[arguments.index("--out") : arguments.index("--out") + 2]
    return {
        # Where the record itself lies says nothing of the run.
        "command": " ".join([program, *arguments]),
        "options": json.loads(json.dumps({k: v for k, v in vars(options).items() if k != "out"}, default=str)),
        "environment": environment,
        "wall_seconds": round(wall_seconds, 1),
        "rows": rows,
    }


class Continued:
    """A record that a later call goes on with: its rows, and by which calls they were made.

    Of the first call it has command, options, environment and wall time, and of each later one that adds rows, too,
    under `further`.

    Attributes:
      rows: those that are there; what is measured is added to them.
      earlier: the record as it was; {"rows": []} where there is none.
    """

    def __init__(self, out: pathlib.Path):
        self._out, file = out, out.with_suffix(".json")
        self.earlier = json.loads(file.read_text()) if file.exists() else {"rows": []}
        self.rows, self._start = list(self.earlier["rows"]), time.monotonic()

    @property
    def seconds(self) -> float:
        """How long this call has taken so far."""
        return time.monotonic() - self._start

    def save(self, options: argparse.Namespace, **own: Any) -> None:
        """Writes all rows; `own` takes the place of what would be said of this call."""
        result = record(options, self.rows, self.seconds) | own
        if "command" in self.earlier:
            del result["rows"]
            result = self.earlier | {"rows": self.rows, "further": [*self.earlier.get("further", []), result]}
        save(self._out, result)

    def draw(self, figure: Any) -> None:
        """Writes the picture of a record that is there."""
        _draw(self._out, figure)


def save(out: pathlib.Path, result: dict[str, Any], figure: Any = None) -> None:
    """Writes `out`.json and, of a matplotlib figure, `out`.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Never half of it: some records are what a later call goes on from.
    runs.write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    if figure is not None:
        _draw(out, figure)


def _draw(out, figure):
    figure.savefig(out.with_suffix(".png"), dpi=120, bbox_inches="tight")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table whose columns but the first are numbers."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

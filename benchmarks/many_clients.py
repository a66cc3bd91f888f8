"""How much memory and time a step of many clients takes in one program, all at once and in groups.

    python -m benchmarks.many_clients --out benchmarks/results/many_clients_cpu      # minutes

A step is what `msjax train` runs of the network for the digits, on synthetic images: MS at the cut, `--batch` samples
of each client. Each row is a process of its own, whose peak is the most memory that it ever had, Python and JAX too.
"""

import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from msjax import build, config, data
from msjax.split.metrics import zero_sums
from msjax.split.state import TrainState, train_key
from msjax.split.trees import TreeSpec
from msjax.training import program
from msjax.training.batching import resident_of_clients
from msjax.training.devices import make_mesh, replicate, split_cpu

ROWS = ((10, None), (100, None), (1000, None), (10, 10), (100, 10), (1000, 10), (1000, 50))
"""Clients, and how many a device computes at the same time; None for all of its own."""


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.add_argument("--batch", type=int, default=16, help="samples of each client")
    parser.add_argument("--steps", type=int, default=5, help="that are timed; the median counts")
    parser.add_argument("--mode", choices=("parallel", "splitfed"), default="parallel")
    parser.add_argument("--row", type=int, nargs=2, help="one row alone, in this process: clients, and group or 0")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row[0], options.row[1] or None, options)))
        return 0
    start, rows = time.monotonic(), []
    for clients, group in ROWS:
        row = ["--row", str(clients), str(group or 0)]
        same = ["--batch", str(options.batch), "--steps", str(options.steps), "--mode", options.mode]
        done = subprocess.run([sys.executable, "-m", "benchmarks.many_clients", *row, *same], stdout=subprocess.PIPE)
        # A process that the system ended, for want of memory, is a result, too.
        found = json.loads(done.stdout) if done.returncode == 0 else {"exit_status": done.returncode}
        rows.append({"clients": clients, "clients_per_group": group, **found})
        print(rows[-1], flush=True)
    print(table(rows))
    if options.out:
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    return 0


def measure(clients, group, options):
    """What a step of so many clients takes."""
    split_cpu(clients)
    inputs, labels = (TreeSpec.of(jax.ShapeDtypeStruct(s, d)) for s, d in (((8, 8, 1), np.uint8), ((), np.int32)))
    summary = build.DataSummary(inputs, labels, 10, (0.5,), (0.25,))
    cfg = config.Config(
        mode=config.ModeConfig(options.mode),
        clients=clients,
        batch_size=options.batch,
        epochs=1,
        clients_per_group=group,
    )
    run = build.build(cfg, summary, samples=options.batch * 10**4, test_samples=0)
    mesh = make_mesh(clients)
    rng, count = np.random.default_rng(0), clients * options.batch
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    classes = rng.integers(0, 10, count, dtype=np.int32)
    order = np.arange(count, dtype=np.int32).reshape(1, clients, options.batch)
    *fixed, place = resident_of_clients(data.Arrays(images, classes), mesh, order[0])
    order = order if place is None else place[order]
    state = program.place(run.spec, TrainState(run.client, run.server, jnp.int32(0)), mesh)
    carry, numbers, seconds = [state, replicate(zero_sums(run.spec), mesh)], np.arange(clients, dtype=np.int32), []
    extra = {} if group is None else {"group": group}
    step = program.train_steps if group is None else program.train_in_groups
    for _ in range(options.steps + 1):  # the first compiles
        began = time.perf_counter()
        *carry, losses = step(run.spec, mesh, *carry, *fixed, order, numbers, train_key(0), **extra)
        losses = np.asarray(losses)
        seconds.append(time.perf_counter() - began)
    return {
        "devices": mesh.size if mesh else 1,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "step_seconds": round(statistics.median(seconds[1:]), 4),
        "first_step_seconds": round(seconds[0], 2),
        "mean_loss": float(losses.mean()),
    }


def table(rows):
    """Returns the rows as a Markdown table."""
    lines = [
        [
            f"{row['clients']:,}",
            str(row["clients_per_group"] or "all"),
            *(f"{row[name]:,.{digits}f}" if name in row else "ended" for name, digits in COLUMNS.items()),
        ]
        for row in rows
    ]
    return timing.table(["clients", "at once on a device", "peak memory, MB", "step, s", "first step, s"], lines)


COLUMNS = {"peak_rss_mb": 0, "step_seconds": 3, "first_step_seconds": 1}


if __name__ == "__main__":
    sys.exit(main())

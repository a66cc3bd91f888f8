"""What is read from disk: images a second against worker processes, and how long a training step waits for them.

    python -m benchmarks.input --data-dir DIR                              # Tiny ImageNet, minutes on two cores
    python -m benchmarks.input --data-dir DIR --workers 0 4 8 16 --model resnet18    # on a machine with a GPU

Three things, each over several rounds in which all numbers of workers take turns, so that whatever else the machine
does meets all of them alike:

- reading: images a second of batches in random order that nothing is done with, from the first batch on; and how long
  that took to come, which is what starting the workers costs.
- enlarged: the same of a folder of the same images enlarged to 500 x 375 pixels and written as JPEG, of which 224 x 224
  pixels are kept. They stand for photographs such as ImageNet's, and cost about as much to decode.
- training: the share of a step's time in which the step waited for its batch, from when its compiled program is there;
  beside the same steps with the set in memory.

0 workers are threads of the process, one a core. Needs `pip install -e '.[data,train]'`.
"""

import contextlib
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import timing
from msjax import config, data
from msjax.split.metrics import zero_sums
from msjax.split.reads import RunReads
from msjax.split.state import TrainState, train_key
from msjax.training import from_config, program
from msjax.training.devices import make_mesh, replicate, split_cpu

CLIENTS, BATCH = 10, 25
SIDE, KEPT = (500, 375), 224
BEGIN = 4
"""Batches that are not counted: what was read ahead while the workers began, or while a step compiled."""


def main() -> int:
    parser = timing.parser(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--data-dir", required=True, help="TFDS data directory that has the set")
    parser.add_argument("--cache-dir", help="of decoded arrays; by default msjax's own")
    parser.add_argument("--name", default="tiny_imagenet", help="a prepared set of images")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--steps", type=int, default=12, help="of each measurement, after those that begin it")
    parser.add_argument("--files", type=int, default=500, help="images of the enlarged folder; 0: without it")
    parser.add_argument("--model", default="resnet9", help="that is trained")
    parser.add_argument("--width", type=float, default=0.125, help="of its layers")
    options = parser.parse_args()
    split_cpu(CLIENTS)
    start = time.monotonic()
    ds = data.load(options.name, data_dir=options.data_dir, cache_dir=options.cache_dir, streamed=True)
    rows = read_rows("reading", ds.train, options)
    if options.files:
        with enlarged(ds.train, options.files) as folder:
            options_of_folder = {"image_size": KEPT, "streamed": True, "test_share": None}
            rows += read_rows("enlarged", data.from_image_folder(folder, **options_of_folder).train, options)
    rows += train_rows(ds, options)
    print(table(rows))
    if options.out:
        load = {"load_average": [round(one, 2) for one in os.getloadavg()]}
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start) | load)
    return 0


def read_rows(kind: str, split: data.Split, options: Any) -> list[dict[str, Any]]:
    """Returns images a second, and the seconds until the first batch, of each number of workers in each round."""
    rng = np.random.default_rng(0)
    reads = [data.Read(rng.integers(0, len(split), (CLIENTS, BATCH)), (0, n)) for n in range(options.steps + BEGIN)]
    found: dict[int, list[tuple[float, float]]] = {workers: [] for workers in options.workers}
    for workers in in_turns(options.workers, options.repeats):
        with data.Reader({"train": split}, reads, workers=workers) as reader:
            began = time.perf_counter()
            reader[0]
            first = time.perf_counter() - began
            # What was read ahead while the first was waited for is not counted.
            for n in range(1, BEGIN):
                reader[n]
            began = time.perf_counter()
            for n in range(BEGIN, len(reads)):
                reader[n]
            seconds = time.perf_counter() - began
        found[workers].append((options.steps * CLIENTS * BATCH / seconds, first))
    return [
        {
            "kind": kind,
            "workers": workers,
            "images": options.steps * CLIENTS * BATCH,
            "images_per_second": statistics.median(rate for rate, _ in measured),
            "images_per_second_of_rounds": [round(rate, 1) for rate, _ in measured],
            "first_batch_seconds": statistics.median(first for _, first in measured),
        }
        for workers, measured in found.items()
    ]


def in_turns(numbers: list[Any], rounds: int) -> Iterator[Any]:
    """Yields every number of workers in each round, in an order of its own."""
    order, rng = list(numbers), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        yield from order


@contextlib.contextmanager
def enlarged(split: data.ImageStream, count: int) -> Iterator[str]:
    """A folder of a split's first images, enlarged, in ten classes."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        images, _ = split.fetch(np.arange(count))
        for n, pixels in enumerate(images):
            path = pathlib.Path(folder, str(n % 10), f"{n}.jpg")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).resize(SIDE, Image.Resampling.BICUBIC).save(path, quality=90)
        yield folder


def train_rows(ds: data.Dataset, options: Any) -> list[dict[str, Any]]:
    """Returns a step's seconds and how many of them it waited, of each number of workers and of the set in memory."""
    cfg = config.Config(
        model=config.ModelConfig(name=options.model, width=options.width),
        data=config.DataConfig(name=options.name, data_dir=options.data_dir, cache_dir=options.cache_dir),
        clients=CLIENTS,
        batch_size=BATCH,
    )
    run = from_config.load_run(cfg)
    spec, schedule = run.spec, run.spec.schedule
    mesh, key = make_mesh(CLIENTS), train_key(run.seed)
    state: TrainState = program.place(spec, run.state, mesh)
    sums = replicate(zero_sums(spec), mesh)
    clients = np.arange(CLIENTS, dtype=np.int32)
    reads = RunReads(schedule, run.client_indices, run.seed)
    steps = range(BEGIN + options.steps)
    if steps[-1] >= schedule.total_steps:
        raise ValueError(f"steps must leave the run's {schedule.total_steps} some, got {options.steps}")

    def in_memory(n):
        read = reads[n]
        return run.dataset.train.fetch(read.indices)

    def measure(take):
        nonlocal state, sums
        waited = total = 0.0
        for n in steps:
            began = time.perf_counter()
            inputs, labels = take(n)
            ready = time.perf_counter()
            state, sums, losses = program.train_steps(spec, mesh, state, sums, inputs, labels, None, clients, key)
            np.asarray(losses)
            if n >= BEGIN:  # those before compile, and use up what was read ahead meanwhile
                waited += ready - began
                total += time.perf_counter() - began
        return total / options.steps, waited / total

    found: dict[Any, list[tuple[float, float]]] = {workers: [] for workers in (*options.workers, None)}
    measure(in_memory)  # compiles
    for workers in in_turns(list(found), options.repeats):
        if workers is None:
            found[None].append(measure(in_memory))
            continue
        with data.Reader({"train": ds.train}, reads, workers=workers) as reader:
            found[workers].append(measure(reader.__getitem__))
    return [
        {
            "kind": "training",
            "workers": "in memory" if workers is None else workers,
            "step_seconds": statistics.median(step for step, _ in measured),
            "waiting_share": statistics.median(share for _, share in measured),
            "waiting_share_of_rounds": [round(share, 4) for _, share in measured],
        }
        for workers, measured in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as two tables."""
    read = [
        [
            f"{row['kind']}, {row['workers']}",
            f"{row['images_per_second']:,.0f}",
            f"{row['first_batch_seconds']:.1f}",
        ]
        for row in rows
        if row["kind"] != "training"
    ]
    trained = [
        [str(row["workers"]), f"{row['step_seconds'] * 1e3:,.0f}", f"{row['waiting_share']:.1%}"]
        for row in rows
        if row["kind"] == "training"
    ]
    return "\n\n".join(
        (
            timing.table(["what, workers", "images a second", "s to the first batch"], read),
            timing.table(["workers", "ms a step", "of it waiting"], trained),
        )
    )


if __name__ == "__main__":
    sys.exit(main())

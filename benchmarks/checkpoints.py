"""What a checkpoint takes of the training step: how long `save` holds it up, and what the writing beside it costs.

    python -m benchmarks.checkpoints                    # minutes on two CPU cores
    python -m benchmarks.checkpoints --cases small --repeats 51

Cases are the state of `msjax train` without options (digits, a small net) and that of the paper's VGG19 with SGD and
momentum, of full width, whose steps here have few samples: with more of them the same save is a smaller share. In turn
a step is taken by itself, and one right behind a save is timed with the save before it; that save is then waited for,
outside the time. "Held up" is the call of `save` alone; "step beside the writing" has on top what the thread that
writes takes of the cores, and a copy of the state, whose memory the step cannot take over. "In one go" is the same save
waited for, as it was before saves were written beside training.
"""

import dataclasses
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import timing
from msjax import build, config
from msjax.cli.options import DEFAULT
from msjax.runs import Checkpoints
from msjax.split.metrics import zero_sums
from msjax.split.state import TrainState
from msjax.split.trees import TreeSpec
from msjax.training import program

CASES = {
    "small": (DEFAULT, (8, 8, 1), 9),
    "vgg19": (
        config.Config(model=config.ModelConfig(name="vgg19", cut="shallow"), data=config.DataConfig(name="cifar10")),
        (32, 32, 3),
        20,
    ),
}
"""Config, shape of an image, and steps of an epoch, after each of which there is a checkpoint, at the paper's batch."""


def main() -> int:
    parser = timing.parser(__doc__)
    parser.set_defaults(out=timing.RESULTS / "checkpoints_cpu", repeats=11)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="samples of each client in a step")
    options = parser.parse_args()
    start = time.monotonic()
    rows = []
    for name in options.cases:
        rows.append(measure(name, options))
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    print(table(rows))
    return 0


def measure(name: str, options) -> dict:
    """Returns one row: medians over steps with a save before them and steps without, in turn."""
    cfg, shape, epoch_steps = CASES[name]
    step, state = make_step(cfg, shape, options.clients, options.batch)
    seconds = {key: [] for key in ("step", "save", "step_beside", "rest", "in_one_go")}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep=2)
        for n in range(options.repeats + 2):  # the first two compile and make folders
            marks = [time.perf_counter()]
            state = jax.block_until_ready(step(*state))
            marks.append(time.perf_counter())
            checkpoints.save(2 * n, state)
            marks.append(time.perf_counter())
            state = jax.block_until_ready(step(*state))
            marks.append(time.perf_counter())
            checkpoints.wait()
            marks.append(time.perf_counter())
            checkpoints.save(2 * n + 1, state)
            checkpoints.wait()
            marks.append(time.perf_counter())
            if n >= 2:
                for key, value in zip(seconds, np.diff(marks), strict=True):
                    seconds[key].append(float(value))
        checkpoints.close()
    found = {f"{key}_seconds": statistics.median(values) for key, values in seconds.items()}
    return {
        "case": name,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "samples": options.clients * options.batch,
        "epoch_steps": epoch_steps,
        **found,
        "share_of_a_step": found["save_seconds"] / found["step_seconds"],
        "share_of_an_epoch": found["save_seconds"] / (epoch_steps * found["step_seconds"]),
        "all_seconds": seconds,
    }


def make_step(cfg, shape, clients, batch):
    """(step, state): `step(*state)` takes one step as `msjax train` does, and gives its state away."""
    summary = build.DataSummary(
        TreeSpec.of(jax.ShapeDtypeStruct(shape, np.uint8)),
        TreeSpec.of(jax.ShapeDtypeStruct((), np.int32)),
        10,
        (0.5,) * shape[-1],
        (0.25,) * shape[-1],
    )
    cfg = dataclasses.replace(cfg, clients=clients, batch_size=batch)
    built = build.build(cfg, summary, samples=batch, test_samples=0)
    spec = built.spec
    state = program.place(spec, TrainState(built.client, built.server, jax.numpy.int32(0)), None)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (clients, batch, *shape)).astype(np.uint8)
    y = rng.integers(0, 10, (clients, batch)).astype(np.int32)
    numbers, key = np.arange(clients, dtype=np.int32), jax.random.key(0)

    def step(state, sums):
        return program.train_steps(spec, None, state, sums, x, y, None, numbers, key)[:2]

    return step, (state, zero_sums(spec))


def table(rows: list[dict]) -> str:
    """A row a case; milliseconds, and shares in percent."""
    header = [
        "",
        "state, MB",
        "step, ms",
        "held up, ms",
        "of a step",
        "of an epoch's steps",
        "step beside the writing, ms",
    ]
    header += ["in one go, ms"]
    lines = [
        [
            row["case"],
            f"{row['state_bytes'] / 1e6:,.1f}",
            f"{1e3 * row['step_seconds']:,.0f}",
            f"{1e3 * row['save_seconds']:,.1f}",
            f"{row['share_of_a_step']:.1%}",
            f"{row['share_of_an_epoch']:.2%}",
            f"{1e3 * row['step_beside_seconds']:,.0f}",
            f"{1e3 * row['in_one_go_seconds']:,.0f}",
        ]
        for row in rows
    ]
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())

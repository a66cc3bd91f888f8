"""What only an accelerator can show: codecs against a copy, steps beside PyTorch, and the paper's training of VGG19.

    python -m experiments.accelerator --pack DIR --data-dir CIFAR10     # once: DIR/cifar10-1.npz, cifar10-2.npz
    python -m experiments.accelerator --stages codecs steps             # nine minutes on one GPU, without data
    python -m experiments.accelerator --stages train --data DIR/cifar10-1.npz DIR/cifar10-2.npz    # nine minutes more
    python -m experiments.accelerator --data DIR/cifar10-1.npz DIR/cifar10-2.npz     # whatever is left to do
    python -m experiments.accelerator --table

For a GPU that is lent by the minute. A call takes about `--seconds`, begins with what tells most and writes its record
after every row and every epoch, so a call that is cut off loses one row; the next call does what is missing. Its files
are under `--work`: the unpacked data, compiled programs, and the run folders with their checkpoints (about 300 MB
each), without which a training starts anew. `--out` names the record, which has to be where the next call finds it, on
a machine of the same kind.

To a machine without a network go this repository, the two files of `--pack` (47 MiB each, of CIFAR-10's original
pixels; with the first alone, all test images and 20,000 to train on, the record says so), and packages that are not
there: those of the extra `train`, and PyTorch for what it is compared with.

codecs: relu(N(0, 1)) of 256 feature maps of 64×32×32 through every codec, in float32 (64 MiB) and bfloat16; ten calls
one after another, beside ten copies of the same tensor on the device. GB/s are of the tensor's bytes, so a copy, which
reads and writes them, moves twice as many.

steps: ResNet18 and VGG19 at full width on 32×32 images at the medium cut, one client of 256 and ten. msjax's step is
what `msjax train` runs, ten in one program: augmentation, both parts, codec, update. PyTorch's is the network on one
whole batch that lies on the device, without clients and augmentation and, but for one column, without a codec; in that
column MS is `torch.topk` and codes that are not packed. All take turns in one process. "tf32" is float32 with TF32
products, which is JAX's default on a GPU; "float32" is full precision in both; "bfloat16" is msjax's `dtype` and
PyTorch's autocast.

train: `configs/vgg19_cifar10.py`, in float32 with TF32 products, without compression and with MS in turns, each for
half of the time, for as many epochs as fit; `--epochs 30` is the same with its cosine schedule over 30.
Samples a second are the median over epochs and include tests and checkpoints.
"""

import concurrent.futures
import itertools
import json
import os
import pathlib
import statistics
import sys
import time

from benchmarks import timing
from experiments import study

OUT = study.RESULTS / "accelerator"
LEAST_SECONDS = {"codecs": 20.0, "steps": 60.0, "train": 90.0}
"""Without so much time left nothing of a stage is begun: what is compiled cannot be stopped."""
WORK = pathlib.Path("runs/accelerator")
STAGES = {"codecs": 0.25, "steps": 0.6, "train": 1.0}
"""Each stage, and its share of the time that is left when it begins. Time left at the end is for what is not done."""


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--pack", type=pathlib.Path, metavar="DIR", help="write the files of the data there")
    parser.add_argument("--data-dir", help="with --pack: where CIFAR-10 is, as --data.data-dir of msjax train")
    parser.add_argument("--data", type=pathlib.Path, nargs="+", default=[], help="files of --pack, to train on")
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path("runs/accelerator"), help="folder of its files"
    )
    parser.add_argument("--seconds", type=float, default=540, help="of this call, about")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--epochs", type=int, help="of the training's schedule; by default the paper's 200")
    parser.add_argument("--no-torch", action="store_true", help="msjax alone")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it on a CPU; its numbers mean nothing")
    parser.add_argument("--table", action="store_true", help="print what the record says, run nothing")
    options = parser.parse_args()
    if options.small:  # beside what means something, or in its place
        for name, default in (("out", OUT), ("work", WORK)):
            if getattr(options, name) == default:
                setattr(options, name, default.with_name(f"{default.name}_small"))
    if options.pack:
        return pack(options.pack, options.data_dir)
    if not options.table:
        run(options)
    elif not options.out.with_suffix(".json").exists():
        print("not run: there is no record")
        return 0
    print(table(json.loads(options.out.with_suffix(".json").read_text())["rows"]))
    return 0


def pack(folder: pathlib.Path, data_dir: str | None) -> int:
    """Writes CIFAR-10 in two files of about one size."""
    from experiments import packed_images
    from msjax import data

    found = data.load("cifar10", data_dir=data_dir)
    (x, y), test = found.train[:], found.test[:]
    half = (len(x) + len(test[0])) // 2 - len(test[0])
    parts = ({"test": test, "train": (x[:half], y[:half])}, {"train": (x[half:], y[half:])})
    files = [folder / f"cifar10-{n}.npz" for n in (1, 2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda file, part: packed_images.save(file, **part), files, parts))
    loaded = packed_images.load(files)
    for pair, split in zip(((x, y), test), ("train", "test"), strict=True):
        if not all((mine == theirs).all() for mine, theirs in zip(pair, loaded[split], strict=True)):
            raise RuntimeError(f"the {split} images that were read back are others")
    for file in files:
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    return 0


class Record:
    """The rows of this call and of those before, in a file that is written whenever one changes."""

    def __init__(self, options):
        import jax

        self._options, self._start = options, time.monotonic()
        file = options.out.with_suffix(".json")
        before = json.loads(file.read_text()) if file.exists() else {"rows": [], "calls": [], "wall_seconds": 0.0}
        self._rows = {row["name"]: row for row in before["rows"]}
        self._calls, self._earlier = before["calls"], before["wall_seconds"]
        self.failed = set()  # in this call, which does not try them again
        self.device, self._small = jax.devices()[0].device_kind, options.small
        self._torch = not options.no_torch and has_torch()
        if any(row.get("small", False) != options.small for row in before["rows"]):
            raise SystemExit(f"--out must name a record {'with' if options.small else 'without'} --small, or a new one")
        others = {row["device"] for row in before["rows"]} - {self.device}
        if others:
            raise SystemExit(f"--out must name a record of {self.device}, or a new one; {file} is of {others.pop()}")

    def __getitem__(self, name: str) -> dict:
        return self._rows.get(name, {})

    def is_done(self, name: str) -> bool:
        """Whether nothing is left to do: without PyTorch a row is done as long as there is none."""
        row = self[name]
        return row.get("finished", False) and (row.get("torch", True) or not self._torch)

    def put(self, stage: str, name: str, row: dict) -> None:
        """Replaces or adds a row, and writes the file."""
        known = {"small": True} if self._small else {}
        known |= {} if stage == "train" else {"torch": self._torch}
        self._rows[name] = {"stage": stage, "name": name, "device": self.device} | known | row
        seconds = time.monotonic() - self._start
        result = timing.record(self._options, list(self._rows.values()), self._earlier + seconds)
        call = {name: result[name] for name in ("command", "environment")} | {"wall_seconds": round(seconds, 1)}
        timing.save(self._options.out, result | {"calls": [*self._calls, call]})


def run(options) -> None:
    """Does rows until the time is up or all are done."""
    start = time.monotonic()
    # PyTorch needs memory, too; JAX reads this when it first looks for its devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((options.work / "programs").absolute()))
    record = Record(options)  # before PyTorch is imported, so that JAX finds its libraries first
    jobs = jobs_of(options, record)
    left = lambda: options.seconds - (time.monotonic() - start)  # noqa: E731
    # Trainings take all the time that is left, so the second round is for the others' rows alone.
    for shares in (STAGES, {stage: 1.0 for stage in STAGES if stage != "train"}):
        for stage in (stage for stage in jobs if stage in shares):
            work_on(stage, jobs[stage], record, shares[stage] * left(), 0.0 if options.small else LEAST_SECONDS[stage])


def jobs_of(options, record: Record) -> dict:
    """Returns the jobs of each stage by name; with what was tried before, and did not end, last."""
    from experiments import accelerator_jobs

    scale = accelerator_jobs.small() if options.small else accelerator_jobs.full()
    with_torch = not options.no_torch and has_torch()
    found = {}
    for stage in options.stages:
        if stage == "train":
            if not options.data:
                print("train: no --data", flush=True)
                continue
            file = accelerator_jobs.unpacked(options.data, options.work.absolute())
            made = accelerator_jobs.trainings(scale, file, options.work.absolute(), options.epochs)
        else:
            make = {"codecs": accelerator_jobs.codecs, "steps": accelerator_jobs.training_steps}[stage]
            made = make(scale, with_torch)
        jobs = [(f"{stage}: {name}", job) for name, job in made]
        found[stage] = dict(sorted(jobs, key=lambda pair: stage != "train" and bool(record[pair[0]])))
    return found


def has_torch() -> bool:
    """Whether PyTorch is there."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def work_on(stage: str, jobs: dict, record: Record, seconds: float, least: float = 0.0) -> None:
    """Does the jobs of a stage that are not done, while `least`, and the longest so far, would fit into `seconds`."""
    end, longest = time.monotonic() + seconds, least
    todo = {name: job for name, job in jobs.items() if not record.is_done(name) and name not in record.failed}
    for number, (name, job) in enumerate(todo.items()):
        start = time.monotonic()
        if start + longest > end:
            return
        try:
            if stage == "train":
                share = max((end - start) / (len(todo) - number), min(least, end - start))
                row = work_on_training(name, job, record, share)
            else:
                if not record[name].get("finished"):  # what was made without PyTorch stands until there is more
                    record.put(stage, name, {"error": "did not end"})
                row = job() | {"finished": True, "wall_seconds": round(time.monotonic() - start, 1)}
                record.put(stage, name, row)
        except Exception as error:  # of one row alone, as where memory is short or a training diverges
            row = record[name] | {"error": f"{type(error).__name__}: {error}"[:500]}
            if stage == "train" or not row.get("finished"):
                record.put(stage, name, row)
            record.failed.add(name)
        if stage != "train":
            longest = max(longest, time.monotonic() - start)
        print(f"{name}: {row.get('error', 'done' if row.get('finished') else 'goes on')}", flush=True)


def work_on_training(name: str, job, record: Record, seconds: float) -> dict:
    """Goes on with a training; the record has what it says after every epoch.

    One that had to start anew leaves the record as it is until it has come as far.
    """
    known = len(record[name].get("history", []))

    def told(row):
        if len(row["history"]) >= known:
            record.put("train", name, row)
        epoch = row["history"][-1]
        print(f"{name}: epoch {epoch['epoch']}, {epoch.get('test')}, {epoch['seconds']:.0f} s", flush=True)

    row = job(seconds, told)
    if len(row.get("history", [])) >= max(known, 1):
        record.put("train", name, row)
    return row


def table(rows: list[dict]) -> str:
    """Returns what there is of the three stages as Markdown tables."""
    makers = {"codecs": codec_table, "steps": step_table, "train": training_table}
    parts = [f"On {', '.join(sorted({row['device'] for row in rows}))}."]
    for stage, make in makers.items():
        own = [row for row in rows if row["stage"] == stage and ("error" not in row or row.get("history"))]
        parts.append(make(own) if own else f"{stage}: not run.")
    failed = [f"{row['name']}: {row['error']}" for row in rows if "error" in row]
    failed += [f"{row['name']}, in PyTorch: {row['torch_errors']}" for row in rows if row.get("torch_errors")]
    if failed:
        parts.append("Failed: " + "; ".join(failed) + ".")
    return "\n\n".join(parts)


def codec_table(rows: list[dict]) -> str:
    """GB/s of each operation, and in brackets how many copies it takes."""
    operations = ("encode", "decode", "roundtrip")
    lines = []
    for row in rows:
        cells = [row["codec"], row["dtype"], f"{row['bytes'] / row['copy_seconds'] / 1e9:.0f}"]
        for operation in operations:
            seconds = row[f"{operation}_seconds"]
            against = f"; PyTorch {row[key] / seconds:.1f}×" if (key := f"torch_{operation}_seconds") in row else ""
            cells.append(f"{row['bytes'] / seconds / 1e9:.0f} ({seconds / row['copy_seconds']:.1f} copies{against})")
        lines.append([*cells, f"{row['compile_seconds']:.0f}"])
    return timing.table(["codec", "dtype", "copy, GB/s", *(f"{o}, GB/s" for o in operations), "compiled in, s"], lines)


def step_table(rows: list[dict]) -> str:
    """Milliseconds of a step, msjax's and PyTorch's."""
    ways = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    lines = []
    for row in rows:
        cells = [row["network"], f"{row['clients']} × {row['batch'] // row['clients']}", row["precision"], row["codec"]]
        cells += [f"{1e3 * row['seconds'][way]:.2f}" if way in row["seconds"] else "–" for way in ways]
        lines.append([*cells, f"{row['batch'] / row['seconds']['msjax']:,.0f}"])
    header = ["network", "clients × samples", "precision", "codec", *(f"{way}, ms" for way in ways)]
    return timing.table([*header, "samples a second, msjax"], lines)


def training_table(rows: list[dict]) -> str:
    """Test accuracy after some epochs that all trainings have, and at the end of each."""
    common = min(len(row["history"]) for row in rows)
    at = sorted({1, *(n for n in (5, 10, 20, 50, 100, 150) if n < common), common})
    lines = []
    for row in rows:
        history = row["history"]
        tops = {epoch["epoch"]: f"{epoch['test']['top1_percent']:.2f}" for epoch in history if "test" in epoch}
        ends = [epoch["seconds"] for epoch in history]
        lasted = [after - before for before, after in itertools.pairwise(ends)] or ends
        cells = [row["codec"], f"{row['train_samples']:,}", f"{len(history)} of {row['config']['epochs']}"]
        cells += [tops.get(epoch, "–") for epoch in at] + [tops.get(len(history), "–")]
        lines.append([*cells, f"{row['samples_per_epoch'] / statistics.median(lasted):,.0f}", f"{ends[-1] / 60:.1f}"])
    header = ["codec", "training images", "epochs", *(f"top-1 % after {epoch}" for epoch in at), "at the end"]
    return timing.table([*header, "samples a second", "minutes"], lines)


if __name__ == "__main__":
    sys.exit(main())

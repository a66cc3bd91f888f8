"""The same training in plain PyTorch and in msjax: test accuracy at the end of both, and seconds of a step.

    python -m experiments.beside_pytorch_training --data-dir DIR        # needs PyTorch; hours on two cores
    python -m experiments.beside_pytorch_training --data-dir DIR --steps 10 --seeds 0 --out FILE    # for the time alone
    python -m experiments.beside_pytorch_training --table

The network, data and schedule of the "lite" studies: ResNet9 of a quarter of the width on CIFAR-10's original images,
cut at its medium cut, ten clients of 25 samples a step, three epochs from random weights. Both have the same first
weights, the same batches with the same augmented pixels, the same learning rates, loss and optimizer, PyTorch's running
variance, and test with the codec at the cut; what differs is the program that computes, so the order in which numbers
are added. `beside_pytorch` shows how soon two trainings part by that alone: what can be compared at the end is
accuracy, over seeds.

PyTorch takes the clients one after another, as the paper says, msjax all at once. The two take turns step by step in
one process on the same cores, each timed for itself: forward, codec, backward, update and for msjax the augmentation,
which PyTorch gets done. PyTorch's threads wait passively (OMP_WAIT_POLICY), since on two busy cores they take ten times
as long otherwise. A run of a codec and a seed that is in the record is not repeated.
"""

import dataclasses
import math
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import beside_pytorch, study
from msjax import config, data
from msjax.cli.main import large_pages
from msjax.split.metrics import zero_sums
from msjax.split.state import client_keys, split_key, train_key
from msjax.training import evaluator, loaded, program
from msjax.training.batching import resident_of_clients, schedule_calls
from msjax.training.devices import replicate, split_cpu
from msjax.training.from_config import load_run

OUT = beside_pytorch.OUT.with_name("beside_pytorch_training")
CODECS = beside_pytorch.CODECS
SEEDS = (0, 1, 2)


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", help="where CIFAR-10 is, as --data.data-dir of msjax train")
    parser.add_argument("--steps", type=int, help="only so many steps, to see how long they take")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="print what the record says, run nothing")
    options = parser.parse_args()
    # As `msjax train` has them; and PyTorch's threads are not to wait in a loop on cores that msjax computes on.
    lacking = large_pages() | ({} if "OMP_WAIT_POLICY" in os.environ else {"OMP_WAIT_POLICY": "PASSIVE"})
    if lacking and not options.table:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | lacking)
    made = timing.Continued(options.out)
    rows = made.rows
    done = {(row["codec"], row["seed"], row["steps"]) for row in rows}
    for seed in options.seeds if not options.table else ():
        for name in options.codecs:
            cfg = config_of(name, seed, options.data_dir)
            split_cpu(cfg.clients)
            run = load_run(cfg)
            steps = min(options.steps or math.inf, run.spec.schedule.total_steps)
            if (name, seed, steps) in done:
                continue
            rows.append({"codec": name, "seed": seed} | train(run, cfg, steps))
            print({k: v for k, v in rows[-1].items() if k not in ("config", "epochs")}, flush=True)
            made.save(options)
    print(table(rows))
    return 0


def config_of(name: str, seed: int, data_dir: str | None) -> config.Config:
    """Returns the run of a codec and a seed."""
    cfg = study.with_cut(study.base("lite"), "medium")
    model = dataclasses.replace(cfg.model, running_variance="unbiased")
    where = dataclasses.replace(cfg.data, data_dir=data_dir)
    return dataclasses.replace(cfg, model=model, data=where, codec=CODECS[name], seed=seed)


def train(run: loaded.LoadedRun, cfg: config.Config, steps: int) -> dict:
    """Trains both for `steps` steps; returns accuracies, losses by epoch and seconds of a step."""
    start = time.monotonic()
    ours = Ours(run)
    theirs = in_pytorch(ours.state, cfg)
    schedule, losses, seconds = run.spec.schedule, {"msjax": [], "torch": []}, {"msjax": [], "torch": []}
    for number, batch in zip(range(steps), ours.batches(), strict=False):
        images, labels = ours.augmented(batch)
        for group in theirs.optimizer.param_groups:
            group["lr"] = rate(cfg.optim, number, schedule.epoch_steps, schedule.total_steps)
        for name, step in (("torch", lambda: theirs.step(images, labels)), ("msjax", lambda: ours.step(batch))):  # noqa: B023
            began = time.perf_counter()
            losses[name].append(float(np.mean(step())))
            seconds[name].append(time.perf_counter() - began)
    ends = [*range(schedule.epoch_steps, steps, schedule.epoch_steps), steps]
    epochs = []
    for end in ends:
        own = slice(max(0, end - schedule.epoch_steps), end)
        epochs.append({f"{name}_loss": statistics.mean(values[own]) for name, values in losses.items()})
    return {
        "steps": steps,
        "msjax_top1_percent": ours.test(),
        "torch_top1_percent": test_in_pytorch(theirs, run),
        # The first step compiles.
        **{f"{name}_step_seconds": statistics.median(values[1:] or values) for name, values in seconds.items()},
        "epochs": epochs,
        "config": config.to_json(config.without_paths(cfg)),
        "wall_seconds": round(time.monotonic() - start, 1),
    }


def rate(optim: config.OptimConfig, step: int, epoch_steps: int, steps: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then cosine to 0."""
    warmup = min(round(optim.warmup_epochs * epoch_steps), steps // 2)
    if step < warmup:
        return optim.learning_rate * step / warmup
    return optim.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


class Ours:
    """msjax's training, step by step as `training.loop` takes it, and its batches as they are augmented."""

    def __init__(self, run: loaded.LoadedRun):
        self._run = run
        self.state, self._mesh = loaded.placed(run)
        self._sums = replicate(zero_sums(run.spec), self._mesh)
        self._data = resident_of_clients(run.dataset.train, self._mesh, run.client_indices)
        self._key, self._clients = train_key(run.seed), np.arange(run.spec.schedule.clients, dtype=np.int32)
        # Compiled apart from the step, which augments for itself.
        self._augment = jax.jit(self._augmented)

    def batches(self):
        """Yields the positions of each step's samples in the training data, (1, K, B)."""
        schedule, seed = self._run.spec.schedule, self._run.seed
        for epoch in range(schedule.epochs):
            order = data.epoch_indices(self._run.client_indices, schedule.samples, seed=seed, epoch=epoch)
            yield from schedule_calls(schedule, order, epoch, 1)

    def augmented(self, batch):
        """Returns the batch of the next step, as the network will see it, in NumPy."""
        x, y = self._run.dataset.train.fetch(batch[0])
        return np.array(self._augment(x, y, np.int32(self.state.step))), y

    def _augmented(self, x, y, step):
        keys = client_keys(self._key, step, jnp.asarray(self._clients))
        augmented = self._run.spec.preprocess.augmented
        return jax.vmap(lambda x, y, key: augmented(x, y, split_key(key).augment)[0])(x, y, keys)

    def step(self, batch):
        inputs, labels, place = self._data
        order = batch if place is None else place[batch]
        args = (self.state, self._sums, inputs, labels, order, self._clients, self._key)
        self.state, self._sums, losses = program.train_steps(self._run.spec, self._mesh, *args)
        return np.asarray(losses)

    def test(self):
        return evaluator.Evaluator(self._run, self._mesh)(self.state)["top1_percent"]


def in_pytorch(state, cfg):
    """The method in PyTorch with msjax's first weights."""
    import torch
    from torch import nn

    from benchmarks import torch_networks
    from experiments import pytorch_method

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tensors = by_torch_names(state)
    network = torch_networks.ResNet9(len(tensors["head.bias"]), len(tensors["conv1.conv.weight"]))
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    if unexpected or not all(name.endswith("num_batches_tracked") for name in missing):
        raise RuntimeError(f"the two networks have different arrays: {missing}, {unexpected}")
    optim = cfg.optim
    options = {"momentum": optim.momentum, "nesterov": optim.nesterov, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.SGD(network.parameters(), lr=optim.learning_rate, **options)
    loss = nn.CrossEntropyLoss(label_smoothing=optim.label_smoothing)
    codec = pytorch_method.codec(cfg.codec)
    return pytorch_method.Method(network, network.client, network.server, codec, optimizer, loss)


LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def by_torch_names(state):
    """The tensors of msjax's ResNet9, by the names of the one in PyTorch: without the layers that only msjax has."""
    import torch

    tensors = {}
    for part in jax.device_get((state.client, state.server)):
        for path, leaf in jax.tree.leaves_with_path((part.params, part.stats)):
            *modules, last = (key.key for key in path[1:])
            block, *within = modules
            # A ConvNorm is within a ConvBlock or a PoolBlock.
            name = [block] if within == ["dense"] else [block, *within[:-2], within[-1]]
            tensor = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
            tensors[".".join([*name, LEAVES[last]])] = torch.from_numpy(np.array(tensor, order="C"))
    return tensors


def test_in_pytorch(method, run):
    """Test accuracy in percent, in the batches that msjax tests in."""
    import torch

    right = total = 0
    method.network.eval()
    preprocess = jax.jit(run.spec.preprocess)
    with torch.no_grad():
        for samples in run.spec.schedule.test_rounds():
            for batch in samples:
                x, y = run.dataset.test.fetch(batch)
                right += int((method(np.array(preprocess(x))).argmax(1).numpy() == y).sum())
                total += len(y)
    return 100 * right / total


def table(rows: list[dict]) -> str:
    """Returns accuracies over seeds and seconds of a step as a Markdown table."""
    whole = max((row["steps"] for row in rows), default=0)
    lines = []
    for name, own in study.grouped([row for row in rows if row["steps"] == whole], "codec").items():
        tops = {which: [row[f"{which}_top1_percent"] for row in own] for which in ("torch", "msjax")}
        differences = [ours - theirs for ours, theirs in zip(tops["msjax"], tops["torch"], strict=True)]
        cells = [*map(study.mean_and_deviation, (tops["torch"], tops["msjax"], differences))]
        seconds = [[row[f"{which}_step_seconds"] for row in own] for which in ("torch", "msjax")]
        ratios = [ours / theirs for theirs, ours in zip(*seconds, strict=True)]
        medians = [f"{statistics.median(values):.3f}" for values in seconds]
        lines.append([name, str(len(own)), *cells, *medians, f"{statistics.median(ratios):.2f}"])
    header = ["codec", "seeds", "PyTorch, top-1 %", "msjax, top-1 %", "msjax − PyTorch, in pairs"]
    header += ["seconds a step, PyTorch", "seconds a step, msjax", "times as long, in pairs"]
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())

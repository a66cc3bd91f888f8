"""The paper's method in plain PyTorch beside msjax: one network, the same first weights and batches, step by step.

    python -m experiments.beside_pytorch --data-dir DIR                                  # needs PyTorch; ten minutes
    python -m experiments.beside_pytorch --data-dir DIR --network vgg19 --steps 5        # three minutes a codec

ResNet18 of a quarter of the width, or the paper's VGG19 at full width without its dropout, whose random numbers differ.
Each is cut at its medium cut, ten clients of 25 of CIFAR-10's original training images, not augmented; SGD with
momentum and weight decay at a constant rate. PyTorch does what the paper says, client after client: forward, the codec,
the server's loss, backward past the codec, and the means of gradients and of running statistics over the clients. msjax
runs its fused step, with PyTorch's running variance.

Losses are compared as the largest relative difference of a client's in a step; weights by ‖difference‖ / ‖update so
far‖, the median over arrays. "PyTorch again" is PyTorch beside itself with one thread instead of two, which adds in
another order: what differs no more than that is the same method. Rounding moves values over the edge between two codes
of MS and QU, and between kept and not of SP; then a step differs by more than float32's precision, in both.

Seconds of a step are medians of all but the first. The two run one after the other, so they say how long such a step
takes rather than which program is faster: that is measured by `benchmarks.steps`. Where the cores are busy,
OMP_WAIT_POLICY=PASSIVE in the environment keeps PyTorch's threads from waiting in a loop, which takes ten times as
long. A codec that the record has for a network and a number of steps is not repeated.
"""

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from msjax import build, compress, config, data, models
from msjax.split.metrics import zero_sums
from msjax.split.state import TrainState
from msjax.split.trees import TreeSpec
from msjax.training import program

OUT = pathlib.Path(__file__).parent / "results" / "beside_pytorch"
CODECS = {
    "none": compress.Identity(),
    "MS": compress.MaskEncoded(),
    "SP": compress.TopK(),
    "QU": compress.Uniform(),
}
CLIENTS, BATCH = 10, 25
RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


class Network(NamedTuple):
    """A network in both programs; `cut` is how many of PyTorch's modules, one after the other, lie before the cut."""

    title: str
    width: float
    cut: int


NETWORKS = {
    "resnet18": Network("ResNet18 of a quarter of the width", 0.25, 5),
    "vgg19": Network("VGG19 at full width", 1.0, 27),
}


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", help="where CIFAR-10 is, as --data.data-dir of msjax train")
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--set", default="cifar10", help="the data set")
    options = parser.parse_args()
    made = timing.Continued(options.out)
    dataset = data.load(options.set, data_dir=options.data_dir)
    done = {(network_of(row), row["codec"], row["steps"]) for row in made.rows}
    for name in options.codecs:
        if (options.network, name, options.steps) not in done:
            made.rows.append(compare(options.network, name, dataset, options.steps))
            print(made.rows[-1], flush=True)
            made.save(options)
    print(table(made.rows))
    return 0


def network_of(row: dict) -> str:
    """Returns the network of a row; the first ones do not say it."""
    return row.get("network", "resnet18")


def compare(network: str, name: str, dataset: data.Dataset, steps: int) -> dict:
    """Returns how far apart the two are after each step, and PyTorch from itself."""
    x, y = dataset.train.fetch(np.arange(steps * CLIENTS * BATCH) % len(dataset.train))
    ours, first, files = run_ours(network, CODECS[name], dataset, x, y, steps)
    images = (x.astype(np.float32) / 255 - dataset.mean) / dataset.std
    batches = (images.reshape(steps, CLIENTS, BATCH, *x.shape[1:]), y.reshape(steps, CLIENTS, BATCH))
    theirs, again = (run_torch(network, name, first, batches, files.keys(), threads) for threads in (2, 1))
    found = {
        "network": network,
        "codec": name,
        "steps": steps,
        "losses": _losses(ours, theirs),
        "losses_again": _losses(again, theirs),
        "last_loss": float(np.mean(theirs["losses"][-1])),
        "msjax_step_seconds": ours["seconds"],
        "torch_step_seconds": theirs["seconds"],
    }
    for step in files:
        found[f"weights_{step}"] = _weights(files[step], theirs["weights"][step], first)
        found[f"weights_{step}_again"] = _weights(again["weights"][step], theirs["weights"][step], first)
    return found


def _losses(one, other):
    return float(np.max(np.abs(one["losses"] - other["losses"]) / np.abs(other["losses"])))


def _weights(one, other, first):
    """The median over arrays of ‖difference‖ / ‖update so far‖."""
    names = [name for name in first if not name.endswith("num_batches_tracked")]
    far = [np.linalg.norm(one[n] - other[n]) / max(np.linalg.norm(other[n] - first[n]), 1e-12) for n in names]
    return float(np.median(far))


def checkpoints(steps: int) -> tuple[int, ...]:
    """After how many steps weights are compared."""
    return tuple(sorted({1, min(10, steps), steps}))


def run_ours(network, codec, dataset, x, y, steps):
    """Losses (S, K) and seconds of a step; first weights and weights after some steps, by PyTorch's names."""
    inputs, labels = TreeSpec.of(dataset.input_like), TreeSpec.of(dataset.label_like)
    stats = [tuple(map(float, v)) for v in (dataset.mean, dataset.std)]
    summary = build.DataSummary(inputs, labels, dataset.num_classes, *stats, "none")
    cfg = config.Config(
        config.ModelConfig(network, width=NETWORKS[network].width, cut="medium", running_variance="unbiased"),
        data=config.DataConfig(augment="none"),
        optim=config.OptimConfig(
            learning_rate=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, schedule="constant", warmup_epochs=0.0
        ),
        codec=codec,
        clients=CLIENTS,
        batch_size=BATCH,
        epochs=1,
    )
    model = _without_dropout(build.make_model(cfg, summary))
    parts = models.split(model, cfg.cut, seed=cfg.seed)
    built = build.build(cfg, summary, samples=steps * BATCH, test_samples=0, parts=parts)
    state = TrainState(built.client, built.server, jnp.int32(0))
    first, found, losses, seconds = _named(model, state), {}, [], []
    state = program.place(built.spec, state, None)
    sums, fixed = zero_sums(built.spec), (jnp.asarray(x), jnp.asarray(y))
    everyone = np.arange(CLIENTS, dtype=np.int32)
    for step in range(steps):
        order = np.arange(CLIENTS * BATCH, dtype=np.int32).reshape(1, CLIENTS, BATCH) + step * CLIENTS * BATCH
        args = (state, sums, *fixed, order, everyone, jax.random.key(0))
        start = time.perf_counter()
        state, sums, loss = program.train_steps(built.spec, None, *args)
        losses.append(np.asarray(loss)[0])
        seconds.append(time.perf_counter() - start)
        if step + 1 in checkpoints(steps):
            found[step + 1] = _named(model, state)
    return {"losses": np.stack(losses), "seconds": _median(seconds)}, first, found


def _median(seconds):
    """The median of all but the first, in which msjax compiles."""
    return round(statistics.median(seconds[1:] or seconds), 4)


def _without_dropout(model):
    blocks = (
        dataclasses.replace(block, options=tuple((k, 0.0 if k == "dropout_rate" else v) for k, v in block.options))
        for block in model.blocks
    )
    return dataclasses.replace(model, blocks=tuple(blocks))


def _named(model, state):
    """The whole network's arrays, float32, by PyTorch's names."""
    import safetensors.numpy

    params, stats = (getattr(state.client, n) | getattr(state.server, n) for n in ("params", "stats"))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.safetensors"
        models.save_weights(file, model, params, stats)
        return safetensors.numpy.load_file(file)


def run_torch(network, name, first, batches, wanted, threads):
    """Losses (S, K), seconds of a step and weights after `wanted` steps, of the method as the paper says it."""
    import torch

    from experiments import pytorch_method

    torch.set_num_threads(threads)
    whole, modules = _torch_network(network, first)
    whole.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in first.items()}, strict=False)
    optimizer = torch.optim.SGD(whole.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    cut = NETWORKS[network].cut
    client, server = (torch.nn.Sequential(*part) for part in (modules[:cut], modules[cut:]))
    method = pytorch_method.Method(whole, client, server, pytorch_method.codec(CODECS[name]), optimizer)
    losses, weights, seconds = [], {}, []
    for number, (images, labels) in enumerate(zip(*batches, strict=True), 1):
        start = time.perf_counter()
        losses.append(method.step(images, labels))
        seconds.append(time.perf_counter() - start)
        if number in wanted:
            weights[number] = {k: v.detach().numpy().copy() for k, v in whole.state_dict().items()}
    return {"losses": np.array(losses), "weights": weights, "seconds": _median(seconds)}


def _torch_network(name, first):
    """The network as wide as its first weights, and the modules through which its inputs go one after the other."""
    from torch import nn

    from benchmarks import torch_networks

    if name == "vgg19":
        whole = torch_networks.vgg19_bn(len(first["classifier.6.bias"]), len(first["features.0.weight"]), (1, 1))
        dropped = (module for module in whole.classifier if not isinstance(module, nn.Dropout))
        return whole, [*whole.features, whole.flatten, *dropped]
    whole = torch_networks.ResNet(name, len(first["fc.bias"]), len(first["conv1.weight"]))
    stages = whole.layer1, whole.layer2, whole.layer3, whole.layer4
    return whole, [whole.conv1, whole.bn1, nn.ReLU(), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), whole.fc]


def table(rows: list[dict]) -> str:
    """Returns the differences as a Markdown table."""
    header = ["network", "codec", "steps", "losses", "PyTorch again"]
    for after in ("one", "ten", "all"):
        header += [f"weights after {after}", "PyTorch again"]
    lines = []
    for row in rows:
        cells = [NETWORKS[network_of(row)].title, row["codec"], str(row["steps"])]
        for name in ("losses", "weights_1", "weights_10", f"weights_{row['steps']}"):
            cells += [f"{row[key]:.1e}" if key in row else "–" for key in (name, f"{name}_again")]
        lines.append([*cells, f"{row['last_loss']:.3f}", *(_seconds(row, name) for name in ("msjax", "torch"))])
    return timing.table([*header, "loss at the end", "msjax, s a step", "PyTorch, s a step"], lines)


def _seconds(row, program):
    found = row.get(f"{program}_step_seconds")
    return "–" if found is None else f"{found:.2f}"


if __name__ == "__main__":
    sys.exit(main())

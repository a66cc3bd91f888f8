"""The paper's method in plain PyTorch beside msjax: one network, the same first weights and batches, step by step.

    python -m experiments.beside_pytorch --data-dir DIR                          # needs PyTorch

ResNet18 of a quarter of the width, cut at its medium cut, ten clients of 25 of CIFAR-10's original training images,
not augmented; SGD with momentum and weight decay at a constant rate. PyTorch does what the paper says, client after
client: forward, the codec, the server's loss, backward past the codec, and the means of gradients and of running
statistics over the clients. msjax runs its fused step, with PyTorch's running variance.

Losses are compared as the largest relative difference of a client's in a step; weights by ‖difference‖ / ‖update so
far‖, the median over arrays. "PyTorch again" is PyTorch beside itself with one thread instead of two, which adds in
another order: what differs no more than that is the same method. Rounding moves values over the edge between two codes
of MS and QU, and between kept and not of SP; then a step differs by more than float32's precision, in both. Speed is
measured by `benchmarks.steps`; where the cores are busy, OMP_WAIT_POLICY=PASSIVE in the environment keeps PyTorch's
threads from waiting in a loop, which takes ten times as long.
"""

import pathlib
import sys
import tempfile
import time

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
CLIENTS, BATCH, WIDTH = 10, 25, 0.25
RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", help="where CIFAR-10 is, as --data.data-dir of msjax train")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--set", default="cifar10", help="the data set")
    options = parser.parse_args()
    start = time.monotonic()
    dataset = data.load(options.set, data_dir=options.data_dir)
    rows = []
    for name in options.codecs:
        rows.append(compare(name, dataset, options.steps))
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    print(table(rows))
    return 0


def compare(name: str, dataset: data.Dataset, steps: int) -> dict:
    """Returns how far apart the two are after each step, and PyTorch from itself."""
    x, y = dataset.train.fetch(np.arange(steps * CLIENTS * BATCH) % len(dataset.train))
    ours, first, files = run_ours(CODECS[name], dataset, x, y, steps)
    images = (x.astype(np.float32) / 255 - dataset.mean) / dataset.std
    batches = (images.reshape(steps, CLIENTS, BATCH, *x.shape[1:]), y.reshape(steps, CLIENTS, BATCH))
    theirs, again = (run_torch(name, first, batches, files.keys(), threads) for threads in (2, 1))
    found = {
        "codec": name,
        "steps": steps,
        "losses": _losses(ours, theirs),
        "losses_again": _losses(again, theirs),
        "last_loss": float(np.mean(theirs["losses"][-1])),
    }
    for step in files:
        found[f"weights_{step}"] = _weights(files[step], theirs["weights"][step], first)
        found[f"weights_{step}_again"] = _weights(again["weights"][step], theirs["weights"][step], first)
    print(found, flush=True)
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


def run_ours(codec, dataset, x, y, steps):
    """(losses (S, K), first weights, weights after some steps), by PyTorch's names."""
    inputs, labels = TreeSpec.of(dataset.input_like), TreeSpec.of(dataset.label_like)
    stats = [tuple(map(float, v)) for v in (dataset.mean, dataset.std)]
    summary = build.DataSummary(inputs, labels, dataset.num_classes, *stats, "none")
    cfg = config.Config(
        config.ModelConfig("resnet18", width=WIDTH, running_variance="unbiased"),
        data=config.DataConfig(augment="none"),
        optim=config.OptimConfig(
            learning_rate=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, schedule="constant", warmup_epochs=0.0
        ),
        codec=codec,
        clients=CLIENTS,
        batch_size=BATCH,
        epochs=1,
    )
    built = build.build(cfg, summary, samples=steps * BATCH, test_samples=0)
    model = build.make_model(cfg, summary)
    state = TrainState(built.client, built.server, jnp.int32(0))
    first, found, losses = _named(model, state), {}, []
    state = program.place(built.spec, state, None)
    sums, fixed = zero_sums(built.spec), (jnp.asarray(x), jnp.asarray(y))
    everyone = np.arange(CLIENTS, dtype=np.int32)
    for step in range(steps):
        order = np.arange(CLIENTS * BATCH, dtype=np.int32).reshape(1, CLIENTS, BATCH) + step * CLIENTS * BATCH
        args = (state, sums, *fixed, order, everyone, jax.random.key(0))
        state, sums, loss = program.train_steps(built.spec, None, *args)
        losses.append(np.asarray(loss)[0])
        if step + 1 in checkpoints(steps):
            found[step + 1] = _named(model, state)
    return {"losses": np.stack(losses)}, first, found


def _named(model, state):
    """The whole network's arrays, float32, by PyTorch's names."""
    import safetensors.numpy

    params, stats = (getattr(state.client, n) | getattr(state.server, n) for n in ("params", "stats"))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "weights.safetensors"
        models.save_weights(file, model, params, stats)
        return safetensors.numpy.load_file(file)


def run_torch(name, first, batches, wanted, threads):
    """Losses (S, K) and weights after `wanted` steps, of the method as the paper says it."""
    import torch

    from benchmarks import torch_networks
    from experiments import pytorch_method

    torch.set_num_threads(threads)
    network = torch_networks.ResNet("resnet18", len(first["fc.bias"]), len(first["conv1.weight"]))
    network.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in first.items()}, strict=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def client(x):
        return network.layer2(network.layer1(torch.relu(network.bn1(network.conv1(x)))))

    def server(h):
        return network.fc(network.layer4(network.layer3(h)).mean((2, 3)))

    method = pytorch_method.Method(network, client, server, pytorch_method.codec(CODECS[name]), optimizer)
    losses, weights = [], {}
    for number, (images, labels) in enumerate(zip(*batches, strict=True), 1):
        losses.append(method.step(images, labels))
        if number in wanted:
            weights[number] = {k: v.detach().numpy().copy() for k, v in network.state_dict().items()}
    return {"losses": np.array(losses), "weights": weights}


def table(rows: list[dict]) -> str:
    """Returns the differences as a Markdown table."""
    at = checkpoints(rows[0]["steps"])
    header = ["codec", "losses", "PyTorch again"]
    for step in at:
        header += [f"weights after {step}", "PyTorch again"]
    header += ["loss at the end"]
    lines = []
    for row in rows:
        cells = [row["codec"], f"{row['losses']:.1e}", f"{row['losses_again']:.1e}"]
        for step in at:
            cells += [f"{row[f'weights_{step}']:.1e}", f"{row[f'weights_{step}_again']:.1e}"]
        cells += [f"{row['last_loss']:.3f}"]
        lines.append(cells)
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())

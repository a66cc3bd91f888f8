"""Whole training steps: with codecs against without them at the paper's nine cuts, and ResNet18 against PyTorch's.

    python -m benchmarks.steps                          # an eighth of the width, 32 samples: minutes on a CPU
    python -m benchmarks.steps --width 1 --batch 256 --image 224    # the paper's, on a GPU
    python -m benchmarks.steps --only torch --width 0.25 1 --batch 250 --clients 10

The steps of a comparison run in turn in one process, on synthetic images. MS is of features alone, `EntropyMask` of
features and gradients, and "everything" of what keeps the clients equal, too; its messages are estimated, not coded, as
`msjax train` does. A step is what `msjax train` runs: preprocessing, both halves, the codec at the cut, the optimizer,
donated buffers. Needs `pip install -e '.[bench]'`.
"""

import sys
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
from msjax.training.batching import resident_of_clients
from msjax.training.devices import make_mesh, replicate, split_cpu

NETWORKS = {"vgg19": (10, 32), "resnet18": (100, 32), "resnet34": (1000, None)}
"""Number of classes and side of an image; ResNet34's side is an option."""
CUTS = ("shallow", "medium", "deep")
NONE = compress.Identity()
BOTH_WAYS = {
    "codec": compress.EntropyMask(bits=1.6),
    "grad_codec": compress.EntropyMask(bits=1.5, signed=True, rounding="stochastic"),
}
CODECS = {
    "identity": {"codec": NONE},
    "ms": {"codec": compress.MaskEncoded()},
    "entropy_mask": BOTH_WAYS,
    "everything": BOTH_WAYS | {"update_codec": compress.EntropyMask(bits=2.0, signed=True)},
}
"""As fields of a config."""
NAMES = {"ms": "MS", "entropy_mask": "EntropyMask both ways", "everything": "EntropyMask, everything"}


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--width", type=float, nargs="+", default=[0.125], help="of the networks")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step, over all clients")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--image", type=int, default=64, help="side of ResNet34's images; 224 in the paper")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="to compare codecs in")
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=CUTS, help="of these")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS), help="to compare, and with none")
    parser.add_argument("--only", choices=("codec", "torch"), help="one of the two comparisons")
    options = parser.parse_args()
    options.codecs = ["identity", *(name for name in options.codecs if name != "identity")]
    split_cpu(options.clients)
    start = time.monotonic()
    rows = []
    for width in options.width:
        if options.only != "torch":
            for name in options.networks:
                classes, side = NETWORKS[name]
                rows += [with_codec(name, classes, side or options.image, cut, width, options) for cut in options.cuts]
        if options.only != "codec":
            rows.append(beside_torch(width, options))
    print(table(rows))
    if options.out:
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    return 0


def with_codec(name: str, classes: int, side: int, cut: str, width: float, options) -> dict:
    """Returns the medians of a step without compression and with codecs."""
    steps = {key: make_step(name, classes, side, cut, width, options, **CODECS[key]) for key in options.codecs}
    seconds = timing.interleaved({key: call for key, (call, _) in steps.items()}, repeats=options.repeats)
    return {
        "kind": "codec",
        "model": name,
        "width": width,
        "cut": cut,
        "image": side,
        **{f"{key}_seconds": value for key, value in seconds.items()},
        **{f"{key}_compile_seconds": compile_seconds for key, (_, compile_seconds) in steps.items()},
    }


def beside_torch(width: float, options) -> dict:
    """Returns the medians of the uncompressed ResNet18 step here and in PyTorch."""
    import torch

    from benchmarks import torch_resnet

    call, compile_seconds = make_step("resnet18", 10, 32, "medium", width, options, codec=NONE)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    network = torch_resnet.resnet18(10, width=width).to(device)
    ours = models.build("resnet18", input_shape=(32, 32, 3), num_classes=10, width=width)
    if sum(p.numel() for p in network.parameters()) != models.count_params(ours):
        raise RuntimeError("the two networks have different numbers of parameters")
    x, y = torch.randn(options.batch, 32, 32, 3, device=device), torch.randint(10, (options.batch,), device=device)
    step_torch = torch_resnet.make_step(network, x, y)

    def call_torch():
        step_torch()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = timing.interleaved({"identity": call, "torch": call_torch}, repeats=options.repeats)
    return {
        "kind": "torch",
        "model": "resnet18",
        "width": width,
        "cut": "–",
        "image": 32,
        "identity_seconds": seconds["identity"],
        "torch_seconds": seconds["torch"],
        "identity_compile_seconds": compile_seconds,
    }


def make_step(name, classes, side, cut, width, options, *, dtype="float32", steps=1, **compressed):
    """(a call that runs the next `steps` steps, seconds to compile it)."""
    per_client = options.batch // options.clients
    inputs = TreeSpec.of(jax.ShapeDtypeStruct((side, side, 3), np.uint8))
    labels = TreeSpec.of(jax.ShapeDtypeStruct((), np.int32))
    summary = build.DataSummary(inputs, labels, classes, (0.5,) * 3, (0.25,) * 3, "crop_flip")
    model = config.ModelConfig(name, cut, width)
    batches = {"batch_size": per_client, "epochs": 1}
    cfg = config.Config(model, clients=options.clients, dtype=dtype, **compressed, **batches)
    built = build.build(cfg, summary, samples=per_client * 10**6, test_samples=0)
    mesh = make_mesh(options.clients)
    rng = np.random.default_rng(0)
    count = options.batch
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    labels = rng.integers(0, classes, count, dtype=np.int32)
    order = np.arange(options.clients * per_client, dtype=np.int32).reshape(1, options.clients, per_client)
    order = np.repeat(order, steps, axis=0)
    *fixed, place = resident_of_clients(data.Arrays(images, labels), mesh, order[0])
    order = order if place is None else place[order]
    state = TrainState(built.client, built.server, jnp.int32(0))
    carry = [program.place(built.spec, state, mesh), replicate(zero_sums(built.spec), mesh)]
    everyone = np.arange(options.clients, dtype=np.int32)

    def call():
        args = (*fixed, order, everyone, jax.random.key(0))
        carry[:] = program.train_steps(built.spec, mesh, *carry, *args)[:2]
        return carry[1]

    start = time.perf_counter()
    jax.block_until_ready(call())
    return call, time.perf_counter() - start


def table(rows: list[dict]) -> str:
    """Returns the steps in milliseconds and their ratio as a Markdown table."""
    lines = []
    pairs = [
        (row, name, "identity", f"{NAMES[name]} against none")
        for row in rows
        for name in NAMES
        if f"{name}_seconds" in row
    ]
    pairs += [(row, "identity", "torch", "against PyTorch") for row in rows if row["kind"] == "torch"]
    for row, name, other, what in pairs:
        first, second, compile_seconds = (row[f"{key}seconds"] for key in (f"{name}_", f"{other}_", f"{name}_compile_"))
        cells = [f"{row['model']}, {row['image']}²", f"{row['width']:g}", row["cut"], what]
        cells += [f"{first * 1e3:.1f}", f"{second * 1e3:.1f}", f"{first / second:.3f}", f"{compile_seconds:.1f}"]
        lines.append(cells)
    header = ["model", "width", "cut", "what", "step, ms", "other step, ms", "ratio", "first step, s"]
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())

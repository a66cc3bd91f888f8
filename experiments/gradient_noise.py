"""The noise of compressed gradients beside the noise that a step has by itself: ten clients' gradients differ anyway.

    python -m experiments.gradient_noise --data-dir DIR --weights DIR        # a few minutes on two CPU cores

ResNet20 on training images of CIFAR-10, cut as `published_cuts` cuts it: ten clients with 25 images each take one step
in training, features uncompressed. Their gradients come down through an unbiased `EntropyMask` with noise of a part of
the gradient's energy (`error`), each client computes the gradient of its weights, and the mean of all is what they
learn from. "Made" is the noise that the codec has made: its seven levels cannot make as little as the least error that
is asked for. "Own noise" is the variance of the mean without compression, as the clients' gradients tell it:
Σ‖gₖ − ḡ‖² / (K(K − 1)), by ‖ḡ‖². "Added" is what the codec adds to that variance, by the same measure:
Σ‖g′ₖ − gₖ‖² / K², the mean of several draws. Where it is far below the own noise, the codec disturbs a step less than
another choice of 250 images would. "Published" are the published weights, at the end of training; "drawn" are weights
as they are drawn, at its beginning. Writes a record.
"""

import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import published_weights
from experiments.kept_gradients import BLOCKS, noisy
from msjax import build, models, wire

OUT = pathlib.Path(__file__).parent / "results" / "gradient_noise"
TITLE = "Noise of compressed gradients, beside a step's own"
CLIENTS, IMAGES, DRAWS = 10, 25, 5
ERRORS = (0.1, 0.3, 1.0, 3.0)


def main() -> int:
    parser = published_weights.parser_of(__doc__, OUT)
    options = parser.parse_args()
    start = time.monotonic()
    rows = []
    network = published_weights.network("resnet20", options.weights / "resnet20.safetensors", options.data_dir)
    drawn = build.make_model(network.cfg, build.DataSummary.of(network.run.dataset))
    x, labels = network.batch(CLIENTS * IMAGES)
    for cut in network.list_cuts():
        if cut.block in BLOCKS:
            for weights, parts in (("published", network.cuts(cut.layer)), ("drawn", models.split(drawn, cut.layer))):
                rows += [{"weights": weights, "block": cut.block, **row} for row in measure(parts, x, labels)]
                print(json.dumps(rows[-1]), flush=True)
    timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    print(table(rows))
    return 0


def measure(parts: tuple[models.ModelPart, models.ModelPart], x: jax.Array, labels: jax.Array) -> list[dict]:
    """Returns a row for each error: bits a value of the gradients, and both noises by the mean gradient's energy."""
    client, server = parts
    applies, arrays = (client.apply, server.apply), tuple(part._replace(apply=None) for part in parts)
    batches = [
        (x[at : at + len(x) // CLIENTS], labels[at : at + len(x) // CLIENTS])
        for at in range(0, len(x), len(x) // CLIENTS)
    ]
    at_cut = [_gradient_at_cut(applies, *arrays, *batch) for batch in batches]
    exact = np.stack([_client_gradient(applies, *arrays, *batch, g) for batch, g in zip(batches, at_cut, strict=True)])
    mean = exact.mean(0)
    energy = np.sum(mean**2)
    own = np.sum((exact - mean) ** 2) / (CLIENTS * (CLIENTS - 1)) / energy
    rows = []
    for error in ERRORS:
        codec, added, bits, made = noisy(error), [], [], []
        for draw in range(DRAWS):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), draw), CLIENTS)
            for batch, g, gradient, key in zip(batches, at_cut, exact, keys, strict=True):
                payload = _encode(codec, g, key)
                decoded = codec.decode(payload, g)
                got = _client_gradient(applies, *arrays, *batch, decoded)
                added.append(np.sum((got - gradient) ** 2))
                made.append(np.sum((decoded - g) ** 2) / np.sum(g**2))
                if draw == 0:
                    bits.append(8 * len(wire.encode(payload, codec, g)) / g.size)
        variance = CLIENTS * np.mean(added) / CLIENTS**2 / energy
        noise = {"own": float(own), "added": float(variance), "share": float(variance / own)}
        rows.append({"error": error, "made": float(np.mean(made)), "bits": float(np.mean(bits)), **noise})
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _encode(codec, g, key):
    return codec.encode(g, key)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_at_cut(applies, client, server, x, labels):
    """That of the mean loss of one client's batch, by its features."""
    key = jax.random.key(0)
    h, _ = applies[0](client.params, client.stats, x, train=True, key=key)

    def loss(h):
        logits, _ = applies[1](server.params, server.stats, h, train=True, key=key)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    return jax.grad(loss)(h)


@functools.partial(jax.jit, static_argnums=0)
def _client_gradient(applies, client, server, x, labels, g):
    """That of the client's weights, as one vector, where `g` comes back."""
    _, vjp = jax.vjp(lambda p: applies[0](p, client.stats, x, train=True, key=jax.random.key(0))[0], client.params)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(vjp(g))])


def table(rows: list[dict]) -> str:
    """Returns the record as Markdown."""
    header = ["weights", "behind", "own noise", "error", "made", "bits down", "added noise", "added by own"]
    lines = []
    for row in rows:
        noise = [f"{row['made']:.2f}", f"{row['bits']:.2f}", f"{row['added']:.3f}", f"{100 * row['share']:.1f} %"]
        lines.append([row["weights"], row["block"], f"{row['own']:.2f}", f"{row['error']:g}", *noise])
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())

"""Gradients only where the features were kept: what it saves, and what the layers before the cut no longer learn.

    python -m experiments.kept_gradients --data-dir DIR --weights DIR        # ten minutes on two CPU cores

Published ResNet20 on a batch of CIFAR-10's training images, as `published_cuts` cuts it, in training. Features go up
through a codec, and the gradient of the loss comes down: of all features, or of those alone that were kept
(`grad_kept_only`). "Lost" are features above zero that decode to zero, of all: behind a ReLU these alone have a
gradient that is no longer used. The client's gradient is that of its weights, as relative difference ‖g′ − g‖/‖g‖: to
the one with nothing compressed, with the whole gradient of the decoded features ("all"), and with the kept part of it
("kept"); and between these two ("dropped"). Bits are real ones, a value of the features, of unbiased stochastic
rounding with noise of a part of the gradient's energy. Writes a record.
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
from msjax import compress, wire

OUT = pathlib.Path(__file__).parent / "results" / "kept_gradients"
TITLE = "Gradients only where the features were kept"
BLOCKS = ("stem", "stage1_block3", "stage2_block3")
CODECS = {
    "MS": compress.MaskEncoded(),
    "SP": compress.TopK(),
    "EntropyMask 1.6 bits": compress.EntropyMask(bits=1.6),
    "EntropyMask 1.1 bits": compress.EntropyMask(bits=1.1),
}
NOISE = (0.3, 1.0)


def noisy(error):
    """The codec of gradients whose variance is this part of their energy."""
    return compress.EntropyMask(error=error, levels=7, signed=True, rounding="stochastic")


def main() -> int:
    parser = published_weights.parser_of(__doc__, OUT)
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()
    start = time.monotonic()
    rows = []
    for row in measure(str(options.weights / "resnet20.safetensors"), options.data_dir, options.images):
        rows.append(row)
        print(json.dumps(row), flush=True)
    timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    print(table(rows))
    return 0


def measure(weights, data_dir, images):
    """Yields a row for each block and codec."""
    network = published_weights.network("resnet20", weights, data_dir)
    x, labels = network.batch(images)
    for cut in network.list_cuts():
        if cut.block not in BLOCKS:
            continue
        client, server = network.cuts(cut.layer)
        arrays = (part._replace(apply=None) for part in (client, server))
        run_once = functools.partial(_backward, (client.apply, server.apply), *arrays)
        plain, *_ = run_once(compress.Identity(), x, labels)
        for name, codec in CODECS.items():
            everything, kept, g, payload, h = run_once(codec, x, labels)
            sent = codec.take_kept(payload, g)
            zero = codec.put_kept(payload, jnp.ones_like(sent), g) == 0
            yield {
                "block": cut.block,
                "codec": name,
                "text": str(codec),
                "features": list(h.shape),
                "bits": 8 * len(wire.encode(payload, codec, h, compression="huffman")) / h.size,
                "zeros": float(jnp.mean(h == 0)),
                "kept": 1 - float(jnp.mean(zero)),
                "lost": float(jnp.mean(zero & (h > 0))),
                "all": _distance(everything, plain),
                "kept_only": _distance(kept, plain),
                "dropped": _distance(kept, everything),
                **{f"noise {e}": [_gradient_bits(a, e, g.size) for a in (g, sent)] for e in NOISE},
            }


@functools.partial(jax.jit, static_argnums=(0, 3))
def _backward(applies, client, server, codec, x, labels):
    """Returns (the client's gradient with the whole gradient, and with what was kept; that of the decoded features;
    their payload; the features)."""
    key = jax.random.key(0)

    def forward(params):
        return applies[0](params, client.stats, x, train=True, key=key)[0]

    h, vjp = jax.vjp(forward, client.params)
    payload = codec.encode(h)

    def loss(h):
        logits, _ = applies[1](server.params, server.stats, h, train=True, key=key)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    g = jax.grad(loss)(codec.decode(payload, h))
    kept = codec.put_kept(payload, codec.take_kept(payload, g), g)
    return vjp(g)[0], vjp(kept)[0], g, payload, h


def _distance(one, other):
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (one, other)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


def _gradient_bits(g, error, values):
    codec = noisy(error)
    return 8 * len(wire.encode(jax.jit(codec.encode)(g, jax.random.key(1)), codec, g)) / values


def table(rows: list[dict]) -> str:
    """Returns the record as Markdown."""
    header = ["behind", "features", "real bits", "zeros", "kept", "lost"]
    header += [f"client's gradient: {name}" for name in ("all", "kept", "dropped")]
    header += [f"bits down, noise {e}: all → kept" for e in NOISE]
    lines = []
    for row in rows:
        percents = [f"{100 * row[name]:.0f} %" for name in ("zeros", "kept", "lost")]
        distances = [f"{row[name]:.2f}" for name in ("all", "kept_only", "dropped")]
        bits = ["{:.2f} → {:.2f}".format(*row[f"noise {e}"]) for e in NOISE]
        lines.append([row["block"], row["codec"], f"{row['bits']:.2f}", *percents, *distances, *bits])
    return timing.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())

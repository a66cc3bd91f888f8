"""Published PyTorch weights of the CIFAR ResNets, cut behind the stem and the stages: accuracy with codecs, untrained.

    python -m experiments.published_cuts --weights DIR --data-dir DIR

The networks of `published_weights` are cut behind every block, or with `--ends` behind the stem and each stage, and
CIFAR-10's 10,000 original test images go through them in batches of 250, each batch of features through the codec as
that of one client. Nothing is trained or tuned: what a codec loses here is what its error costs a network that has
never met it. Codecs are the paper's and `EntropyMask`; all others are in `frontier_untrained`. At test RT sends what SP
sends, and is left out. Real bits are those of the whole message of the first batch, coded losslessly. What is done is
kept, and not done again: all takes some hours on two cores. `--bits` measures the bits of what is done anew, since
lossless coding became better after the accuracies were measured.
"""

import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from benchmarks import timing
from experiments import published_weights, rate_distortion, study
from msjax import compress

OUT = pathlib.Path(__file__).parent / "results" / "published_cuts"
BATCH = 250
EQUAL = {  # about 2.32 bits
    "QU": compress.Uniform(bits=3),
    "SP": compress.TopK(ratio=0.95875),
    "MS": compress.MaskEncoded(),
    "EntropyMask": compress.EntropyMask(bits=2.32, levels=31),
}
ONE = {  # about 1 bit
    "QU": compress.Uniform(bits=1),
    "SP": compress.TopK(ratio=0.975),
    "MS": compress.MaskEncoded(bits=1),
    "EntropyMask": compress.EntropyMask(bits=1.0),
}
MORE = (  # of the smallest network, for accuracy against bits
    *(compress.Uniform(bits=bits) for bits in (2, 4, 5)),
    *(compress.TopK(ratio=ratio) for ratio in (0.8, 0.9)),
    *(compress.MaskEncoded(bits=bits) for bits in (3, 4)),
    *(compress.EntropyMask(bits=bits, levels=levels) for bits, levels in ((0.5, 5), (0.75, 15), (1.5, 15), (3.0, 31))),
)
NAMES = {"Uniform": "QU", "TopK": "SP", "MaskEncoded": "MS", "EntropyMask": "EntropyMask", "Identity": "none"}


def main() -> int:
    parser = published_weights.parser_of(__doc__, OUT)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet32", "resnet56"])
    parser.add_argument("--ends", action="store_true", help="only behind the stem and each stage")
    parser.add_argument("--images", type=int, default=10_000, help="so many of the test images, for a trial")
    parser.add_argument("--bits", action="store_true", help="only measure the bits of what is done anew")
    options = parser.parse_args()
    if options.bits:
        return measure_bits_again(options, plot, codecs("resnet20"))
    made = timing.Continued(options.out)
    rows = made.rows
    done = {(row["model"], row["layer"], row["codec"], row["images"]) for row in rows}
    for name in options.models:
        weights = options.weights / f"{name}.safetensors"
        for row in measure(name, weights, options.data_dir, options.images, done, ends=options.ends):
            rows.append(row)
            print("{model} {block} {codec}: {bits:.2f} bits, {top1_percent:.2f} %".format(**row), flush=True)
            made.save(options)
    print(table(rows))
    made.draw(plot(rows))
    return 0


def measure_bits_again(options, plot, codecs) -> int:
    """Measures the bits of a record's rows anew, each on the first batch; rows without a model are of ResNet20."""
    record, start = json.loads(options.out.with_suffix(".json").read_text()), time.monotonic()
    by_text, rows = {str(codec): codec for codec in codecs}, record["rows"]
    for model in dict.fromkeys(row.get("model", "resnet20") for row in rows):
        network = published_weights.network(model, options.weights / f"{model}.safetensors", options.data_dir)
        x, _ = network.run.dataset.test.fetch(np.arange(BATCH))
        layers = {cut.block: cut.layer for cut in network.list_cuts()}
        own = [row for row in rows if row.get("model", "resnet20") == model]
        for block, of_cut in study.grouped(own, "block").items():
            client, _ = network.cuts(layers[block])
            h = np.asarray(features_of(client, network.run.spec.preprocess(jnp.asarray(x))))
            for row in of_cut:
                row["bits"] = rate_distortion.measure(h, by_text[row["codec"]])["bits"]
                print("{block} {codec}: {bits:.2f} bits".format(**row), flush=True)
    measured = timing.record(options, [], time.monotonic() - start)
    record["bits"] = {name: measured[name] for name in ("command", "environment", "wall_seconds")}
    timing.save(options.out, record, plot(rows))
    return 0


def codecs(model: str) -> tuple[compress.Codec, ...]:
    """Those that a network is tested with."""
    found = (compress.Identity(), *EQUAL.values(), *ONE.values())
    return found + MORE if model == "resnet20" else found


def measure(name, weights, data_dir, images, done, *, ends=False):
    """Yields a row for each block (with `ends`, for the stem and the last of each stage) and codec not in `done`."""
    network = published_weights.network(name, weights, data_dir)
    x, labels = network.run.dataset.test.fetch(np.arange(images))
    network_cuts = network.list_cuts()
    stages = {cut.block.split("_")[0]: cut.layer for cut in network_cuts}
    for cut in network_cuts:
        if ends and cut.layer not in stages.values():
            continue
        wanted = [c for c in codecs(name) if (name, cut.layer, str(c), images) not in done]
        if not wanted:
            continue
        client, server = network.cuts(cut.layer)
        batches = [x[i : i + BATCH] for i in range(0, images, BATCH)]
        features = [features_of(client, network.run.spec.preprocess(jnp.asarray(batch))) for batch in batches]
        for codec in wanted:
            start = time.monotonic()
            keys = jax.random.split(jax.random.key(0), len(batches))
            right = sum(
                int(_right(server, h, labels[i * BATCH : (i + 1) * BATCH], keys[i], codec=codec))
                for i, h in enumerate(features)
            )
            yield {
                "model": name,
                "layer": cut.layer,
                "block": cut.block,
                "images": images,
                **rate_distortion.measure(np.asarray(features[0]), codec),
                "top1_percent": 100 * right / images,
                "seconds": round(time.monotonic() - start, 1),
            }


@jax.jit
def features_of(client, x):
    """The features of a batch as they are at test."""
    return client.apply(client.params, client.stats, x, train=False, key=None)[0]


@functools.partial(jax.jit, static_argnames="codec")
def _right(server, h, labels, key, *, codec):
    """How many of a batch are classified rightly."""
    h = codec.roundtrip(h, key if codec.needs_key else None)
    logits, _ = server.apply(server.params, server.stats, h, train=False, key=None)
    return (logits.argmax(-1) == labels).sum()


def by_images(rows: list[dict]) -> list[dict]:
    """Returns the rows so that of several of one codec and block the one of most images is the last."""
    return sorted(rows, key=lambda row: row["images"])


def table(rows: list[dict]) -> str:
    """Returns accuracies at every block as Markdown: at payloads of about 2.32 bits, and of about 1 bit."""
    header = ["network", "behind", "none"]
    header += [f"{name}, {_size(codec)}" for codecs in (EQUAL, ONE) for name, codec in codecs.items()]
    lines = []
    for (model, block), own in study.grouped([r | {"at": (r["model"], r["block"])} for r in rows], "at").items():
        found = {row["codec"]: row for row in by_images(own)}
        cells = [_cell(found.get(str(codec))) for codec in (compress.Identity(), *EQUAL.values(), *ONE.values())]
        lines.append([model, block, *cells])
    return timing.table(header, lines)


def _size(codec):
    """What a codec is told of how much to send."""
    if isinstance(codec, compress.TopK):
        return f"{1 - codec.ratio:.1%} kept".replace("%", " %")
    return f"{codec.bits:g} bit{'' if codec.bits == 1 else 's'}"


def _cell(row):
    if row is None:
        return "not run"
    return f"{row['top1_percent']:.2f}" + ("" if row["codec"] == "Identity()" else f" ({row['bits']:.2f})")


def plot(rows: list[dict]) -> matplotlib.figure.Figure:
    """Accuracy against real bits, of the smallest network behind its stem and each stage."""
    rows = [row for row in rows if row["model"] == "resnet20"]
    blocks = ("stem", "stage1_block3", "stage2_block3", "stage3_block3")
    figure = matplotlib.figure.Figure(figsize=(14, 3.6), layout="constrained")
    for axes, block in zip(figure.subplots(1, len(blocks), sharey=True), blocks, strict=True):
        for color, kind in enumerate(("Uniform", "TopK", "MaskEncoded", "EntropyMask")):
            own = [r for r in rows if r["block"] == block and r["codec"].startswith(f"{kind}(")]
            points = sorted((r["bits"], r["top1_percent"]) for r in own)
            if points:
                axes.plot(*zip(*points, strict=True), ".-", color=f"C{color}", label=NAMES[kind])
        for row in rows:
            if row["block"] == block and row["codec"] == "Identity()":
                axes.axhline(row["top1_percent"], color="gray", linewidth=0.8, linestyle="--", label="none")
        axes.set(title=f"ResNet20 behind {block}", xlabel="real bits a value", xlim=(0, 6))
    figure.axes[0].set(ylabel="test top-1, %")
    study.legend(figure.axes[::-1], fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(main())

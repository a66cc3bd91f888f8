"""Accuracy against real bits of every codec, and of others' after their sources, on a published network, untrained.

    python -m experiments.frontier_untrained --weights DIR --data-dir DIR --images 2000

ResNet20 with published weights is cut at the end of each stage, and CIFAR-10's original test images go through it in
batches of 250, each batch of features through the codec as that of one client. Nothing is trained or tuned. Real bits
are those of the whole message of the first batch, coded losslessly, by its values. Several of the others are made for
networks that are trained through them: C3-SL's noise, SplitFC's dropping and sparse features meet here a network that
never saw them, and `experiments.frontier` is what to judge those by. SplitFC drops nothing (keep=1.0) at inference.
What is done is kept, and not done again. `--bits` measures the bits of what is done anew, as in `published_cuts`.
"""

import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from benchmarks import timing
from experiments import published_cuts, published_weights, rate_distortion, study
from experiments.rivals import C3SL, ProductQuantizer, SplitFC, TAHQuant
from msjax import compress

OUT = pathlib.Path(__file__).parent / "results" / "frontier_untrained"
BATCH = published_cuts.BATCH
CODECS = (
    compress.Identity(),
    *(compress.EntropyMask(bits=bits, levels=levels) for bits, levels in ((0.5, 5), (1.0, 15), (2.0, 31), (3.0, 31))),
    *(compress.MaskEncoded(bits=bits) for bits in (1, 2, 3)),
    *(compress.TopK(ratio=ratio) for ratio in (0.8, 0.9, 0.95875)),
    *(compress.Uniform(bits=bits) for bits in (1, 2, 3, 4)),
    compress.StochasticUniform(bits=3),
    *(compress.Quantile(bits=bits) for bits in (2, 3, 4)),
    *(compress.SmallFloat(*bits) for bits in ((2, 1), (3, 2))),
    *(TAHQuant(high, low) for high, low in ((2, 1), (3, 2), (4, 3))),
    *(ProductQuantizer(length, clusters) for length, clusters in ((8, 16), (4, 16), (2, 16))),
    *(SplitFC(keep, bits) for keep, bits in ((1.0, 0.5), (1.0, 1.0), (1.0, 2.0), (0.5, 2.0))),
    *(C3SL(group) for group in (2, 4)),
)


def main() -> int:
    parser = published_weights.parser_of(__doc__, OUT)
    parser.add_argument("--images", type=int, default=10_000, help="the first so many of the test images")
    parser.add_argument("--bits", action="store_true", help="only measure the bits of what is done anew")
    options = parser.parse_args()
    if options.bits:
        return published_cuts.measure_bits_again(options, plot, CODECS)
    made = timing.Continued(options.out)
    rows = made.rows
    done = {(row["block"], row["codec"], row["images"]) for row in rows}
    for row in measure(options.weights / "resnet20.safetensors", options.data_dir, options.images, done):
        rows.append(row)
        print("{block} {codec}: {bits:.2f} bits, {top1_percent:.2f} %".format(**row), flush=True)
        made.save(options)
    print(table(rows))
    made.draw(plot(rows))
    return 0


def measure(weights, data_dir, images, done, codecs=CODECS):
    """Yields a row for the end of each stage and each codec, but for those (block, codec, images) that are done."""
    network = published_weights.network("resnet20", weights, data_dir)
    x, labels = network.run.dataset.test.fetch(np.arange(images))
    ends = {cut.block.split("_")[0]: cut for cut in network.list_cuts() if cut.block.startswith("stage")}
    for cut in ends.values():
        client, server = network.cuts(cut.layer)
        starts = range(0, images, BATCH)
        batches = (network.run.spec.preprocess(jnp.asarray(x[i : i + BATCH])) for i in starts)
        features = [published_cuts.features_of(client, batch) for batch in batches]
        for codec in codecs:
            if (cut.block, str(codec), images) in done:
                continue
            began = time.monotonic()
            keys = jax.random.split(jax.random.key(0), len(features))
            right = sum(
                int(_right(server, _roundtrip(h, key, codec=codec), labels[i : i + BATCH]))
                for i, h, key in zip(starts, features, keys, strict=True)
            )
            yield {
                "block": cut.block,
                "images": images,
                **rate_distortion.measure(np.asarray(features[0]), codec),
                "top1_percent": 100 * right / images,
                "seconds": round(time.monotonic() - began, 1),
            }


@functools.partial(jax.jit, static_argnames="codec")
def _roundtrip(h, key, *, codec):
    return codec.roundtrip(h, key if codec.needs_key else None)


@jax.jit
def _right(server, h, labels):
    """How many of a batch are classified rightly. Apart from the codec, so that there is one program a cut."""
    logits, _ = server.apply(server.params, server.stats, h, train=False, key=None)
    return (logits.argmax(-1) == labels).sum()


def table(rows: list[dict]) -> str:
    """Returns accuracy and real bits of every codec behind each stage, as Markdown."""
    blocks = list(study.grouped(rows, "block"))
    header = ["codec"] + [
        f"{name}, {block}" for block in blocks for name in ("bits a value", "‖h − ĥ‖²/‖h‖²", "top-1, %")
    ]
    lines = []
    for codec, own in study.grouped(rows, "codec").items():
        found, cells = {row["block"]: row for row in published_cuts.by_images(own)}, []
        for block in blocks:
            row = found.get(block)
            cells += (
                ["–"] * 3
                if row is None
                else [f"{row['bits']:.2f}", f"{row['error']:.3g}", f"{row['top1_percent']:.2f}"]
            )
        lines.append([f"`{codec.replace(', granularity=' + repr('tensor'), '')}`", *cells])
    images = ", ".join(sorted({f"{row['images']:,}" for row in rows}))
    return f"The first {images} test images.\n\n{timing.table(header, lines)}"


def plot(rows: list[dict]) -> matplotlib.figure.Figure:
    """Accuracy against real bits, a panel a stage and a line a kind of codec."""
    groups = study.grouped(rows, "block")
    kinds = list(dict.fromkeys(type(codec).__name__ for codec in CODECS))
    figure = matplotlib.figure.Figure(figsize=(14, 4.6), layout="constrained")
    panels = figure.subplots(1, max(len(groups), 1), sharey=True, squeeze=False)[0]
    for axes, (block, own) in zip(panels, groups.items(), strict=False):
        for color, kind in enumerate(kinds):
            points = sorted((r["bits"], r["top1_percent"]) for r in own if r["codec"].startswith(f"{kind}("))
            if kind == "Identity":
                for _, top1 in points:
                    axes.axhline(top1, color="gray", linewidth=0.8, linestyle="--", label="none")
            elif points:
                style = ("o-", "s--")[color // 10]
                axes.plot(*zip(*points, strict=True), style, color=f"C{color % 10}", markersize=4, label=kind)
        axes.set(title=f"ResNet20 behind {block}", xlabel="real bits a value", xlim=(0, 6))
    panels[0].set(ylabel="test top-1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(main())

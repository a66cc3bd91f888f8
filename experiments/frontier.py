"""Trained through each codec: accuracy against the bytes that move, ours and others' beside each other.

    python -m experiments.frontier --data-dir DIR       # a TFDS directory; without it CIFAR-10 is downloaded

One cut, one seed. Features go up through a codec and gradients down through its companion, where its source has one:
C3-SL sends the same sums down, SplitFC quantizes the gradient of all columns (its source: of those that were kept),
TAH-Quant both alike; FedLite and top-k leave the gradient as it is. Bytes are those of messages. `EntropyMask` is
always entropy-coded; of the others the payload's bytes are counted in training, and times what `msjax.wire` makes of
them without loss, as measured on one client's batch behind the trained network ("coded": features and their gradients,
of a pass without a codec); where a row has none of these, its bytes are those of payloads. "Of everything" is with
labels and with what keeps the clients' parts equal, which nobody compresses here. How the others deviate from their
sources is said in `experiments/rivals`; nothing of them was tuned, and one seed tells no less than a point. Untrained,
at many more rates: `experiments.frontier_untrained`.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import matplotlib.figure

from benchmarks import timing
from experiments import driver, feature_maps, study
from experiments.both_directions import unbiased
from experiments.rivals import C3SL, ProductQuantizer, SplitFC, TAHQuant
from msjax import compress, wire
from msjax.split.sent import cut_bytes, other_bytes

TITLE = "Rivals in one harness: accuracy against bytes"
NONE = compress.Identity()
ARMS = {
    "none": (NONE, NONE),
    "MS": (compress.MaskEncoded(), NONE),
    "SP": (compress.TopK(), NONE),
    "EntropyMask 1.6 / 1.5": (compress.EntropyMask(bits=1.6), unbiased(1.5)),
    "EntropyMask 0.5 / 0.5": (compress.EntropyMask(bits=0.5, levels=5), unbiased(0.5)),
    "QU 3 / 3": (compress.Uniform(bits=3), compress.StochasticUniform(bits=3)),
    "Quantile 3 / 3": (compress.Quantile(bits=3), compress.Quantile(bits=3)),
    "e2m1 / e2m1": (compress.SmallFloat(), compress.SmallFloat()),
    "TAH-Quant 3–4 / 3–4": (TAHQuant(), TAHQuant()),
    "TAH-Quant 2–3 / 2–3": (TAHQuant(3, 2), TAHQuant(3, 2)),
    "SplitFC 0.7 / 1.6": (SplitFC(0.25, 2.0), SplitFC(1.0, 1.0)),
    "SplitFC 1.4 / 1.6": (SplitFC(0.5, 2.0), SplitFC(1.0, 1.0)),
    "C3-SL 4 / 4": (C3SL(4), C3SL(4)),
    "C3-SL 16 / 16": (C3SL(16), C3SL(16)),
    "FedLite 0.5": (ProductQuantizer(8, 16), NONE),
    "FedLite 2": (ProductQuantizer(2, 16), NONE),
}
"""Codecs up and down, named by about their bits up and down; C3-SL by the samples in a sum."""
AT_SMOKE = ("none", "SplitFC 0.7")
CODED = ", coded"
"""What the names of measurements end with."""


def runs(scale):
    wanted = {name: pair for name, pair in ARMS.items() if scale != "smoke" or name.startswith(AT_SMOKE)}
    if scale == "paper":
        return {}
    base = study.with_cut(study.base(scale), study.PLAIN_CUT)
    trained = {name: dataclasses.replace(base, codec=up, grad_codec=down) for name, (up, down) in wanted.items()}
    measured = {
        f"{name}{CODED}": study.Measured(cfg, f"{__spec__.name}:measure")
        for name, cfg in trained.items()
        if name != "none" and not cfg.codec.entropy_coded
    }
    return trained | measured


def measure(folder, cfg, scale):
    """Bits a value of one client's messages, as payloads and coded, up and down."""
    cut = cfg.model.cut
    maps = feature_maps.collect(str(folder), samples=cfg.batch_size, cuts=(cut,), **study.places(cfg))
    rows = []
    for way, codec, what in (("up", cfg.codec, "features"), ("down", cfg.grad_codec, "gradients")):
        like = maps[f"{cut}/{what}"]
        payload = codec.encode(jnp.asarray(like), jax.random.key(0) if codec.needs_key else None)
        message = wire.encode(payload, codec, like, compression="huffman")
        bits = {"payload_bits": codec.payload_bytes(like), "coded_bits": len(message)}
        rows.append({"way": way} | {name: 8 * value / like.size for name, value in bits.items()})
    return rows


def sent(made, measured):
    """(bytes over the cut, of everything) of a run, coded as was measured."""
    cut, traffic = cut_bytes(made["traffic"]), made["traffic"]
    if measured is not None:
        ratios = {row["way"]: min(row["coded_bits"] / row["payload_bits"], 1) for row in measured["rows"]}
        cut = traffic["uplink_feature_bytes"] * ratios["up"] + traffic["downlink_gradient_bytes"] * ratios["down"]
    return cut, cut + other_bytes(traffic)


def report(scale, records):
    rows = []
    for name in (name for name in ARMS if name in records):
        made, measured = records[name], records.get(f"{name}{CODED}")
        plain = "none" in records and name != "none"
        lost = records["none"]["test"]["top1_percent"] - made["test"]["top1_percent"] if plain else None
        cut, everything = sent(made, measured)
        before = 2 * made["uncompressed_feature_bytes"]
        coded = {row["way"]: f"{row['coded_bits']:.2f}" for row in measured["rows"]} if measured else {}
        rows.append(
            [
                name,
                f"{made['test']['top1_percent']:.2f}",
                "–" if lost is None else f"{lost:.2f}",
                f"{study.feature_bits(made):.2f}",
                " / ".join(coded.values()) or "–",
                f"{cut / 1e6:,.1f}",
                f"{everything / 1e6:,.1f}",
                f"{before / cut:.2f}×",
                f"{(before + other_bytes(made['traffic'])) / everything:.2f}×",
            ]
        )
    names = "codec up / down|test top-1, %|below “none”|bits a feature|coded, up / down|over the cut, MB"
    header = [*names.split("|"), "of everything, MB", "saved", "saved of everything"]
    text = f"{timing.table(header, rows)}\n\n![Accuracy against bytes](frontier.png)\n"
    return study.Page(text, {"frontier": plot(records)})


def plot(records):
    """Accuracy against the bytes of features and gradients, and of everything."""
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for color, name in enumerate(name for name in ARMS if name in records):
        made = records[name]
        for axes, nbytes in zip(panels, sent(made, records.get(f"{name}{CODED}")), strict=True):
            at = nbytes / 1e6, made["test"]["top1_percent"]
            axes.plot(*at, "os"[color // 10], color=f"C{color % 10}", label=name)
    panels[0].set(xlabel="features and gradients of the run, MB", ylabel="test top-1, %", xscale="log")
    panels[1].set(xlabel="everything that is sent, MB", xscale="log")
    if records:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

"""Trained through each codec: accuracy against the bytes that move, ours and others' beside each other.

    python -m experiments.frontier --data-dir DIR       # a TFDS directory; without it CIFAR-10 is downloaded

One cut, one seed. Features go up through a codec and gradients down through its companion, where its source has one:
C3-SL sends the same sums down, SplitFC quantizes the gradient of all columns (its source: of those that were kept),
TAH-Quant both alike; FedLite and top-k leave the gradient as it is. Bytes are those of payloads, of `EntropyMask`
those of messages. "Of everything" is with labels and with what keeps the clients' parts equal. How the others deviate
from their sources is said in `experiments/rivals`; nothing of them was tuned, and one seed tells no less than a point.
Untrained, at many more rates: `experiments.frontier_untrained`.
"""

import dataclasses
import sys

import matplotlib.figure

from benchmarks import timing
from experiments import driver, study
from experiments.both_directions import unbiased
from experiments.rivals import C3SL, ProductQuantizer, SplitFC, TAHQuant
from msjax import compress
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


def runs(scale):
    wanted = {name: pair for name, pair in ARMS.items() if scale != "smoke" or name.startswith(AT_SMOKE)}
    if scale == "paper":
        return {}
    base = study.with_cut(study.base(scale), study.PLAIN_CUT)
    return {name: dataclasses.replace(base, codec=up, grad_codec=down) for name, (up, down) in wanted.items()}


def report(scale, records):
    rows = []
    for name in (name for name in ARMS if name in records):
        made = records[name]
        cut, other = cut_bytes(made["traffic"]) / 1e6, other_bytes(made["traffic"]) / 1e6
        plain = "none" in records and name != "none"
        lost = records["none"]["test"]["top1_percent"] - made["test"]["top1_percent"] if plain else None
        factors = (study.saved(made, everything=everything) for everything in (False, True))
        rows.append(
            [
                name,
                f"{made['test']['top1_percent']:.2f}",
                "–" if lost is None else f"{lost:.2f}",
                f"{study.feature_bits(made):.2f}",
                f"{cut:,.1f}",
                f"{cut + other:,.1f}",
                *(f"{factor:.2f}×" for factor in factors),
            ]
        )
    names = "codec up / down|test top-1, %|below “none”|bits a feature|over the cut, MB|of everything, MB|saved"
    header = [*names.split("|"), "saved of everything"]
    text = f"{timing.table(header, rows)}\n\n![Accuracy against bytes over the cut](frontier.png)\n"
    return study.Page(text, {"frontier": plot(records)})


def plot(records):
    """Accuracy against the bytes of features and gradients."""
    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for color, name in enumerate(name for name in ARMS if name in records):
        made = records[name]
        at = cut_bytes(made["traffic"]) / 1e6, made["test"]["top1_percent"]
        axes.plot(*at, "os"[color // 10], color=f"C{color % 10}", label=name)
    axes.set(xlabel="features and gradients of the run, MB", ylabel="test top-1, %", xscale="log")
    if records:
        figure.legend(loc="outside right upper", fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

"""Features and gradients compressed: `EntropyMask` up and down, or up alone, and MS up, against no compression.

    python -m experiments.both_directions --data-dir DIR       # a TFDS directory; without it CIFAR-10 is downloaded

What crosses the cut in a step is the feature map up and its gradient down; the paper counts, and MS saves, the first
alone. "Of everything" is with labels and with what keeps the clients' parts equal (their gradients up, the mean down),
which grows with the client's part of the network.
"""

import dataclasses
import statistics
import sys

import matplotlib.figure

from benchmarks import timing
from experiments import driver, study
from msjax import compress
from msjax.split.sent import cut_bytes

TITLE = "Both directions: accuracy against the bytes that really move"
MS = compress.MaskEncoded()
FEATURES = compress.EntropyMask(error=0.07)  # that of MS on these features
NONE = compress.Identity()


def unbiased(bits):
    return compress.EntropyMask(bits=bits, signed=True, rounding="stochastic")


ARMS = {
    "none": (NONE, NONE),
    "MS up": (MS, NONE),
    "EntropyMask up": (FEATURES, NONE),
    # The same bits in all, more of them for the gradients or for the features.
    "EntropyMask 1.1 up 2.0 down": (FEATURES, unbiased(2.0)),
    "EntropyMask 1.6 up 1.5 down": (compress.EntropyMask(bits=1.6), unbiased(1.5)),
    "EntropyMask 2.0 up 1.1 down": (compress.EntropyMask(bits=2.0), unbiased(1.1)),
}

LOSING = "EntropyMask 1.1"  # lost more from the start: one seed


def runs(scale):
    wanted = arms(study.base(scale), study.cuts(scale), study.seeds(scale, lite=3))
    left_out = ("EntropyMask up", LOSING, "EntropyMask 1.6") if scale == "smoke" else ()
    return {
        name: cfg
        for name, cfg in wanted.items()
        if not name.startswith(left_out) and not (cfg.seed and name.startswith(LOSING))
    }


def arms(base, cuts, seeds):
    """`ARMS` of this network and schedule, at each cut."""
    found = {arm: dataclasses.replace(base, codec=up, grad_codec=down) for arm, (up, down) in ARMS.items()}
    return study.with_seeds(study.at_cuts(found, cuts), seeds)


def report(scale, records):
    groups = study.by_arm(records)
    plain = study.at_cut(groups, "none", study.PLAIN_CUT)
    rows = []
    for cut in study.CUTS:
        for arm in ARMS:
            if not (found := groups.get(f"{arm}, {cut}")):
                continue
            megabytes = statistics.mean(cut_bytes(r["traffic"]) for r in found) / 1e6
            factors = [statistics.mean(study.saved(r, everything=e) for r in found) for e in (False, True)]
            cells = [cut, arm, str(len(found)), study.top1(found), f"{megabytes:,.0f}"]
            below = study.mean_and_deviation(study.lost(plain, found))
            rows.append([*cells, *(f"{factor:.2f}×" for factor in factors), below])
    names = "cut/compressed/seeds/test top-1, %/features and gradients, MB/saved/saved of everything/below “none”"
    text = timing.table(names.split("/"), rows) + "\n\n![Accuracy against bytes](both_directions.png)\n"
    return study.Page(text, {"both_directions": plot(groups)})


def plot(groups):
    """A panel a cut: accuracy against bytes, with the standard deviation over seeds where there are several."""
    figure = matplotlib.figure.Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, len(study.CUTS), sharex=True, sharey=True)
    for axes, cut in zip(panels, study.CUTS, strict=True):
        any_at_cut = next((own[0] for arm in ARMS if (own := groups.get(f"{arm}, {cut}"))), None)
        for color, arm in enumerate(ARMS):
            found = study.at_cut(groups, arm, cut)
            if not found or any_at_cut is None:
                continue
            plain = arm == "none"
            sent = 2 * any_at_cut["uncompressed_feature_bytes"] if plain else cut_bytes(found[0]["traffic"])
            accuracy = [r["test"]["top1_percent"] for r in found]
            deviation = statistics.stdev(accuracy) if len(found) > 1 else None
            axes.errorbar(sent / 1e6, statistics.mean(accuracy), deviation, fmt="o", color=f"C{color}", label=arm)
            if plain:
                axes.axhline(statistics.mean(accuracy), color="C0", linewidth=0.5)
        axes.set(title=f"{cut} cut", xlabel="features and gradients of the run, MB", xscale="log")
    panels[0].set(ylabel="test top-1, %")
    drawn = {}
    for axes in panels:
        drawn |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

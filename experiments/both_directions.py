"""Features and gradients compressed: `EntropyMask` up and down, or up alone, and MS up, against no compression.

    python -m experiments.both_directions --data-dir DIR       # a TFDS directory; without it CIFAR-10 is downloaded

What moves in a step is the feature map up and its gradient down; the paper counts, and MS saves, the first alone.
"""

import dataclasses
import statistics
import sys

import matplotlib.figure

from experiments import study
from msjax import compress

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


def runs(scale):
    wanted = arms(study.base(scale), study.cuts(scale), study.seeds(scale))
    left_out = ("EntropyMask up", "EntropyMask 1.1", "EntropyMask 1.6") if scale == "smoke" else ()
    return {name: cfg for name, cfg in wanted.items() if not name.startswith(left_out)}


def arms(base, cuts, seeds):
    """`ARMS` of this network and schedule, at each cut."""
    found = {}
    for arm, (codec, grad_codec) in ARMS.items():
        # Without compression the cut changes nothing but the bytes.
        for cut in cuts if arm != "none" else ("medium",):
            found[f"{arm}, {cut}"] = study.with_cut(dataclasses.replace(base, codec=codec, grad_codec=grad_codec), cut)
    return study.with_seeds(found, seeds)


def moved(record):
    """Bytes of features and gradients of a whole run, all clients, as messages where they are entropy-coded."""
    traffic = record["traffic"]
    return traffic.get("coded_uplink_bytes", traffic["uplink_feature_bytes"]) + traffic.get(
        "coded_downlink_bytes", traffic["downlink_gradient_bytes"]
    )


def report(scale, records, figure="both_directions"):
    header = [
        "cut",
        "compressed",
        "seeds",
        "test top-1, %",
        "features and gradients, MB",
        "fewer bytes",
        "below “none”",
    ]
    rows = []
    plot = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = plot.subplots()
    groups = study.by_arm(records)
    plain = {r["config"]["seed"]: r["test"]["top1_percent"] for r in groups.get("none, medium", [])}
    for cut in study.CUTS:
        points = []
        for arm in ARMS:
            if not (found := groups.get(f"{arm}, {cut}")):
                continue
            accuracy = [r["test"]["top1_percent"] for r in found]
            megabytes = statistics.mean(moved(r) for r in found) / 1e6
            saved = statistics.mean(2 * r["uncompressed_feature_bytes"] / moved(r) for r in found)
            seeds = [r["config"]["seed"] for r in found]
            lost = [plain[seed] - top1 for seed, top1 in zip(seeds, accuracy, strict=True) if seed in plain]
            cells = [cut, arm, str(len(found)), study.mean_and_deviation(accuracy), f"{megabytes:,.0f}"]
            rows.append([*cells, f"{saved:.2f}×", study.mean_and_deviation(lost)])
            points.append((megabytes, statistics.mean(accuracy), arm))
        for megabytes, accuracy, arm in points:
            axes.annotate(arm, (megabytes, accuracy), (4, 4), textcoords="offset points", fontsize=7)
        if points:
            x, y, _ = zip(*points, strict=True)
            axes.plot(x, y, "o:", label=cut)
    axes.set(xscale="log", xlabel="features and gradients of the whole run, MB", ylabel="test top-1, %")
    study.legend([axes], title="cut")
    text = study.table(header, rows) + f"\n\n![Accuracy against bytes]({figure}.png)\n"
    return study.Page(text, {figure: plot})


if __name__ == "__main__":
    sys.exit(study.main(sys.modules[__name__]))

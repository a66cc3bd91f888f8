"""Mask width and sparsification ratio of MS: accuracy against bits (an open question of the paper).

    python -m experiments.mask_width --data-dir DIR

Is 2 bits at 99 % the best trade? Widths at the paper's ratio, ratios at the paper's width, at the medium cut.
"""

import dataclasses
import statistics
import sys

import matplotlib.figure

from benchmarks import timing
from experiments import driver, study
from msjax import compress

TITLE = "Mask width and ratio"
WIDTHS = (1, 2, 3, 4)
RATIOS = (0.9, 0.97, 0.99, 0.997, 0.999)
ARMS = {
    "none": compress.Identity(),
    **{f"{bits} bits": compress.MaskEncoded(bits=bits) for bits in WIDTHS},
    **{f"2 bits at {ratio:.1%}": compress.MaskEncoded(ratio=ratio) for ratio in RATIOS if ratio != 0.99},
}


def runs(scale):
    arms = ARMS if scale != "smoke" else {name: ARMS[name] for name in ("none", "1 bits")}
    base = study.with_cut(study.base(scale), "medium")
    arms = {name: dataclasses.replace(base, codec=codec) for name, codec in arms.items()}
    return study.with_seeds(arms, study.seeds(scale))


def report(scale, records):
    found = study.by_arm(records)
    rows = [[arm, f"{study.feature_bits(own[0]):.2f}", study.top1(own), str(len(own))] for arm, own in found.items()]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    lines = {
        "width, at 99 %": [f"{bits} bits" for bits in WIDTHS],
        "ratio, at 2 bits": [f"2 bits at {ratio:.1%}" if ratio != 0.99 else "2 bits" for ratio in RATIOS],
    }
    for name, arms in lines.items():
        points = [(study.feature_bits(found[arm][0]), _mean(found[arm])) for arm in arms if arm in found]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    if "none" in found:
        axes.axhline(_mean(found["none"]), color="k", linestyle="--", label="no compression")
    axes.set(xlabel="bits a value", ylabel="test top-1, %")
    study.legend([axes])
    text = f"{timing.table(['MS', 'bits a value', 'test top-1, %', 'seeds'], rows)}\n\n![Accuracy](mask_width.png)\n"
    return study.Page(text, {"mask_width": figure})


def _mean(records):
    return statistics.mean(record["test"]["top1_percent"] for record in records)


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

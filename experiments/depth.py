"""Very deep networks at equal cost: ResNets of 20 to 110 layers, deeper ones narrower (an open question of the paper).

    python -m experiments.depth --data-dir DIR

Multiplications are in proportion to depth and to the square of the width. At the medium cut, the end of the first stage
of three. A narrower network has fewer features there, so depth is not all that differs.
"""

import dataclasses
import sys

from benchmarks import timing
from experiments import driver, study
from msjax import compress
from msjax.config import ModelConfig

TITLE = "Depth"
DEPTHS = (20, 56, 110)
CODECS = {"none": compress.Identity(), "MS": compress.MaskEncoded()}


def runs(scale):
    base = study.base(scale)
    if scale == "lite":  # what 110 layers bear
        base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, learning_rate=0.1))
    # Four times as wide as published at the paper's scale for the shallowest; at lite scale four channels for the
    # deepest, the fewest for which convolutions are fast on a CPU.
    width = {"smoke": 0.125, "lite": 0.6, "paper": 4.0}[scale]
    depths, codecs = (DEPTHS, CODECS) if scale != "smoke" else (DEPTHS[:1], {"MS": CODECS["MS"]})
    arms = {}
    for depth in depths:
        model = ModelConfig(name=f"resnet{depth}", width=round(width * (depths[0] / depth) ** 0.5, 3))
        for name, codec in codecs.items():
            arms[f"{depth} layers, {name}"] = dataclasses.replace(base, model=model, codec=codec)
    return study.with_seeds(arms, study.seeds(scale))


def report(scale, records):
    found = study.by_arm(records)
    rows = []
    for depth in DEPTHS:
        own = [found.get(f"{depth} layers, {name}", []) for name in CODECS]
        if any(own):
            width = next(iter(filter(None, own)))[0]["config"]["model"]["width"]
            seeds = study.counts(own)
            rows.append([str(depth), f"{width:g}", *map(study.top1, own), seeds])
    header = ["layers", "width", *(f"{name}: test top-1, %" for name in CODECS), "seeds"]
    return study.Page(timing.table(header, rows) + "\n", {})


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

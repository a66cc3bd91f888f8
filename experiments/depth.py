"""Very deep networks at equal cost: ResNets of 20 to 110 layers, deeper ones narrower (an open question of the paper).

    python -m experiments.depth --data-dir DIR

Multiplications are in proportion to depth and to the square of the width. At the medium cut, the end of the first stage
of three. A narrower network has fewer features there; what that alone does, the shallowest shows when it is as narrow
as the deepest.
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


def networks(scale):
    """{name: network}"""
    # Four times as wide as published at the paper's scale for the shallowest; at lite scale four channels for the
    # deepest, the fewest for which convolutions are fast on a CPU.
    width = {"smoke": 0.125, "lite": 0.6, "paper": 4.0}[scale]
    widths = {depth: round(width * (DEPTHS[0] / depth) ** 0.5, 3) for depth in DEPTHS}
    found = {f"{depth} layers": ModelConfig(name=f"resnet{depth}", width=width) for depth, width in widths.items()}
    shallow, deep = DEPTHS[0], DEPTHS[-1]
    narrow = ModelConfig(name=f"resnet{shallow}", width=widths[deep])
    return found | {f"{shallow} layers as narrow as {deep}": narrow}


def runs(scale):
    base = study.base(scale)
    if scale == "lite":  # what 110 layers bear
        base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, learning_rate=0.1))
    found, codecs = networks(scale), CODECS
    if scale == "smoke":
        found, codecs = dict([*found.items()][:1]), {"MS": CODECS["MS"]}
    arms = {
        f"{network}, {name}": dataclasses.replace(base, model=model, codec=codec)
        for network, model in found.items()
        for name, codec in codecs.items()
    }
    return study.with_seeds(arms, study.seeds(scale))


def report(scale, records):
    found = study.by_arm(records)
    rows = []
    for network, model in networks(scale).items():
        own = [found.get(f"{network}, {name}", []) for name in CODECS]
        if any(own):
            rows.append([network, f"{model.width:g}", *map(study.top1, own), study.counts(own)])
    header = ["network", "width", *(f"{name}: test top-1, %" for name in CODECS), "seeds"]
    return study.Page(timing.table(header, rows) + "\n", {})


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

"""Every block boundary as the cut: where compression costs accuracy, and what a target in error does about it.

    python -m experiments.cut_sensitivity --data-dir DIR

MS spends 2.32 bits a value wherever the cut is. `EntropyMask` with a target in error spends what that cut needs, step
by step, with no parameter of its own for it; with a target in bits the same everywhere.
"""

import dataclasses
import statistics
import sys

from benchmarks import timing
from experiments import driver, study
from msjax import compress, models

TITLE = "Cut sensitivity"
CODECS = {
    "MS": compress.MaskEncoded(),
    "EntropyMask, error 0.2": compress.EntropyMask(error=0.2, levels=5),
    "EntropyMask, 0.5 bits": compress.EntropyMask(bits=0.5, levels=5),
}


def cuts(scale):
    model = study.base(scale).model
    shape = {"smoke": (8, 8, 1), "lite": (32, 32, 3), "paper": (32, 32, 3)}[scale]
    found = models.list_cuts(models.build(model.name, input_shape=shape, num_classes=10, width=model.width))
    return [str(cut.layer) for cut in found][: 1 if scale == "smoke" else None]


def runs(scale):
    codecs = {"none": compress.Identity()} | (CODECS if scale != "smoke" else {"MS": CODECS["MS"]})
    arms = {name: dataclasses.replace(study.base(scale), codec=codec) for name, codec in codecs.items()}
    return study.with_seeds(study.at_cuts(arms, cuts(scale)), study.seeds(scale, lite=1))


def report(scale, records):
    found = study.by_arm(records)
    rows = []
    for cut in cuts(scale):
        cells = []
        for name in CODECS:
            own = found.get(f"{name}, {cut}", [])
            cells.append(study.top1(own))
            cells.append(f"{statistics.mean(map(study.feature_bits, own)):.2f}" if own else "–")
        rows.append([cut, *cells])
    header = ["cut after layer", *(cell for name in CODECS for cell in (f"{name}: test top-1, %", "bits"))]
    seeds = study.counts(found.values())
    plain = study.top1(found.get("none, medium", []))
    return study.Page(f"No compression: {plain} %. Seeds: {seeds}.\n\n{timing.table(header, rows)}\n", {})


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

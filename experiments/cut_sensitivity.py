"""Every block boundary as the cut: where compression costs accuracy, and what a target in error does about it.

    python -m experiments.cut_sensitivity --data-dir DIR

MS spends 2.32 bits a value wherever the cut is. `EntropyMask` with a target in error spends what that cut needs, step
by step, with no parameter of its own for it; with a target in bits the same everywhere.
"""

import dataclasses
import statistics
import sys

from experiments import study
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
    base = dataclasses.replace(study.base(scale), codec=compress.Identity())
    arms = {"none, any": study.with_cut(base, "medium")}
    for name, codec in CODECS.items() if scale != "smoke" else list(CODECS.items())[:1]:
        for cut in cuts(scale):
            arms[f"{name}, {cut}"] = study.with_cut(dataclasses.replace(base, codec=codec), cut)
    return study.with_seeds(arms, study.seeds(scale, lite=1))


def report(scale, records):
    found = study.by_arm(records)
    rows = []
    for cut in cuts(scale):
        cells = []
        for name in CODECS:
            own = found.get(f"{name}, {cut}", [])
            cells.append(study.top1(own))
            cells.append(f"{statistics.mean(map(bits, own)):.2f}" if own else "–")
        rows.append([cut, *cells])
    header = ["cut after layer", *(cell for name in CODECS for cell in (f"{name}: test top-1, %", "bits"))]
    seeds = "/".join(sorted({str(len(own)) for own in found.values()}))
    plain = study.top1(found.get("none, any", []))
    return study.Page(f"No compression: {plain} %. Seeds: {seeds}.\n\n{study.table(header, rows)}\n", {})


def bits(record):
    """Bits a value of the features, as messages where they are entropy-coded."""
    traffic = record["traffic"]
    sent = traffic.get("coded_uplink_bytes", traffic["uplink_feature_bytes"])
    return 32 * sent / record["uncompressed_feature_bytes"]


if __name__ == "__main__":
    sys.exit(study.main(sys.modules[__name__]))

"""Every block boundary as the cut: where compression costs accuracy, and how many bits each cut needs.

    python -m experiments.cut_sensitivity --data-dir DIR

MS spends 2.32 bits a value wherever the cut is, `EntropyMask(bits=0.5)` 0.5. How sensitive a cut is can be measured
without training with it: the error of the gradients of both parts, relative to their norm, in a network trained
without compression, at several rates. The budget of a cut is the bits at which that error is the same at all cuts, one
bit a value on average over them: `EntropyMask(bits=…)` takes it as it is.
"""

import dataclasses
import sys

import numpy as np

from benchmarks import timing
from experiments import biased_gradients, driver, feature_maps, rate_distortion, study
from msjax import compress, models

TITLE = "Cut sensitivity"
CODECS = {
    "MS": compress.MaskEncoded(),
    "0.5 bits": compress.EntropyMask(bits=0.5, levels=5),
}
RATES = (compress.MaskEncoded(), *(compress.EntropyMask(bits=b, levels=15) for b in (0.25, 0.5, 1.0, 1.5, 2.0)))
MEAN_BITS = 1.0


def cuts(scale):
    model = study.base(scale).model
    shape = {"smoke": (8, 8, 1), "lite": (32, 32, 3), "paper": (32, 32, 3)}[scale]
    found = models.list_cuts(models.build(model.name, input_shape=shape, num_classes=10, width=model.width))
    return [cut.name or str(cut.layer) for cut in found][: 2 if scale == "smoke" else None]


def runs(scale):
    codecs = {"none": compress.Identity()} | (CODECS if scale != "smoke" else {"MS": CODECS["MS"]})
    arms = {name: dataclasses.replace(study.base(scale), codec=codec) for name, codec in codecs.items()}
    trained = study.with_seeds(study.at_cuts(arms, cuts(scale)), study.seeds(scale))
    return trained | study.measured(scale, f"{__spec__.name}:measure")


def measure(folder, cfg, scale):
    network = feature_maps.load(str(folder), **study.places(cfg))
    x, labels = network.batch(biased_gradients.SAMPLES)
    rows = []
    for cut in cuts(scale):
        exact = biased_gradients.Exact(*network.cuts(cut), x, labels, network.cfg.optim.label_smoothing)
        norms = [float(np.linalg.norm(g)) for g in exact.of_parties]
        for codec in RATES[:: 3 if scale == "smoke" else 1]:
            found = exact.compare(codec)
            parts = [found[f"{part}_error"] * norm for part, norm in zip(("server", "client"), norms, strict=True)]
            bits = rate_distortion.measure(np.asarray(exact.h), codec)["bits"]
            row = {"cut": cut, "codec": str(codec), "bits": bits, "error": float(np.hypot(*parts) / np.hypot(*norms))}
            rows.append(row | {"feature_error": found["features_error"]})
    return rows


def report(scale, records):
    measured, found = study.measurements(records), study.by_arm(study.trained(records))
    budgets, error = budget(measured, MEAN_BITS)
    rows = []
    for cut in cuts(scale):
        cells = [cut]
        for name in CODECS:
            own = found.get(f"{name}, {cut}", [])
            cells.append(f"{study.top1(own)} ({study.feature_bits(own[0]):.2f})" if own else "–")
        ms = [row["error"] for row in measured if row["cut"] == cut and row["codec"] == str(CODECS["MS"])]
        cells.append(study.mean_and_deviation(ms))
        cells.append(f"{budgets[cut]:.2f}" if cut in budgets else "–")
        rows.append(cells)
    header = ["cut", *(f"{name}: top-1, % (bits)" for name in CODECS), "gradients' error with MS", "budget, bits"]
    text = f"No compression: {study.top1(found.get('none, medium', []))} %. Seeds: {study.counts(found.values())}."
    if budgets:
        text += f" With the budgets the gradients' error is {error:.2f} at every cut."
    return study.Page(f"{text}\n\n{timing.table(header, rows)}\n", {})


def budget(measured, mean_bits):
    """({cut: bits}, error): the rates of `EntropyMask` at which the error is the same and their mean as wanted.

    The rate that gives an error is the mean of those of all seeds.
    """
    by_cut = study.grouped([row for row in measured if row["codec"].startswith("EntropyMask")], "cut")
    if not by_cut:
        return {}, None
    errors = [row["error"] for rows in by_cut.values() for row in rows]
    tried = np.geomspace(min(errors), max(errors), 200)

    def rate(rows, error):
        own = study.grouped(rows, "seed").values()
        return np.mean([rate_distortion.at(one, "error", error, "bits") for one in own])

    bits = np.array([[rate(rows, error) for error in tried] for rows in by_cut.values()])
    best = int(np.argmin(np.abs(bits.mean(0) - mean_bits)))
    return dict(zip(by_cut, bits[:, best].tolist(), strict=True)), float(tried[best])


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

"""Other activations than ReLU, so that features have signs (an open question of the paper).

    python -m experiments.activations --data-dir DIR

MS as the paper has it takes negative values for zeros; `signed=True` gives each code a sign bit, 3.32 bits in all.
QU has 3 bits, from the least value to the largest. At the medium cut; "before ReLU" cuts before its activation, which
the server then applies.
"""

import dataclasses
import sys

from benchmarks import timing
from experiments import driver, study
from msjax import compress

TITLE = "Activations"
BEFORE = "before ReLU"
ACTIVATIONS = ("relu", BEFORE, "leaky_relu", "gelu", "silu", "tanh")
CODECS = {
    "none": compress.Identity(),
    "MS": compress.MaskEncoded(),
    "MS, signed": compress.MaskEncoded(signed=True),
    "QU": compress.Uniform(bits=3),
    "EntropyMask, signed": compress.EntropyMask(error=0.07, signed=True),
}


def runs(scale):
    base = study.with_cut(study.base(scale), "medium")
    arms = {}
    for activation in ACTIVATIONS if scale != "smoke" else ("tanh",):
        for name, codec in CODECS.items():
            if scale == "smoke" and name != "MS, signed":
                continue
            if activation == BEFORE and name == "none":
                continue  # it is that of ReLU
            own = {"cut_before_activation": True} if activation == BEFORE else {"activation": activation}
            model = dataclasses.replace(base.model, **own)
            arms[f"{activation}, {name}"] = dataclasses.replace(base, model=model, codec=codec)
    return study.with_seeds(arms, study.seeds(scale, lite=1))


def report(scale, records):
    found = study.by_arm(records)
    rows = []
    for activation in ACTIVATIONS:
        own = [found.get(f"{activation}, {name}", []) for name in CODECS]
        if any(own):
            rows.append([activation, *map(study.top1, own), study.counts(own)])
    return study.Page(timing.table(["test top-1, %", *CODECS, "seeds"], rows) + "\n", {})


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

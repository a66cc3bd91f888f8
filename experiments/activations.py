"""Other activations than ReLU, so that features have signs (an open question of the paper).

    python -m experiments.activations --data-dir DIR

MS as the paper has it takes negative values for zeros; `signed=True` gives each code a sign bit, 3.32 bits in all. Both
decode to the same where no negative value reaches half a step, a sixth of the smallest kept value. At the medium cut;
"before ReLU" cuts before its activation, which the server then applies.
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
}


def codecs(activation):
    """Those that make sense of `CODECS`: without signs the signed MS is MS."""
    left_out = {"relu": ("MS, signed",), BEFORE: ("none",)}.get(activation, ())  # "none" is that of ReLU
    return {name: codec for name, codec in CODECS.items() if name not in left_out}


def runs(scale):
    base = study.with_cut(study.base(scale), "medium")
    arms = {}
    for activation in ACTIVATIONS if scale != "smoke" else ("tanh",):
        for name, codec in codecs(activation).items():
            if scale == "smoke" and name != "MS, signed":
                continue
            own = {"cut_before_activation": True} if activation == BEFORE else {"activation": activation}
            model = dataclasses.replace(base.model, **own)
            arms[f"{activation}, {name}"] = dataclasses.replace(base, model=model, codec=codec)
    return study.with_seeds(arms, study.seeds(scale))


def report(scale, records):
    found = study.by_arm(records)
    rows = []
    for activation in ACTIVATIONS:
        own = {name: found.get(f"{activation}, {name}", []) for name in CODECS}
        if any(own.values()):
            if activation == BEFORE:
                own["none"] = found.get("relu, none", [])
            cells = [f"{study.top1(r)} ({study.feature_bits(r[0]):.2f})" if r else "–" for r in own.values()]
            rows.append([activation, *cells, study.counts(r for r in own.values() if r)])
    return study.Page(timing.table(["test top-1, % (bits a value)", *CODECS, "seeds"], rows) + "\n", {})


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

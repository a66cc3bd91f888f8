"""As `everything`, with the preset `configs/cifar10_lite.py`: more epochs of a wider ResNet9.

python -m experiments.cifar10_lite --data-dir DIR       # half an hour a run on two CPU cores
"""

import dataclasses
import sys

from experiments import convergence, driver, everything, study

TITLE = "CIFAR-10 in half an hour: everything that is sent"
NONE, MS = "none", "MS, features alone"
SPARSE = {
    f"{name}, features alone": everything.arm(convergence.CODECS[name], everything.PLAIN) for name in ("SP", "RT")
}
LESS_AVERAGES, BOTH_WAYS = (f"averages {bits} bits, 2.4 bits both ways" for bits in ("1.5", "2"))
ARMS = everything.ARMS | SPARSE
# At the medium cut with three seeds, and all else with one.
SEEDED = dict.fromkeys((NONE, MS, "QU, features alone", BOTH_WAYS), (study.PLAIN_CUT,))
ONCE = {
    **dict.fromkeys((*SPARSE, everything.FORTY_TIMES), (study.PLAIN_CUT,)),
    MS: ("shallow", "deep"),
    BOTH_WAYS: ("shallow",),
    LESS_AVERAGES: ("deep",),
}


def runs(scale):
    if scale == "paper":
        return {}
    base = study.base(scale) if scale == "smoke" else study.preset("cifar10_lite")
    arms = {name: dataclasses.replace(base, **fields) for name, fields in ARMS.items()}
    seeded = {name: SEEDED[name] for name in (NONE, MS)} if scale == "smoke" else SEEDED
    found = everything.placed(arms, seeded, study.seeds(scale, lite=3))
    return found if scale == "smoke" else found | everything.placed(arms, ONCE, study.seeds(scale))


def report(scale, records):
    return everything.report(scale, records, arms=ARMS, figure="cifar10_lite")


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

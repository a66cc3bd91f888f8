"""As `everything`, with the preset `configs/cifar10_lite.py`: more epochs of a wider ResNet9.

Three seeds are asked of the medium cut and of `SEEDED`, one of all else; the table says how many there are.

python -m experiments.cifar10_lite --data-dir DIR       # half an hour a run on two CPU cores
"""

import dataclasses
import sys

from experiments import driver, everything, study

TITLE = "CIFAR-10 in half an hour: everything that is sent"
ARMS = (
    "none",
    "MS, features alone",
    "averages 1.5 bits, 2.4 bits both ways",
    "averages 2 bits, 2.4 bits both ways",
    "averages 2 bits, 1.6 bits both ways, gradient's noise 1",
)
SEEDED = ("none", "MS, features alone", "QU, features alone", "averages 2 bits, 2.4 bits both ways")


def runs(scale):
    if scale == "paper":
        return {}
    base = study.base(scale) if scale == "smoke" else study.preset("cifar10_lite")

    def some(names, cuts, seeds):
        arms = {name: dataclasses.replace(base, **everything.ARMS[name]) for name in names}
        return study.with_seeds(study.at_cuts(arms, cuts), seeds)

    all_cuts = some(ARMS[: 2 if scale == "smoke" else None], study.cuts(scale), study.seeds(scale))
    if scale == "smoke":
        return all_cuts
    return all_cuts | some(SEEDED, (study.PLAIN_CUT,), study.seeds(scale, lite=3))


def report(scale, records):
    return everything.report(scale, records, figure="cifar10_lite")


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

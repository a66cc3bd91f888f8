"""As `both_directions`, with the preset `configs/cifar10_lite.py`: more epochs of a wider ResNet9, and one seed.

python -m experiments.cifar10_lite --data-dir DIR       # half an hour a run on two CPU cores
"""

import sys

from experiments import both_directions, driver, study

TITLE = "CIFAR-10 in half an hour: both directions"


ARMS = ("none", "MS up", "EntropyMask 1.6")


def runs(scale):
    if scale != "lite":
        return both_directions.runs(scale)
    wanted = both_directions.arms(study.preset("cifar10_lite"), study.CUTS, seeds=[0])
    return {name: cfg for name, cfg in wanted.items() if name.startswith(ARMS)}


def report(scale, records):
    return both_directions.report(scale, records, figure="cifar10_lite")


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

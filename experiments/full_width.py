"""The paper's network at its width, VGG19 on CIFAR-10, for as long as a CPU bears: two epochs of the paper's 200.

    python -m experiments.full_width --data-dir DIR       # half an hour to an hour a run on two CPU cores

Ten clients of 25 samples a step, the medium cut, one seed. Optimizer and augmentation are those of
`configs/vgg19_cifar10.py`, with half its learning rate, as a step has a tenth of its samples, and half an epoch of
warm-up. Nothing was tuned. The minutes are of unlike machines. At the paper's scale this is `convergence`.
"""

import dataclasses
import sys

from benchmarks import timing
from experiments import convergence, driver, everything, study

TITLE = "VGG19 at full width, two epochs"
BOTH_WAYS = "averages 2 bits, 2.4 bits both ways"
EPOCHS = 2


def runs(scale):
    if scale == "paper":
        return {}
    base = study.base(scale)
    if scale == "lite":
        base = study.preset("vgg19_cifar10")
        optim = dataclasses.replace(base.optim, learning_rate=0.05, warmup_epochs=0.5)
        base = dataclasses.replace(base, optim=optim, clients=10, batch_size=25, epochs=EPOCHS)
    arms = {name: dataclasses.replace(base, codec=codec) for name, codec in convergence.CODECS.items()}
    arms[BOTH_WAYS] = dataclasses.replace(base, **everything.ARMS[BOTH_WAYS])
    if scale == "smoke":
        arms = {name: arms[name] for name in ("none", "MS")}
    return study.with_seeds(study.at_cuts(arms, ("medium",)), study.seeds(scale))


def report(scale, records):
    rows = []
    for name, one in records.items():
        by_epoch = [f"{epoch['train']['loss']:.3f}, {epoch['test']['top1_percent']:.2f}" for epoch in one["history"]]
        rows.append(
            [name.partition(", medium")[0], *by_epoch, f"{study.saved(one):.2f}×", f"{one['wall_seconds'] / 60:.0f}"]
        )
    epochs = max((len(one["history"]) for one in records.values()), default=0)
    header = ["compressed", *(f"epoch {n + 1}: loss, test top-1 in %" for n in range(epochs))]
    header += ["saved of features and gradients", "minutes"]
    return study.Page(timing.table(header, rows) + "\n", {})


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

"""What has to be sent until the accuracy of training without compression is reached (the paper's Table 1).

    python -m experiments.traffic --data-dir DIR        # the runs of experiments.convergence and both_directions

Each epoch up to the first that reaches the target counts, against the uncompressed run with the same target and seed;
INF is a target never reached. The paper counts features on their way up, of training and of test samples. What really
moves is counted, too: features and gradients both ways, and everything. Of entropy-coded codecs the messages count.

A short run reaches a high target in its last epoch or never: the factor is then the codec's own. Speed of convergence
shows at the low targets.
"""

import statistics
import sys
from typing import NamedTuple

from benchmarks import timing
from experiments import both_directions, convergence, driver, study
from msjax.split.sent import cut_bytes, feature_bytes, other_bytes

TITLE = "Traffic to baseline accuracy (Table 1)"
MARGINS = (0.0, 1.0, 3.0, 10.0)  # points below the last epoch's accuracy without compression
PUBLISHED = {  # at the accuracy of the baseline itself
    "VGG19, CIFAR-10": {
        "QU": ("INF", "9.92", "10.37"),
        "SP": ("INF", "13.56", "13.56"),
        "MS": ("13.11", "13.56", "13.63"),
        "RT": ("INF", "13.71", "13.71"),
    },
    "ResNet18, CIFAR-100": {
        "QU": ("INF", "INF", "INF"),
        "SP": ("INF", "INF", "INF"),
        "MS": ("12.53", "13.50", "12.29"),
        "RT": ("INF", "INF", "INF"),
    },
    "ResNet34, ImageNet": {
        "QU": ("INF", "INF", "INF"),
        "SP": ("INF", "INF", "INF"),
        "MS": ("INF", "13.20", "12.32"),
        "RT": ("INF", "INF", "INF"),
    },
}
ENTROPY = tuple(arm for arm in both_directions.ARMS if arm.startswith("EntropyMask"))
ARMS = (*convergence.CODECS, *ENTROPY)


def runs(scale):
    found = convergence.runs(scale)
    if scale != "paper":
        found |= {name: cfg for name, cfg in both_directions.runs(scale).items() if name.startswith(ENTROPY)}
    return found


def report(scale, records):
    lines = []
    for setting in convergence.settings(scale):
        groups = {
            arm: {record["config"]["seed"]: record for record in found}
            for arm, found in convergence.groups_of(setting, records, ARMS).items()
        }
        if not any(groups.values()):
            continue
        if setting:
            lines += [f"### {setting}", ""]
        for way, title in WAYS.items():
            lines += [f"{title}:", "", table(groups, PUBLISHED.get(setting, {}) if way == "paper" else {}, way), ""]
    return study.Page("\n".join(lines), {})


def table(groups, published, way):
    """One row a codec and cut; of each target what was saved, counted in this way, a field of `Saving`."""
    header = ["codec", "cut", "seeds", *(f"baseline − {margin:g}" if margin else "baseline" for margin in MARGINS)]
    rows = []
    for codec in ARMS:
        for n, cut in enumerate(study.CUTS):
            plain = groups.get(("none", cut), {})
            seeds = [seed for seed in groups.get((codec, cut), {}) if seed in plain]
            if codec == "none" or not seeds:
                continue
            saved = [[saving(groups[codec, cut][seed], plain[seed], margin) for seed in seeds] for margin in MARGINS]
            cells = [_mean([getattr(one, way) for one in of_seeds]) for of_seeds in saved]
            rows.append([codec, cut, str(len(seeds)), *cells, *([published[codec][n]] if published else [])])
    return timing.table([*header, *(["published"] if published else [])], rows)


class Saving(NamedTuple):
    """By which factor less was sent to reach a target; None where it never was."""

    paper: float | None
    cut: float | None
    everything: float | None


WAYS = {
    "paper": "Counted as in the paper, features up alone",
    "cut": "Features and gradients, both ways",
    "everything": "Everything, with labels and what keeps the clients equal",
}


def saving(record, plain, margin):
    target = plain["test"]["top1_percent"] - margin
    epoch, plain_epoch = first_to_reach(record, target), first_to_reach(plain, target)
    if epoch is None:
        return Saving(None, None, None)
    # Without compression the bytes follow from the number of samples, at this record's own cut.
    epochs = len(record["history"])
    uncompressed = record["uncompressed_feature_bytes"] / epochs * plain_epoch["epoch"]
    features, crossed = feature_bytes(epoch["traffic"]), cut_bytes(epoch["traffic"])
    beside = other_bytes(record["traffic"]) / epochs
    return Saving(
        paper=uncompressed / features,  # test samples are as many more on both sides
        cut=2 * uncompressed / crossed,
        everything=(2 * uncompressed + beside * plain_epoch["epoch"]) / (crossed + beside * epoch["epoch"]),
    )


def first_to_reach(record, target):
    return next((epoch for epoch in record["history"] if epoch["test"]["top1_percent"] >= target), None)


def _mean(factors):
    if None in factors:
        reached = sum(factor is not None for factor in factors)
        return "INF" if not reached else f"INF ({reached} of {len(factors)} reach it)"
    return f"{statistics.mean(factors):.2f}×"


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

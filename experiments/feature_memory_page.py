"""The page of `feature_memory`: its table and its picture."""

import statistics

import matplotlib.figure
import numpy as np

from benchmarks import timing
from experiments import study
from experiments.feature_memory_training import Arm, arm_of
from msjax.compress import EntropyMask, Identity, MaskEncoded

TESTS = ("test", "test_through_codec")


def by_arm(rows: list[dict]) -> dict[tuple[str, Arm], list[dict]]:
    """Returns the rows of all seeds by setting and arm."""
    found = {}
    for row in rows:
        found.setdefault((row["setting"], arm_of(row)), []).append(row)
    return found


def total_bits(rows: list[dict]) -> float:
    """Returns the real bits a value, over all epochs and seeds."""
    return statistics.mean(epoch["bits"] for row in rows for epoch in row["history"])


def _of_epoch(rows, name, epoch):
    return statistics.mean(row["history"][epoch][name] for row in rows)


def bits_alone(rows: list[dict], row: dict) -> float | None:
    """Returns the bits that `EntropyMask` alone would need for the training loss of a row, between those measured.

    Of the same setting and seed; None where the loss is beyond them.
    """
    points = {}
    for other in rows:
        arm = arm_of(other)
        same = (other["setting"], other["seed"]) == (row["setting"], row["seed"]) and not other["diverged"]
        if same and isinstance(arm.codec, EntropyMask) and not arm.remembers:
            points[other["history"][-1]["train_loss"]] = np.log(total_bits([other]))
    loss, losses = row["history"][-1]["train_loss"], sorted(points)
    if len(losses) < 2 or not losses[0] <= loss <= losses[-1]:
        return None
    return float(np.exp(np.interp(loss, losses, [points[one] for one in losses])))


def table(rows: list[dict]) -> str:
    """Returns all that was measured, of each setting, as Markdown."""
    lines = []
    for (setting, arm), own in by_arm(rows).items():
        ended = [row for row in own if not row["diverged"]]
        if not ended:
            epochs = ", ".join(str(len(row["history"]) + 1) for row in own)
            lines.append([setting, str(arm), *["–"] * 5, f"diverged in epoch {epochs}", *["–"] * 2, str(len(own))])
            continue
        bits, errors, changes = (
            " → ".join(f"{_of_epoch(ended, name, epoch):.{digits}f}" for epoch in epochs)
            for name, digits, epochs in (("bits", 2, (0, 1, -1)), ("error", 3, (0, 1, -1)), ("change", 3, (1, -1)))
        )
        needed = [bits_alone(rows, row) for row in ended if arm.remembers]
        alone = "–" if not needed or None in needed else f"{statistics.mean(needed):.3f}"
        cells = [setting, str(arm), f"{total_bits(ended):.3f}", alone, bits, errors, changes if arm.remembers else "–"]
        cells.append(study.mean_and_deviation([row["history"][-1]["train_loss"] for row in ended], 4))
        cells += [study.mean_and_deviation([row[t]["top1_percent"] for row in ended]) for t in TESTS]
        lines.append([*cells, f"{len(ended)}" if ended == own else f"{len(ended)} of {len(own)}"])
    header = ["setting", "codec", "bits a value", "EntropyMask alone, for this loss", "first → second → last epoch"]
    return timing.table(
        [*header, "error", "change, second → last", "training loss", "test top-1, %", "through the codec", "seeds"],
        lines,
    )


KINDS = {
    "EntropyMask": ("C0o--", lambda arm: isinstance(arm.codec, EntropyMask) and not arm.remembers),
    "EntropyMask, memory": ("C0s-", lambda arm: _is_remembered(arm) and not arm.first and not arm.threshold),
    "… with a finer first epoch": ("C2^", lambda arm: arm.first is not None and not arm.all_gradients),
    "… and all gradients": ("C4v", lambda arm: arm.all_gradients),
    "… with a threshold": ("C3s-", lambda arm: arm.threshold > 0),
    "MS": ("C1o--", lambda arm: isinstance(arm.codec, MaskEncoded) and not arm.remembers),
    "MS, memory": ("C1s-", lambda arm: isinstance(arm.codec, MaskEncoded) and arm.remembers),
}
"""How each kind of arm is drawn, and which arms are of it."""


def _is_remembered(arm):
    return isinstance(arm.codec, EntropyMask) and arm.remembers


def plot(rows: list[dict]) -> matplotlib.figure.Figure:
    """Each setting: training loss of the last epoch, and the features' error in it, against the bits of all epochs."""
    found, names = by_arm(rows), list(dict.fromkeys(row["setting"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(names), 6.5), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for column, setting in enumerate(names):
        own = {arm: same for (of, arm), same in found.items() if of == setting and not any(r["diverged"] for r in same)}
        for line, name in enumerate(("train_loss", "error")):
            axes = panels[line, column]
            for kind, (style, belongs) in KINDS.items():
                points = sorted((total_bits(r), _of_epoch(r, name, -1)) for arm, r in own.items() if belongs(arm))
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=kind, markersize=4)
            if line == 0 and (plain := own.get(Arm(Identity(), True))):
                axes.axhline(_of_epoch(plain, name, -1), color="k", linewidth=0.8, label="none")
        panels[0, column].set_title(setting)
        panels[0, column].set_xscale("log", base=2)
        panels[1, column].set(xlabel="real bits a value, of all epochs", yscale="log")
    panels[0, 0].set(ylabel="training loss of the last epoch, nats")
    panels[1, 0].set(ylabel="error of the features, last epoch")
    study.legend(figure.axes, fontsize="x-small")
    return figure

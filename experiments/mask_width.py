"""Mask width and sparsification ratio of MS: accuracy against bits (an open question of the paper).

    python -m experiments.mask_width --data-dir DIR

Is 2 bits at 99 % the best trade? Widths at the paper's ratio, ratios at the paper's width, at the medium cut; widths
also on a table and on texts, where features have signs and MS a sign bit more. One bit marks the kept values alone:
that is SP, at MS's bits with 95.875 %.
"""

import dataclasses
import statistics
import sys

import matplotlib.figure

from benchmarks import timing
from experiments import driver, not_images, study
from msjax import compress

TITLE = "Mask width and ratio"
RATIOS = (0.9, 0.99, 0.999)


def widths(*, signed):
    return {f"{bits} bits": compress.MaskEncoded(bits=bits, signed=signed) for bits in (1, 2, 3, 4)}


def settings(scale):
    base, none = study.base(scale), {"none": compress.Identity()}
    if scale == "smoke":
        return {"": not_images.Setting(base, none | {"1 bits": compress.MaskEncoded(bits=1)})}
    ratios = {f"2 bits at {ratio:.1%}": compress.MaskEncoded(ratio=ratio) for ratio in RATIOS if ratio != 0.99}
    sp = {"1 bit at 95.9% (SP)": compress.TopK(ratio=0.95875)}
    found = {"": not_images.Setting(base, none | widths(signed=False) | sp | ratios)}
    for name, (other, codecs, seeds) in not_images.settings(scale).items():
        found[name] = not_images.Setting(other, none | widths(signed=codecs["MS"].signed), seeds)
    return found


def runs(scale):
    found = {}
    for setting, (base, codecs, seeds) in settings(scale).items():
        at_medium = study.with_cut(base, "medium")
        arms = {
            study.label(setting, name): dataclasses.replace(at_medium, codec=codec) for name, codec in codecs.items()
        }
        found |= study.with_seeds(arms, study.seeds(scale, lite=seeds))
    return found


def report(scale, records):
    found = study.by_arm(records)
    labels = {setting: [study.label(setting, name) for name in one.codecs] for setting, one in settings(scale).items()}
    shown = {setting: one for setting, one in settings(scale).items() if found.keys() & set(labels[setting])}
    lines = []
    figure = matplotlib.figure.Figure(figsize=(5.5 * len(shown), 4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (setting, (_, codecs, _)) in zip(panels, shown.items(), strict=True):
        own = {name: found[label] for name in codecs if (label := study.label(setting, name)) in found}
        rows = [[n, f"{study.feature_bits(r[0]):.2f}", study.top1(r), str(len(r))] for n, r in own.items()]
        lines += [f"### {setting}", ""] if setting else []
        lines += [timing.table(["MS", "bits a value", "test top-1, %", "seeds"], rows), ""]
        _draw(axes, own)
        axes.set(title=setting, xlabel="bits a value", ylabel="test top-1, %")
    return study.Page("\n".join([*lines, "![Accuracy](mask_width.png)", ""]), {"mask_width": figure})


def _draw(axes, found):
    """Accuracy against bits: a line over the widths, one over the ratios."""
    by_ratio = [f"2 bits at {ratio:.1%}" if ratio != 0.99 else "2 bits" for ratio in RATIOS]
    lines = {"width, at 99 %": list(widths(signed=False)), "ratio, at 2 bits": by_ratio}
    lines["1 bit, at 95.9 %"] = ["1 bit at 95.9% (SP)"]
    for name, arms in lines.items():
        points = [(study.feature_bits(found[arm][0]), _mean(found[arm])) for arm in arms if arm in found]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    if "none" in found:
        axes.axhline(_mean(found["none"]), color="k", linestyle="--", label="no compression")
    study.legend([axes])


def _mean(records):
    return statistics.mean(record["test"]["top1_percent"] for record in records)


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

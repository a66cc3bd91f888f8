"""Training with each codec of the paper, epoch by epoch (its Figure 3): loss, and accuracy on test data.

    python -m experiments.convergence --data-dir DIR

Codecs have the paper's settings: SP and RT at 95.875 %, MS with 2 bits at 99 %, all 2.32 bits a value; QU has 3.
"Kept" sends and uses the gradient of kept features alone (`grad_kept_only`), as RandTopk's authors do. These arms were
added after `experiments.language` had shown that training with a sparsifier can fail by the gradient of what it drops.
"""

import dataclasses
import statistics
import sys
from typing import NamedTuple

import matplotlib.figure

from benchmarks import timing
from experiments import driver, study
from msjax import compress, config

TITLE = "Convergence and generalization (Figure 3)"
CODECS = {
    "none": compress.Identity(),
    "MS": compress.MaskEncoded(),
    "QU": compress.Uniform(bits=3),
    "SP": compress.TopK(ratio=0.95875),
    "RT": compress.RandTopK(ratio=0.95875),
}
CLOSE = ("none", "MS", "QU")
"""About a point apart or less, so that one seed does not tell which is better."""
KEPT = {f"{name}, kept": CODECS[name] for name in ("SP", "RT")}


class Setting(NamedTuple):
    """A network on a data set, and the final accuracies that are published of it, in percent, read off Figure 3."""

    base: config.Config
    published: dict[str, str]
    cuts: tuple[str, ...] = study.CUTS


def settings(scale):
    """At lite scale the first has all three cuts, and three seeds at the medium one and of what is close.

    The others have the medium cut, once.
    """
    base = study.base(scale)
    if scale == "smoke":
        return {"": Setting(base, {}, study.cuts(scale))}
    if scale == "lite":
        # For ImageNet, and for a set of many classes: 100 images of each of 200, made as small as those of CIFAR.
        tiny = config.DataConfig(name="tiny_imagenet", image_size=32)
        narrow = dataclasses.replace(base.model, name="resnet18", width=0.125)
        return {
            "": Setting(base, {}),
            "ResNet9, Tiny ImageNet at 32²": Setting(dataclasses.replace(base, data=tiny, epochs=8), {}, ("medium",)),
            "ResNet18, CIFAR-10": Setting(dataclasses.replace(base, model=narrow), {}, ("medium",)),
        }
    presets = {
        "VGG19, CIFAR-10": ("vgg19_cifar10", ("93.8", "93.3–93.7", "89–93", "91–93.5", "–")),
        "ResNet18, CIFAR-100": ("resnet18_cifar100", ("77.8", "77.1–77.7", "62–76.3", "75.8–76.2", "74.4–75.5")),
        "ResNet34, ImageNet": ("resnet34_imagenet", ("73.1", "72.5–73.1", "66–70", "69.0–71.2", "71.4")),
    }
    return {
        name: Setting(study.preset(file), dict(zip(CODECS, published, strict=True)))
        for name, (file, published) in presets.items()
    }


def arms_of(scale, setting, base):
    """{name: config} of what is trained in a setting, without its cuts."""
    codecs = CODECS if scale != "smoke" else {name: CODECS[name] for name in ("none", "MS")}
    arms = {name: dataclasses.replace(base, codec=codec) for name, codec in codecs.items()}
    if scale == "lite" and not setting:
        arms |= {name: dataclasses.replace(base, codec=codec, grad_kept_only=True) for name, codec in KEPT.items()}
    return {study.label(setting, name): arm for name, arm in arms.items()}


def runs(scale):
    once, seeded = {}, {}
    for setting, (base, _, cuts) in settings(scale).items():
        arms = arms_of(scale, setting, base)
        once |= study.at_cuts(arms, cuts, study.with_published_cut if scale == "paper" else study.with_cut)
        if not setting:
            seeded |= study.at_cuts({name: arm for name, arm in arms.items() if name in CLOSE}, cuts)
            if scale == "lite":
                seeded |= study.at_cuts(arms, ("medium",))
    return study.with_seeds(once, study.seeds(scale)) | study.with_seeds(seeded, study.seeds(scale, lite=3))


def groups_of(setting, records, arms=(*CODECS, *KEPT)):
    """{(codec, cut): records of all seeds} of one setting; without compression, the same at all cuts."""
    groups = study.by_arm(records)
    found = {(arm, cut): study.at_cut(groups, study.label(setting, arm), cut) for arm in arms for cut in study.CUTS}
    return {at: records for at, records in found.items() if records}


def report(scale, records):
    lines, figures = [], {}
    for number, (setting, (_, published, cuts)) in enumerate(settings(scale).items()):
        groups = groups_of(setting, records)
        if not groups:
            continue
        if setting:
            lines += [f"### {setting}", ""]
        figure = f"convergence{number or ''}"
        figures[figure] = plot(groups, cuts)
        lines += [table(groups, published, cuts), "", f"![Loss and accuracy by epoch]({figure}.png)", ""]
    return study.Page("\n".join(lines), figures)


def table(groups, published, cuts):
    """Final test accuracy: one row a codec, one column a cut."""
    header = ["codec", *cuts, "seeds", *(["published, about"] if published else [])]
    rows = []
    for codec in (*CODECS, *KEPT):
        found = [groups.get((codec, cut), []) for cut in cuts]
        if codec in KEPT and not any(found):
            continue
        cells = [codec, *map(study.top1, found), study.counts(found)]
        rows.append([*cells, *([published.get(codec, "–")] if published else [])])
    return timing.table(header, rows)


def plot(groups, cuts):
    """A panel a cut: accuracy above, training loss below; the mean over seeds."""
    figure = matplotlib.figure.Figure(figsize=(2 + 3 * len(cuts), 6), layout="constrained")
    axes = figure.subplots(2, len(cuts), sharex=True, sharey="row", squeeze=False)
    for column, cut in enumerate(cuts):
        for codec in (*CODECS, *KEPT):
            found = groups.get((codec, cut), [])
            if not found:
                continue
            epochs = [epoch["epoch"] for epoch in found[0]["history"]]
            for row, value in enumerate((lambda e: e["test"]["top1_percent"], lambda e: e["train"]["loss"])):
                curves = [[value(epoch) for epoch in record["history"]] for record in found]
                mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
                axes[row, column].plot(epochs, mean, ".-" if codec != "none" else "k.--", label=codec)
        axes[0, column].set(title=f"{cut} cut")
        axes[1, column].set(xlabel="epoch")
    axes[0, 0].set(ylabel="test top-1, %")
    axes[1, 0].set(ylabel="training loss, nats")
    study.legend(figure.axes, fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

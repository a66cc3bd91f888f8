"""A published network, fine-tuned through the cut: does training with a codec win back what the codec costs?

    python -m experiments.fine_tuning --data-dir DIR --weights DIR      # seven minutes a run on two CPU cores

ResNet20 starts from the published weights that `published_cuts` cuts, on CIFAR-10's original pixels: ten clients of 25,
two epochs of SGD with momentum 0.9, weight decay 1e-4 and a cosine from 0.01 to 0. That is the middle one of the three
rates that the weights were trained with; nothing was tuned. "Untrained" is what `published_cuts` found with the same
codec at the same cut; test features go through the codec, and at test RT is SP.
"""

import dataclasses
import json
import sys

import matplotlib.figure

from benchmarks import timing
from experiments import both_directions, driver, published_cuts, study
from experiments.published_weights import MEAN, STD
from msjax import compress, config

TITLE = "Fine-tuned through the cut"
CUTS = {"medium": "stage1_block3", "deep": "stage2_block3", "19": "stage3_block3"}
"""Behind each stage: as the config says it, and the block."""
NONE = compress.Identity()
CODECS = {
    "none": (NONE, NONE),
    "MS": (compress.MaskEncoded(), NONE),
    "QU": (compress.Uniform(bits=3), NONE),
    "SP": (compress.TopK(), NONE),
    "RT": (compress.RandTopK(), NONE),
    "EntropyMask": (compress.EntropyMask(bits=2.32, levels=31), NONE),
    "EntropyMask 1.6 up 1.5 down": both_directions.ARMS["EntropyMask 1.6 up 1.5 down"],
}


def base(scale):
    """The published network; at smoke scale any network."""
    if scale == "smoke":
        return study.base(scale)
    return config.Config(
        model=config.ModelConfig(
            "resnet20", shortcut="zero_padding", running_variance="unbiased", weights="resnet20.safetensors"
        ),
        data=config.DataConfig("cifar10", mean=MEAN, std=STD),
        optim=config.OptimConfig(learning_rate=0.01, weight_decay=1e-4),
        clients=10,
        batch_size=25,
        epochs=2,
    )


def runs(scale):
    if scale == "paper":
        return {}
    arms = {arm: dataclasses.replace(base(scale), codec=up, grad_codec=down) for arm, (up, down) in CODECS.items()}
    if scale == "smoke":
        arms = {arm: arms[arm] for arm in ("none", "MS")}
    return study.with_seeds(
        study.at_cuts(arms, CUTS if scale == "lite" else study.cuts(scale)), study.seeds(scale, lite=3)
    )


def untrained():
    """{(block, codec as text): test accuracy in percent} of ResNet20, as `published_cuts` has recorded it."""
    file = study.RESULTS / "published_cuts.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = published_cuts.by_images([row for row in rows if row["model"] == "resnet20"])
    return {(row["block"], row["codec"]): row["top1_percent"] for row in rows}


def report(scale, records):
    # At smoke scale another network is trained.
    groups, before, rows = study.by_arm(records), untrained() if scale == "lite" else {}, []
    for cut, block in CUTS.items():
        for arm, (codec, _) in CODECS.items():
            if not (found := study.at_cut(groups, arm, cut)):
                continue
            plain = before.get((block, str(codec.at_inference())))
            first, last = ([r["history"][at]["test"]["top1_percent"] for r in found] for at in (0, -1))
            cells = [f"{block}", arm, f"{study.feature_bits(found[0]):.2f}", "–" if plain is None else f"{plain:.2f}"]
            rows.append([*cells, study.mean_and_deviation(first), study.mean_and_deviation(last), str(len(found))])
    header = ["behind", "codec", "bits up", "untrained", "after one epoch", "after two", "seeds"]
    text = timing.table(header, rows) + "\n\n![Accuracy before and after](fine_tuning.png)\n"
    return study.Page(text, {"fine_tuning": plot(groups, before)})


def plot(groups, before):
    """A panel a cut: each codec's accuracy untrained and after each epoch, of the mean over seeds."""
    figure = matplotlib.figure.Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (cut, block) in zip(figure.subplots(1, len(CUTS), sharey=True), CUTS.items(), strict=True):
        for arm, (codec, _) in CODECS.items():
            found = study.at_cut(groups, arm, cut)
            if not found:
                continue
            curves = zip(*([e["test"]["top1_percent"] for e in r["history"]] for r in found), strict=True)
            means = [sum(values) / len(values) for values in curves]
            plain = before.get((block, str(codec.at_inference())))
            points = list(enumerate(means, 1)) if plain is None else list(enumerate([plain, *means]))
            axes.plot(*zip(*points, strict=True), "k.--" if arm == "none" else ".-", label=arm)
        axes.set(title=f"behind {block}", xlabel="epochs of fine-tuning", xticks=range(3))
    figure.axes[0].set(ylabel="test top-1, %")
    study.legend(figure.axes, fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

"""Everything that is sent: features and gradients as in `both_directions`, and what keeps the clients equal, too.

    python -m experiments.everything --data-dir DIR       # six minutes a run on two CPU cores

In the paper's mode each client sends the gradients of its part in every step and gets their mean. Here these go through
`EntropyMask`, too, both ways, with error feedback at each sender (`update_codec`). "Saved of everything" is with
labels. The cut has 1.6 bits up and 1.5 down, unless a row says otherwise; gradients also as many bits as noise of so
much of their energy takes, and "kept" ones are sent only where the features were kept (`grad_kept_only`). Averages have
as many bits as a row says. "Bits both ways" are one budget of real bits for features and gradients (`cut_bits`), with
kept gradients unless a row says "all gradients", and with noise of 0.3 unless it says another number. These runs alone
are of since the wire codes bytes in classes by their neighbours, and all others would send fewer bytes now. These
alone, too, have a codec of their own for the statistics of batch normalization, which in the others went through that
of the averages, with error feedback. In SplitFed the clients average the changes of their parts every ten steps.
"""

import dataclasses
import statistics
import sys

import matplotlib.figure

from benchmarks import timing
from experiments import both_directions, driver, study
from msjax import compress, config

TITLE = "Everything that is sent: averages compressed, too"
UP, DOWN = both_directions.ARMS["EntropyMask 1.6 up 1.5 down"]
PLAIN = compress.Identity()


def coded(bits, levels=15):
    """The codec of averages: signed, and rounded to the nearest, as its error is made good later."""
    return compress.EntropyMask(bits=bits, levels=levels, signed=True)


def noisy(error):
    """The codec of gradients whose variance is this part of their energy, instead of a number of bits."""
    return compress.EntropyMask(error=error, levels=7, signed=True, rounding="stochastic")


def arm(codec=UP, grad_codec=DOWN, update_codec=PLAIN, **others):
    """The fields of a config that say what is compressed, and how."""
    return {"codec": codec, "grad_codec": grad_codec, "update_codec": update_codec, **others}


def low(bits, averages, **options):
    """Features at a low rate, and the gradient of what was kept of them with noise of 0.3 of its energy."""
    return arm(compress.EntropyMask(bits=bits, **options), noisy(0.3), coded(averages), grad_kept_only=True)


def both_ways(bits, averages, *, kept=True, error=0.3):
    """One budget for features and gradients, which get noise of so much of their energy and at most half of it."""
    up = compress.EntropyMask(bits=bits, keep_zeros=True)
    return arm(up, noisy(error), coded(averages), grad_kept_only=kept, cut_bits=bits)


FORTY_TIMES = "averages 2 bits, 1.6 bits both ways, gradient's noise 1"
"""The arm that moves 40 times fewer bytes over the cut."""
ARMS = {
    "none": arm(PLAIN, PLAIN),
    "MS, features alone": arm(compress.MaskEncoded(), PLAIN),
    "QU, features alone": arm(compress.Uniform(bits=3), PLAIN),
    "the cut alone": arm(),
    "averages 1 bit, gradient's noise 0.3": arm(UP, noisy(0.3), coded(1.0)),
    "averages 1 bit, kept gradient's noise 0.3": low(1.6, 1.0),
    "averages 1 bit, 1.3 bits up, kept gradient's noise 0.3": low(1.3, 1.0),
    "averages 1 bit, 1.3 bits up with zeros, kept gradient's noise 0.3": low(1.3, 1.0, keep_zeros=True),
    "averages 2 bits, 1.3 bits up, kept gradient's noise 0.3": low(1.3, 2.0),
    "averages 1.5 bits, 2.4 bits both ways": both_ways(2.4, 1.5),
    "averages 2 bits, 2.4 bits both ways": both_ways(2.4, 2.0),
    "averages 2 bits, 1.6 bits both ways": both_ways(1.6, 2.0),
    FORTY_TIMES: both_ways(1.6, 2.0, error=1.0),
    "averages 2 bits, 1.6 bits both ways, gradient's noise 3": both_ways(1.6, 2.0, error=3.0),
    "averages 2 bits, 1.6 bits both ways, all gradients": both_ways(1.6, 2.0, kept=False),
    "averages 2 bits, 2.4 bits both ways, all gradients": both_ways(2.4, 2.0, kept=False),
    "averages 2 bits": arm(update_codec=coded(2.0)),
    "averages 1 bit": arm(update_codec=coded(1.0)),
    "averages 0.5 bits": arm(update_codec=coded(0.5, levels=3)),
    "averages SP 1 %": arm(update_codec=compress.TopK(ratio=0.99)),
}
PAPER = ("none", "MS, features alone", "QU, features alone")
# At these cuts with three seeds: what the others are compared with, 40 times fewer bytes, and 20 times fewer of
# everything, where the averages of the larger part before the deep cut have fewer bits.
SEEDED = {
    **dict.fromkeys((*PAPER, FORTY_TIMES), study.CUTS),
    "averages 1.5 bits, 2.4 bits both ways": ("deep",),
    "averages 2 bits, 2.4 bits both ways": ("shallow", "medium"),
}
# All else has one seed, at the medium cut and here at more.
MORE_CUTS = {
    "the cut alone": ("shallow", "deep"),
    "averages 1 bit": ("shallow", "deep"),
    "averages 2 bits, 1.6 bits both ways": ("deep",),
}
DRAWN = (*PAPER, "the cut alone", *(name for name in ARMS if "both ways" in name))
SPLITFED = config.ModeConfig(kind="splitfed", average_steps=10)


def runs(scale):
    if scale == "paper":
        return {}
    base = study.base(scale)
    arms = {name: dataclasses.replace(base, **fields) for name, fields in ARMS.items()}
    for name in ("none", "the cut alone", "averages 1 bit"):
        arms[study.label("SplitFed", name)] = dataclasses.replace(arms[name], mode=SPLITFED)
    if scale == "smoke":
        kept = "averages 1 bit, kept gradient's noise 0.3"
        arms = {name: arms[name] for name in ("none", "averages 1 bit", kept, "SplitFed, averages 1 bit")}
        return study.with_seeds(study.at_cuts(arms, study.cuts(scale)), study.seeds(scale))
    once = {name: (study.PLAIN_CUT, *MORE_CUTS.get(name, ())) for name in arms if name not in SEEDED}
    return placed(arms, SEEDED, study.seeds(scale, lite=3)) | placed(arms, once, study.seeds(scale))


def placed(arms, cuts, seeds):
    """The runs of the arms that `cuts` names, {arm: its cuts}."""
    found = {}
    for name, at in cuts.items():
        found |= study.at_cuts({name: arms[name]}, at)
    return study.with_seeds(found, seeds)


def report(scale, records, *, arms=ARMS, figure="everything"):
    groups = study.by_arm(records)
    rows = []
    for cut in study.CUTS:
        for mode in ("", "SplitFed"):
            plain = study.at_cut(groups, study.label(mode, "none"), cut)
            for name in arms:
                found = study.at_cut(groups, study.label(mode, name), cut)
                # What nothing was compressed of is the same at every cut, but for its bytes.
                if not found or (name == "none" and cut != study.PLAIN_CUT):
                    continue
                factors = [statistics.mean(study.saved(r, everything=e) for r in found) for e in (False, True)]
                cells = [cut, study.label(mode, name), str(len(found)), study.top1(found)]
                rows.append(
                    [*cells, *(f"{f:.2f}×" for f in factors), study.mean_and_deviation(study.lost(plain, found))]
                )
    names = "cut/compressed/seeds/test top-1, %/saved of features and gradients/saved of everything/below “none”"
    text = timing.table(names.split("/"), rows) + f"\n\n![Accuracy against bytes of everything]({figure}.png)\n"
    return study.Page(text, {figure: plot(groups)})


def plot(groups):
    """Accuracy against how many times fewer bytes everything takes; bars are standard deviations over seeds."""
    figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    labels = {}
    for color, name in enumerate(DRAWN):
        for cut, marker in zip(study.CUTS, "^os", strict=True):
            found = study.at_cut(groups, name, cut)
            if not found or (name == "none" and cut != study.PLAIN_CUT):
                continue
            accuracy = [r["test"]["top1_percent"] for r in found]
            at = statistics.mean(study.saved(r, everything=True) for r in found), statistics.mean(accuracy)
            deviation = statistics.stdev(accuracy) if len(found) > 1 else None
            labels[name] = axes.errorbar(*at, deviation, fmt=marker, color=f"C{color}", capsize=2)
            if name == "none":
                axes.axhline(at[1], color="C0", linewidth=0.5)
    for cut, marker in zip(study.CUTS, "^os", strict=True):
        labels[f"{cut} cut"] = axes.plot([], [], marker, color="gray")[0]
    axes.set(xlabel="times fewer bytes of everything that is sent", ylabel="test top-1, %", xscale="log")
    axes.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

"""Judges of what the paper leaves open, its section 5; see `verdicts` and `claims`."""

import itertools
import math
import statistics

import scipy.stats

from experiments import (
    activations,
    both_directions,
    clients,
    convergence,
    cut_sensitivity,
    depth,
    distributions,
    everything,
    mask_width,
    not_images,
    study,
)
from experiments.judges_training import NEAR
from experiments.verdicts import Found, Part, Results, behind, judged, place, span, together
from msjax import compress

TIE = 0.3
"""Points on 10,000 test images, the same for all codecs: as much as 30 images decide, and called a tie."""


def _loses_no_more(results, module, reference, others):
    """Parts of what MS loses in other settings, against what it loses in a reference: pairs of arms (none, MS)."""
    parts = []
    for name, pair in others.items():
        if not (found := results.first(module, *reference, *pair)):
            continue
        source, arms = found
        usual, lost = (results.difference(source, *arms[at : at + 2]) for at in (0, 2))
        noise = math.hypot(usual.noise, lost.noise)
        if not parts:
            parts.append(Part("", f"{_short(reference[0])} {usual.mean:.2f}", place(source, arms[1][0]), usual.seeds))
        verdict = judged(NEAR + usual.mean - lost.mean, noise)
        parts.append(Part(verdict, f"{name} {lost.mean:.2f}", place(source, arms[3][0]), lost.seeds, noise))
    return parts


def _short(arm):
    return arm.rpartition(", ")[0]


def _lost(parts):
    """What these parts come to; the first is what the others are compared with, and has no verdict."""
    if not parts:
        return None
    noise = span([part.noise for part in parts[1:]], "{:.1f}")
    judged_parts = [parts[1]._replace(seeds=parts[1].seeds + parts[0].seeds), *parts[2:]]
    return together(judged_parts, f"MS loses {', '.join(part.text for part in parts)}; noise {noise}")


def other_activations(results: Results) -> Found | None:
    """What MS loses behind each activation, against ReLU."""
    others = {name: (f"{name}, none", f"{name}, MS") for name in activations.ACTIVATIONS}
    others[activations.BEFORE] = ("relu, none", f"{activations.BEFORE}, MS")
    return _lost(_loses_no_more(results, activations, others.pop("relu"), others))


def sign_bit(results: Results) -> Found | None:
    """Whether MS with a sign bit ends above MS without."""
    parts = []
    for name in activations.ACTIVATIONS:
        arms = (f"{name}, MS, signed", f"{name}, MS")
        parts += behind(results, activations, *arms, name, by_more_than=0.0)
    return together(parts, f"gain: {'; '.join(part.text for part in parts)}") if parts else None


def deep_networks(results: Results) -> Found | None:
    """What MS loses in deep networks, against the shallowest."""
    names = list(depth.networks("lite"))
    others = {name: (f"{name}, none", f"{name}, MS") for name in names}
    narrow = others.pop(names[-1])
    found = _lost(_loses_no_more(results, depth, others.pop(names[0]), others))
    if found and (pair := results.first(depth, *narrow)):
        source, arms = pair
        found = found._replace(numbers=f"{found.numbers}. {names[-1]}: {results.difference(source, *arms).mean:.2f}")
    return found


def tails(results: Results) -> Found | None:
    """Rank correlations of MS's advantage with how heavy the tail is."""
    if not (found := results.measured(distributions)):
        return None
    source, rows = found
    own = [
        {name: statistics.mean(row[name] for row in one) for name in ("kurtosis", "MS", *distributions.OTHERS)}
        for one in study.grouped(rows, "source").values()
    ]
    where = f"{source.scale}: {sum('/' in n for n in {row['source'] for row in rows})} real maps, the others made up"
    seeds = (len({row["seed"] for row in rows}),)
    parts = []
    for other, sign in (("QU", 1), ("SP", -1)):
        advantage = [distributions.advantage(row, other) for row in own]
        rank = float(scipy.stats.spearmanr([row["kurtosis"] for row in own], advantage).statistic)
        better = sum(value > 0 for value in advantage)
        text = f"over {other} {rank:+.2f} (the better on {better} of {len(own)} sources)"
        parts.append(Part(judged(sign * rank, 2 / math.sqrt(max(len(own) - 1, 1))), text, where, seeds))
    return together(parts, f"rank correlation of kurtosis with MS's advantage {', '.join(p.text for p in parts)}")


def two_bits(results: Results) -> Found | None:
    """Whether a mask of one bit loses, and one of three gains nothing that shows."""
    parts = []
    for setting in mask_width.settings("lite"):
        names = [study.label(setting, f"{bits} bits") for bits in (1, 2, 3)]
        if not (found := results.first(mask_width, *names)):
            continue
        source, arms = found
        gains = [results.difference(source, after, before) for before, after in itertools.pairwise(arms)]
        for (fewer, more), gain, margin in zip(
            (("1", "2"), ("2", "3")), gains, (gains[0].mean, NEAR - gains[1].mean), strict=True
        ):
            text = f"{setting.partition(', ')[2] or 'images'} {fewer} → {more} bits {gain.mean:+.2f}"
            where = place(source, arms[1][0])
            parts.append(Part(judged(margin, gain.noise), text, where, gain.seeds, gain.noise))
    cuts = {}
    for row in results.rows("published_cuts"):
        if row["model"] == "resnet20" and row["codec"] in [str(compress.MaskEncoded(bits=bits)) for bits in (2, 3)]:
            cuts.setdefault(row["block"], {})[row["codec"]] = row["top1_percent"]
    gains = [max(found.values()) - found[str(compress.MaskEncoded())] for found in cuts.values() if len(found) == 2]
    for gain in gains:
        parts.append(Part(judged(NEAR - gain, TIE), "", "published ResNet20, CIFAR-10, untrained"))
    said = "; ".join(part.text for part in parts if part.text)
    return together(parts, said + (f"; untrained 2 → 3 bits up to +{max(gains):.2f}" if gains else ""))


def early_cuts(results: Results) -> Found | None:
    """Whether cuts are the more sensitive the earlier they are: of every two, which loses more."""
    parts, said = [], []
    cuts = cut_sensitivity.cuts("lite")
    if found := results.measured(cut_sensitivity):
        source, rows = found
        if source.scale == "lite":
            ms = [row for row in rows if row["codec"] == str(compress.MaskEncoded())]
            errors = [statistics.mean(row["error"] for row in ms if row["cut"] == cut) for cut in cuts]
            rank = float(scipy.stats.spearmanr(range(len(cuts)), errors).statistic)
            images = f"lite: ResNet9, {source.images}CIFAR-10"
            seeds = (len({row["seed"] for row in ms}),)
            parts.append(Part(judged(-rank, 2 / math.sqrt(len(cuts) - 1)), "", images, seeds))
            said.append(f"gradients' error {errors[0]:.2f} → {errors[-1]:.2f}")
    network = next(iter(convergence.settings("lite")))
    ends = (study.CUTS[0], study.CUTS[-1])
    trained = [
        *((cut_sensitivity, codec, (cuts[0], cuts[-1]), "none, medium", codec) for codec in cut_sensitivity.CODECS),
        *(
            (convergence, study.label(network, codec), ends, study.label(network, "none", study.PLAIN_CUT), codec)
            for codec in ("MS", "QU", "SP", "RT")
        ),
        (everything, everything.FORTY_TIMES, ends, f"none, {study.PLAIN_CUT}", "everything compressed, 40 times,"),
    ]
    for module, arm, between, none, name in trained:
        if found := results.first(module, none, *(f"{arm}, {cut}" for cut in between)):
            source, (plain, first, last) = found
            more = results.difference(source, last, first)
            lost = [results.difference(source, plain, arm).mean for arm in (first, last)]
            parts.append(Part(judged(more.mean, more.noise), "", place(source, first[0]), more.seeds, more.noise))
            said.append(f"{name} loses {lost[0]:.1f} → {lost[1]:.1f}")
    by_network = study.grouped(results.rows("published_cuts"), "model")
    for model, rows in by_network.items():
        ms = sorted((row["layer"], row["top1_percent"]) for row in rows if row["codec"] == str(compress.MaskEncoded()))
        if len(ms) > 1:
            gained = ms[-1][1] - ms[0][1]
            parts.append(Part(judged(gained, TIE), "", "published ResNets, CIFAR-10, untrained"))
            said.append(f"{model.replace('resnet', 'ResNet')} untrained with MS {ms[0][1]:.1f} → {ms[-1][1]:.1f} %")
    return together(parts, f"first → last cut: {'; '.join(said)}") if parts else None


def not_image_data(results: Results) -> Found | None:
    """MS against no compression on a table and on texts."""
    parts = []
    for setting in not_images.settings("lite"):
        for cut in study.CUTS:
            arms = [f"{setting}, none, {study.PLAIN_CUT}", f"{setting}, MS, {cut}"]
            parts += behind(results, not_images, *arms, f"{setting.partition(', ')[2]} {cut}", at_most=NEAR)
    return together(parts, f"loss: {'; '.join(part.text for part in parts)}") if parts else None


def downlink(results: Results) -> Found | None:
    """The gradient compressed as well, against the same codec of features alone."""
    parts = []
    for cut in study.CUTS:
        arms = (f"EntropyMask up, {cut}", f"{both_directions.LOSING} up 2.0 down, {cut}")
        parts += behind(results, both_directions, *arms, cut, at_most=NEAR)
    return together(parts, f"loss by 2 bits down: {'; '.join(p.text for p in parts)}") if parts else None


def many_clients(results: Results) -> Found | None:
    """What MS loses with one client, with many, and with unlike ones, against ten."""
    names = dict.fromkeys(_short(arm) for arm in clients.runs("lite"))
    arms = {_short(name): None for name in names}
    others = {name: (f"{name}, none", f"{name}, MS") for name in arms}
    return _lost(_loses_no_more(results, clients, others.pop("10 clients, even"), others))

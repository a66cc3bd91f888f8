"""Judges of what the paper claims of trainings; see `verdicts` and `claims`."""

import re
import statistics

from experiments import convergence, study, traffic
from experiments.verdicts import (
    DOES_NOT,
    HOLDS,
    LITE,
    NOT_TESTED,
    ORIGINAL,
    PAPER,
    WITHIN_NOISE,
    Found,
    Part,
    Results,
    judged,
    place,
    span,
    together,
)

NEAR = 0.7
"""Points that MS ends behind no compression at most, as read off Figure 3."""


def _settings():
    """(sources, setting, cuts) of each network and data set of `convergence`: first the published ones."""
    for sources in ((PAPER,), LITE):
        for setting, (_, _, cuts) in convergence.settings(sources[0].scale).items():
            yield sources, setting, cuts


def _short(setting):
    """A setting's name without what is usual: “Tiny ImageNet”, “ResNet18”."""
    return re.sub("^ResNet9, | at .*$|, CIFAR-10$", "", setting)


def _pairs(results, arm, to):
    """(name, source, records of `to`, of `arm`) at each cut of `convergence`; published settings alone if any is there.

    Where nothing is compressed, the cut makes no difference, unless the network there is another one.
    """
    found = {PAPER.scale: [], ORIGINAL.scale: []}
    for sources, setting, cuts in _settings():
        wanted = convergence.runs(sources[0].scale)
        for cut in cuts:
            at = [study.label(setting, n, cut) for n in (to, arm)]
            if f"{at[0]}, seed 0" not in wanted:
                at[0] = study.label(setting, to, study.PLAIN_CUT)
            if one := results.first(convergence, *at, sources=sources):
                source, (before, after) = one
                found[source.scale].append((f"{_short(setting)} {cut}".strip(), source, before, after))
    return found[PAPER.scale] or found[ORIGINAL.scale]


def _compared(results, arm, to, *, at_most=None):
    """Parts of how far an arm ends behind another: at most so many points, or by any."""
    parts = []
    for name, source, before, after in _pairs(results, arm, to):
        lost = results.difference(source, before, after)
        verdict = judged(lost.mean if at_most is None else at_most - lost.mean, lost.noise)
        parts.append(Part(verdict, f"{name} {lost}", place(source, after[0]), lost.seeds, lost.noise))
    return parts


def near_baseline(results: Results) -> Found | None:
    """Figure 3: MS against no compression."""
    return together(_compared(results, "MS", "none", at_most=NEAR))


def uniform_behind(results: Results) -> Found | None:
    """Figure 3: QU against MS."""
    return together(_compared(results, "QU", "MS"))


def sparse_behind(results: Results) -> Found | None:
    """Figure 3: SP and RT against MS."""
    parts, said = [], []
    for arm in ("SP", "RT"):
        if own := _compared(results, arm, "MS"):
            lost = [
                results.difference(source, before, after).mean
                for _, source, before, after in _pairs(results, arm, "MS")
            ]
            said.append(f"{arm} {span(lost, '{:.1f}')} below")
            parts += own
    return together(parts, f"{', '.join(said)}; noise {span([p.noise for p in parts], '{:.1f}')}") if parts else None


def _reached(results, codec):
    """(name, source, how many seeds reach the baseline, their factors, how far behind) at each cut."""
    for name, source, plain, records in _pairs(results, codec, "none"):
        by_seed = {record["config"]["seed"]: record for record in plain}
        pairs = [(one, by_seed[seed]) for one in records if (seed := one["config"]["seed"]) in by_seed]
        savings = [traffic.saving(one, base, 0.0).paper for one, base in pairs]
        if pairs:
            lost = results.difference(source, plain, records)
            yield name, place(source, records[0]), [s for s in savings if s], len(pairs), lost, pairs


def reaches_baseline(results: Results) -> Found | None:
    """Table 1: MS."""
    parts, nearly = [], []
    for name, where, factors, seeds, lost, pairs in _reached(results, "MS"):
        everyone = len(factors) == seeds
        text = f"{name} {len(factors)} of {seeds} seeds, {lost} behind" if not everyone else ""
        verdict = HOLDS if everyone else DOES_NOT if lost.mean > lost.noise else WITHIN_NOISE
        text = text or f"{name} {statistics.mean(factors):.2f}×"
        parts.append(Part(verdict, text, where, (seeds,), lost.noise))
        nearly += [s for one, base in pairs if (s := traffic.saving(one, base, 3.0).paper)]
    if nearly:
        least = f"Three points below it is reached at {span(nearly)}×"
        return together(parts, f"reached: {'; '.join(part.text for part in parts)}. {least}")
    return together(parts)


def never_reach_baseline(results: Results) -> Found | None:
    """Table 1: QU, SP and RT at the shallow cut, where MS does."""
    parts = []
    for codec in ("MS", "QU", "SP", "RT"):
        for name, where, factors, seeds, lost, _ in _reached(results, codec):
            if not name.endswith("shallow"):
                continue
            never = not factors and lost.mean > lost.noise
            always = len(factors) == seeds
            does, does_not = (always, never) if codec == "MS" else (never, always)
            verdict = HOLDS if does else DOES_NOT if does_not else WITHIN_NOISE
            parts.append(
                Part(verdict, f"{codec} {len(factors)} of {seeds} seeds, {lost} behind", where, (seeds,), lost.noise)
            )
    return together(parts)


def published_end(results: Results) -> Found | None:
    """Figure 3: VGG19 at the published scale, of its study or, of one seed, of `accelerator`."""
    within = 0.5
    setting = next(iter(convergence.settings("paper")))
    published = {"none": (93.8, 93.8), "MS": (93.3, 93.7)}
    parts = []
    for codec in published:
        for cut in study.CUTS if codec != "none" else (study.PLAIN_CUT,):
            if found := results.first(convergence, study.label(setting, codec, cut), sources=(PAPER,)):
                source, (records,) = found
                parts.append(_as_published(codec, cut, place(source, records[0]), records, published[codec], within))
    if parts:
        return together(parts)
    by_epochs = {}  # trainings on all images: of one schedule none and MS are set beside each other
    for row in results.rows("accelerator"):
        is_whole = row["stage"] == "train" and row.get("history") and row["train_samples"] == 50_000
        if is_whole and row["config"]["model"]["name"] == "vgg19":
            by_epochs.setdefault(row["config"]["epochs"], {})[row["codec"]] = row
    whole = max((epochs for epochs, rows in by_epochs.items() if published.keys() <= rows.keys()), default=None)
    if whole is None:
        return None
    rows = by_epochs[whole]
    ends = {
        codec: {e["epoch"]: e["test"]["top1_percent"] for e in rows[codec]["history"] if "test" in e} for codec in rows
    }
    common = ends["none"].keys() & ends["MS"].keys()
    if not common:
        return None
    last = max(common)
    where = f"paper: VGG19, CIFAR-10, {last} of {whole} epochs"
    if last < whole or whole < 200:
        text = f"none {ends['none'][last]:.2f}, MS {ends['MS'][last]:.2f}; of shorter trainings the paper says nothing"
        return Found(NOT_TESTED, text, f"{where}, 1 seed")
    made = {codec: [{"test": {"top1_percent": ends[codec][last]}}] for codec in published}
    return together([_as_published(c, "", where, made[c], published[c], within) for c in published])


def _as_published(codec, cut, where, records, published, within):
    """Whether accuracies are those of the paper, within so many points."""
    mean = statistics.mean(record["test"]["top1_percent"] for record in records)
    low, high = published
    away = max(low - mean, mean - high, 0.0)
    text = f"{study.label(codec, cut)} {mean:.2f}"
    return Part(judged(within - away, 0.0), text, where, (len(records),))


def size(results: Results) -> Found | None:
    """By how much MS's counted bytes are fewer, in trainings."""
    parts, factors = [], []
    for _, source, _, records in _pairs(results, "MS", "none"):
        for one in records:
            factors.append(one["uncompressed_feature_bytes"] / one["traffic"]["uplink_feature_bytes"])
            # 13.79, but for what rounding up to whole bytes and values costs.
            parts.append(
                Part(judged(0.01 - abs(factors[-1] / 13.79 - 1), 0.0), "", place(source, one), (len(records),))
            )
    return together(parts, f"{span(factors)} times fewer bytes") if parts else None

"""Judges of what the paper claims of gradients, errors and time; see `verdicts` and `claims`."""

import math
import statistics

import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import biased_gradients, compression_error, distributions, rate_distortion, study
from experiments.verdicts import (
    DOES_NOT,
    HOLDS,
    IN_PART,
    WITHIN_NOISE,
    Found,
    Part,
    Results,
    combined,
    judged,
    place,
    span,
    together,
    train_loss,
)
from msjax import compress

SIZES = (2.32, 3.0, 4.0, 5.0, 6.0)
"""Bits a value at which all codecs of Figure 2 have errors, measured or interpolated."""
KINDS = {"RandTopK": "RT", "TopK": "SP", "Uniform": "QU", "MaskEncoded": "MS"}
UNBIASED = 0.05
"""Up to this bias, relative to the features, a codec counts as unbiased."""
MUCH = 2.0
"""By this factor an error is much larger than another: our reading of “≫”."""


def _measured_on(source, rows):
    """Where measurements on trained networks were made, and with how many seeds."""
    images = "lossy CIFAR-10" if source.images else "CIFAR-10"
    network = "VGG19" if source.scale == "paper" else "ResNet9"
    return f"{source.scale}: {network}, {images}", (len({row["seed"] for row in rows}),)


def biased(results: Results) -> Found | None:
    """Theorem 1: the gradients' bias with unbiased codecs, against what chance leaves in a mean of so many draws."""
    if not (found := results.measured(biased_gradients)):
        return None
    source, rows = found
    rows = [row | {"at": (row["state"], row["cut"])} for row in rows if "*" in row["codec"]]
    where, seeds = _measured_on(source, rows)
    parts, biases = [], {"features": [], "server": [], "client": []}
    for own in study.grouped(rows, "at").values():
        verdicts = []
        for draws in study.grouped(own, "codec").values():
            for party in biases:
                bias, error = (statistics.mean(row[f"{party}_{n}"] for row in draws) for n in ("bias", "error"))
                chance = error / math.sqrt(sum(row["draws"] for row in draws))
                biases[party].append(bias)
                # Biases have chance taken off. The features' own has to be none, or the theorem is not of the codec.
                verdicts.append(judged(UNBIASED - bias if party == "features" else bias - chance, 0.0))
        parts.append(Part(combined(verdicts), "", where, seeds))
    numbers = "; ".join(f"{party} {span(values)}" for party, values in biases.items())
    return together(parts, f"bias, relative: {numbers}")


def error_grows(results: Results) -> Found | None:
    """Lemma 2: the rank correlation over codecs of the gradients' error with that of the features."""
    if not (found := results.measured(biased_gradients)):
        return None
    source, rows = found
    where, seeds = _measured_on(source, rows)
    parts, correlations, spread = [], {"server": [], "client": []}, []
    for own in study.grouped([row | {"at": (row["state"], row["cut"])} for row in rows], "at").values():
        names = ("features_error", "server_error", "client_error", "h")
        means = [[statistics.mean(r[n] for r in one) for n in names] for one in study.grouped(own, "codec").values()]
        features, *errors, h = zip(*means, strict=True)
        for party, error in zip(correlations, errors, strict=True):
            rank = float(scipy.stats.spearmanr(features, error).statistic)
            correlations[party].append(rank)
            parts.append(Part(judged(rank, 2 / math.sqrt(max(len(means) - 1, 1))), "", where, seeds))
        spread.append(max(h) / min(h))
    numbers = "; ".join(f"{party} {span(values)}" for party, values in correlations.items())
    said = (
        f"rank correlation with E: {numbers}. The H that fits is {span(spread, '{:.0f}')} times as large for one codec"
    )
    return together(parts, f"{said} as for another: the smaller E, the larger")


def converges_worse(results: Results) -> Found | None:
    """Theorem 3: of every two codecs, whether the one with the larger error ends with the larger training loss."""
    found = results.measured(biased_gradients)
    if not found:
        return None
    source, rows = found
    arms = results.arms(biased_gradients, source)
    trained = []
    for codec in biased_gradients.TRAINED_WITH:
        own = [r for r in rows if (r["state"], r["cut"], r["codec"]) == ("trained", "medium", codec)]
        if own and (records := arms.get(f"training, {codec}")):
            trained.append((statistics.mean(row["features_error"] for row in own), codec, records))
    trained.sort(key=lambda one: one[0])
    pairs = []
    for n, (_, better, before) in enumerate(trained):
        for error, worse, after in trained[n + 1 :]:
            lost = results.difference(source, after, before, train_loss)
            pairs.append((judged(lost.mean, lost.noise), f"{better} before {worse}", error))
    if not pairs:
        return None
    counts = {verdict: [name for v, name, _ in pairs if v == verdict] for verdict in (HOLDS, DOES_NOT, WITHIN_NOISE)}
    against = f"{len(counts[DOES_NOT])} against" + (f" ({', '.join(counts[DOES_NOT])})" if counts[DOES_NOT] else "")
    close = [error for verdict, _, error in pairs if verdict == WITHIN_NOISE]
    numbers = f"of {len(pairs)} pairs {len(counts[HOLDS])} are in order, {against}, {len(close)} too close"
    if close:
        numbers += f", of errors up to {max(close):.2f}"
    verdict = HOLDS if len(counts[HOLDS]) > len(counts[WITHIN_NOISE]) else WITHIN_NOISE
    if counts[DOES_NOT]:
        verdict = IN_PART if len(counts[HOLDS]) > len(counts[DOES_NOT]) else DOES_NOT
    part = Part(verdict, "", place(source, trained[0][2][0]), tuple(len(records) for _, _, records in trained))
    return together([part], f"training loss at the end: {numbers}")


def within_bounds(results: Results) -> Found | None:
    """The bounds before Theorem 4: errors by them."""
    if not (found := results.measured(compression_error)):
        return None
    source, rows = found
    rows = [row for row in rows if row["bound"] is not None]
    if not rows:
        return None
    where, seeds = _measured_on(source, rows)
    parts, texts = [], []
    for kind, name in KINDS.items():
        if own := [row for row in rows if row["codec"].startswith(f"{kind}(")]:
            worst = max(row["error"] / row["bound"] for row in own)
            texts.append(f"{name} {worst:.2g}")
            # Rounding errors of single precision are none of the bound's.
            parts.append(Part(judged(1.001 - worst, 0.0), "", where, seeds))
    empty = sorted({KINDS[row["codec"].partition("(")[0]] for row in rows if row["bound"] > 1})
    said = f"error by its bound, at most: {', '.join(texts)}"
    return together(parts, said + (f". Bounds above 1, thus empty: {', '.join(empty)}" if empty else ""))


def condition(results: Results) -> Found | None:
    """Theorem 4: whether real maps have α < 1/2, and what the bounds and errors are at equal size."""
    if not (found := results.measured(compression_error)):
        return None
    source, rows = found
    where, seeds = _measured_on(source, rows)
    parts, factors, bounds = [], [], []
    for cut, own in study.grouped(rows, "cut").items():
        alphas = [by_seed[0]["alpha"] for by_seed in study.grouped(own, "seed").values()]
        noise = 2 * statistics.stdev(alphas) / math.sqrt(len(alphas)) if len(alphas) > 1 else 0.0
        alpha = statistics.mean(alphas)
        parts.append(Part(judged(0.5 - alpha, noise), f"{cut} {alpha:.2f}", where, seeds))
        at = {name: [_at(own, kind, 2.32, name) for kind in ("Uniform", "MaskEncoded")] for name in ("error", "bound")}
        if None not in (*at["error"], *at["bound"]):
            factors.append(at["error"][0] / at["error"][1])
            bounds.append(at["bound"][0] / at["bound"][1])
    said = f"α: {', '.join(part.text for part in parts)}"
    if factors:
        said += f". At 2.32 bits QU's bound is {span(bounds)} of MS's, its error {span(factors, '{:.1f}')} times MS's"
    if made := results.measured(distributions):
        met, not_met = _made_up(made[1])
        said += f". MS is the better on {met} sources with α < 1/2, and on {not_met} others"
    return together(parts, said)


def _made_up(rows):
    """On how many sources MS's error is below QU's at equal size: of those that meet the condition, and of others."""
    counts = {True: [], False: []}
    for own in study.grouped(rows, "source").values():
        top, ms, qu = (statistics.mean(row[name] for row in own) for name in ("energy of the top 1 %", "MS", "QU"))
        counts[math.sqrt(max(1 - top, 0.0)) < 0.5].append(ms < qu)
    return [f"{sum(better)} of {len(better)}" for better in counts.values()]


def _at(rows, kind, bits, name):
    """An error or bound of a codec's at so many nominal bits, interpolated; None where its rates do not reach there."""
    own = [
        row | {"bits": row["nominal_bits"], "error": row[name]} for row in rows if row["codec"].startswith(f"{kind}(")
    ]
    rates = [row["bits"] for row in own]
    if not rates or not min(rates) - 0.01 <= bits <= max(rates) + 0.01 or any(row["error"] is None for row in own):
        return None
    return rate_distortion.at(own, "bits", bits, "error")


def _errors(rows, bits):
    """{cut: {codec: errors of all seeds}} at a size, of cuts where all four codecs have one."""
    found = {}
    for cut, own in study.grouped(rows, "cut").items():
        by_seed = study.grouped(own, "seed").values()
        errors = {name: [_at(one, kind, bits, "error") for one in by_seed] for kind, name in KINDS.items()}
        if not any(None in values for values in errors.values()):
            found[cut] = errors
    return found


def _larger(errors, a, b, factor=1.0):
    """Whether codec `a` has an error larger than `b` by more than this factor, and than the noise of seeds."""
    logs = np.log([errors[a], errors[b]])
    noise = 2 * math.hypot(*(np.std(logs, axis=1, ddof=1) / math.sqrt(logs.shape[1]))) if logs.shape[1] > 1 else 0.0
    return judged(float(np.subtract(*logs.mean(1))) - math.log(factor), noise)


def ordered(results: Results) -> Found | None:
    """Figure 2 at the size of the paper's experiments."""
    if not (found := results.measured(compression_error)):
        return None
    source, rows = found
    where, seeds = _measured_on(source, rows)
    parts = []
    for cut, errors in _errors(rows, 2.32).items():
        verdicts = [_larger(errors, "RT", "SP"), _larger(errors, "SP", "QU", MUCH), _larger(errors, "QU", "MS")]
        said = " > ".join(f"{name} {statistics.mean(errors[name]):.2f}" for name in KINDS.values())
        parts.append(Part(combined(verdicts), f"{cut}: {said}", where, seeds))
    return together(parts)


def ordered_at_all_sizes(results: Results) -> Found | None:
    """Figure 2 over the compression ratios that it shows: MS against QU, where MS keeps more values at more bits."""
    if not (found := results.measured(compression_error)):
        return None
    source, rows = found
    where, seeds = _measured_on(source, rows)
    parts = []
    for bits in SIZES:
        if at := _errors(rows, bits):
            factors = [statistics.mean(e["QU"]) / statistics.mean(e["MS"]) for e in at.values()]
            verdict = combined(_larger(errors, "QU", "MS") for errors in at.values())
            parts.append(Part(verdict, f"{bits:g} bits {span(factors, '{:.1f}')}", where, seeds))
    if not parts:
        return None
    said = f"QU's error by MS's: {'; '.join(part.text for part in parts)}"
    if factors := _wider_masks(results, source, rows):
        said += f". By that of MS with 3- and 4-bit codes, at their sizes: {span(factors, '{:.1f}')}"
    return together(parts, said)


def _wider_masks(results, source, rows):
    """QU's errors by MS's where MS has wider codes, on the same trained networks, at each cut."""
    if not (found := results.measured(biased_gradients)) or found[0] != source:
        return []
    factors = []
    for cut, own in study.grouped(rows, "cut").items():
        for bits in (3, 4):
            at = [r for r in found[1] if (r["state"], r["cut"], r["codec"]) == ("trained", cut, f"MS, {bits} bits")]
            if at and (uniform := _at(own, "Uniform", bits + 0.32, "error")):
                factors.append(uniform / statistics.mean(row["features_error"] ** 2 for row in at))
    return factors


def figure_1(results: Results) -> Found:
    """The worked example, computed here and now."""
    h = jnp.asarray(
        np.float32([[2.2, 0.8, 1.2, 0.4], [1.8, 0.2, 3.1, 2.0], [2.1, 0.2, 1.1, 1.7], [0.3, 2.8, 1.4, 0.9]])
    )
    ms, sp = compress.MaskEncoded(ratio=0.75), compress.TopK(ratio=0.75)
    errors = [float(np.linalg.norm(np.asarray(codec.roundtrip(h)) - h)) for codec in (sp, ms)]
    sizes = [codec.payload_bytes(h) for codec in (compress.Identity(), ms)]
    same = [round(e, 2) for e in errors] == [4.06, 1.02] and sizes == [64, 20]
    numbers = f"error {errors[0]:.2f} → {errors[1]:.2f}, {sizes[0]} → {sizes[1]} bytes"
    return Found(HOLDS if same else DOES_NOT, numbers, "computed for this table")


def encoding_time(results: Results) -> Found | None:
    """How much longer a larger map takes, against d·log k + d; k is 1 % of d, so k alone is not varied."""
    rows = [row for row in results.benchmark("codecs_cpu") if row["codec"] == str(compress.MaskEncoded())]
    rows = sorted((row for row in rows if row["dtype"] == "float32"), key=lambda row: row["values"])
    if len(rows) < 2 or rows[0]["values"] == rows[-1]["values"]:
        return None
    few, many = rows[0], rows[-1]
    work = [row["values"] * (math.log2(max(row["values"] // 100, 2)) + 1) for row in (few, many)]
    parts = []
    for name, key in (("msjax", "encode_seconds"), ("plain PyTorch", "torch_encode_seconds")):
        growth = many[key] / few[key]
        verdict = judged(math.log(work[1] / work[0] / growth), math.log(1.25))
        parts.append(Part(verdict, f"{name} {growth:.0f}", "CPU, random maps, medians of 5 calls"))
    grown = f"d grows {many['values'] / few['values']:.0f} times, d·log k + d {work[1] / work[0]:.0f} times"
    return together(
        parts, f"{grown}; the time: {', '.join(part.text for part in parts)} times. k is 1 % of d throughout"
    )

"""Judges of what msjax claims for itself; see `verdicts` and `claims`."""

import itertools
import math
import statistics

import numpy as np

from experiments import beside_pytorch, both_directions, everything, fine_tuning, published_cuts, rate_distortion, study
from experiments.judges_open import TIE
from experiments.judges_training import NEAR
from experiments.verdicts import (
    DOES_NOT,
    HOLDS,
    WITHIN_NOISE,
    Found,
    Part,
    Results,
    behind,
    judged,
    place,
    span,
    together,
)
from msjax import compress

TWENTY = "EntropyMask 1.6 up 1.5 down"
UNTRAINED = "published ResNets, CIFAR-10, nothing trained, the same 10,000 images"
POINT = 1.0
ESTIMATE = 0.015
"""By what share bytes of messages may be estimated too low: by no more in any step of `estimated_bytes`."""
OLDER_ESTIMATE = 0.1
"""The same of runs without a budget, which are older than the estimates as they are now: those of gradients at late
cuts were up to a fifth too low, and gradients are about half of the bytes over the cut."""


def both_ways(results: Results) -> Found | None:
    """Twenty times fewer bytes over the cut, for at most a point."""
    return _fewer_bytes(results, both_directions, dict.fromkeys(study.CUTS, TWENTY), times=19.5, at_most=POINT)


def ten_times_everything(results: Results) -> Found | None:
    """Ten times fewer bytes of everything at each cut, with averages compressed, too."""
    arms = dict.fromkeys(study.CUTS, "averages 1 bit")
    return _fewer_bytes(results, everything, arms, times=10.0, at_most=POINT, of_everything=True)


def twenty_times_everything(results: Results) -> Found | None:
    """Twenty times fewer bytes of everything at each cut, for at most half a point."""
    deep = "averages 1.5 bits, 2.4 bits both ways"
    arms = dict.fromkeys(study.CUTS, "averages 2 bits, 2.4 bits both ways") | {"deep": deep}
    return _fewer_bytes(results, everything, arms, times=20.0, at_most=POINT / 2, of_everything=True)


def forty_times_over_the_cut(results: Results) -> Found | None:
    """Forty times fewer bytes over the cut, for at most half a point."""
    arms = dict.fromkeys(study.CUTS, everything.FORTY_TIMES)
    return _fewer_bytes(results, everything, arms, times=40.0, at_most=POINT / 2)


def _fewer_bytes(results, module, arms, *, times, at_most, of_everything=False):
    """Whether an arm at each cut, where it was trained, both sends so many times fewer bytes and loses so little."""
    parts, over_cut, whole = [], [], []
    for cut, arm in arms.items():
        names = (f"none, {study.PLAIN_CUT}", f"{arm}, {cut}")
        if found := results.first(module, *names):
            source, (_, records) = found
            over_cut.append(statistics.mean(map(study.saved, records)))
            whole.append(statistics.mean(study.saved(record, everything=True) for record in records))
            factor = (whole if of_everything else over_cut)[-1]
            share = ESTIMATE if "both ways" in arm else OLDER_ESTIMATE
            fewer = Part(judged(factor - times, share * factor), "", place(source, records[0]))
            for loss in behind(results, module, *names, cut, at_most=at_most):
                both = {loss.verdict, fewer.verdict}
                worst = next(verdict for verdict in (DOES_NOT, WITHIN_NOISE, HOLDS) if verdict in both)
                parts.append(loss._replace(verdict=worst))
    if not parts:
        return None
    lost = "; ".join(part.text for part in parts if part.text)
    factors = f"{span(over_cut, '{:.1f}')}× less over the cut, {span(whole, '{:.1f}')}× of everything"
    return together(parts, f"{factors}. Loss: {lost}")


def fewer_real_bits(results: Results) -> Found | None:
    """What `EntropyMask` needs at MS's error, both Huffman-coded."""
    parts, shares, lower, limits = [], [], [], []
    for source, rows in study.grouped(results.rows("rate_distortion"), "source").items():
        ms = next((row for row in rows if row["codec"].startswith("MaskEncoded(ratio=0.99, bits=2")), None)
        ours = [row for row in rows if row["codec"].startswith("EntropyMask") and "nearest" in row["codec"]]
        if ms is None or not ours:
            continue
        share = rate_distortion.at(ours, "error", ms["error"], "bits") / ms["bits"]
        at_same = rate_distortion.at(ours, "bits", ms["nominal_bits"], "error")
        best = rate_distortion.at([r for r in rows if r["codec"] == "limit"], "bits", ms["nominal_bits"], "error")
        shares.append(share)
        lower.append(ms["error"] / at_same)
        limits += [at_same / best] if best else []
        kind = "maps of a trained network" if "/" in source else "made-up sources"
        parts.append(Part(judged(1 - share, 0.0), "", f"{kind}, measured once"))
    if not parts:
        return None
    said = (
        f"{span(shares)} of MS's real bits at its error; at its nominal bits {span(lower, '{:.0f}')} times less error"
    )
    return together(parts, said + (f", {span(limits, '{:.1f}')} times the limit" if limits else ""))


def _blocks(results):
    """{(network, block): {codec as text: row}} of networks that are cut without training."""
    found = {}
    for row in published_cuts.by_images(results.rows("published_cuts")):
        found.setdefault((row["model"], row["block"]), {})[row["codec"]] = row
    return {at: rows for at, rows in found.items() if str(compress.Identity()) in rows}


def _lost(rows, codec):
    """Points below no compression; None where the codec was not tried."""
    found = rows.get(str(codec))
    return None if found is None else rows[str(compress.Identity())]["top1_percent"] - found["top1_percent"]


def _ranked(results, codecs, better):
    """Parts of whether each codec but the first loses less than the one after it in `better`; and losses of all."""
    parts, losses = [], {name: [] for name in codecs}
    bits = {name: [] for name in codecs}
    for rows in _blocks(results).values():
        lost = {name: _lost(rows, codec) for name, codec in codecs.items()}
        if None in lost.values():
            continue
        for name, codec in codecs.items():
            losses[name].append(lost[name])
            bits[name].append(rows[str(codec)]["bits"])
        margins = [lost[b] - lost[a] for a, b in better]
        # A tie is no evidence against an order, nor are ties alone any for it.
        verdict = DOES_NOT if min(margins) < -TIE else HOLDS if max(margins) > TIE else WITHIN_NOISE
        parts.append(Part(verdict, "", UNTRAINED))
    told = [part for part in parts if part.verdict != WITHIN_NOISE] or parts
    texts = [
        f"{name} {span(losses[name], '{:.1f}')} ({span(bits[name], '{:.1f}')} real bits)"
        for name in codecs
        if losses[name]
    ]
    return told, f"points lost behind {len(parts)} blocks: {'; '.join(texts)}"


def untrained_at_equal_size(results: Results) -> Found | None:
    """At about 2.32 bits: the losses of all codecs, in the order that the claim says."""
    order = ("EntropyMask", "MS", "QU", "SP")
    codecs = {name: published_cuts.EQUAL[name] for name in order}
    parts, numbers = _ranked(results, codecs, list(itertools.pairwise(order)))
    return together(parts, numbers)


def untrained_at_one_bit(results: Results) -> Found | None:
    """Asked for about one bit: `EntropyMask` against each other."""
    codecs = {name: published_cuts.ONE[name] for name in ("EntropyMask", "SP", "MS", "QU")}
    parts, numbers = _ranked(results, codecs, [("EntropyMask", name) for name in ("SP", "MS", "QU")])
    return together(parts, numbers)


def untrained_at_equal_real_bits(results: Results) -> Found | None:
    """`EntropyMask`, between its rates, against QU and MS at each of theirs, all coded losslessly."""
    parts, said = [], []
    for kind, name in (("Uniform", "QU"), ("MaskEncoded", "MS")):
        margins, errors = [], []
        for rows in _blocks(results).values():
            ours = [row for codec, row in rows.items() if codec.startswith("EntropyMask(")]
            if len(ours) < 3:
                continue
            bits, accuracy = zip(*sorted((row["bits"], row["top1_percent"]) for row in ours), strict=True)
            for codec, row in rows.items():
                # Below its least rate its accuracy is unknown, but no more than there.
                if codec.startswith(f"{kind}(") and bits[0] - 0.05 <= row["bits"] <= bits[-1]:
                    margins.append(float(np.interp(row["bits"], bits, accuracy)) - row["top1_percent"])
                    errors.append(rate_distortion.at(ours, "bits", row["bits"], "error") < row["error"])
        if margins:
            more, less = sum(m > TIE for m in margins), sum(m < -TIE for m in margins)
            parts += [
                Part(HOLDS if m > TIE else DOES_NOT if m < -TIE else WITHIN_NOISE, "", UNTRAINED) for m in margins
            ]
            text = f"against {name} better at {more} of {len(margins)} rates, worse at {less}"
            text += f" ({span(margins, '{:+.1f}')} points), its error smaller at {sum(errors)}"
            said.append(text)
    # Ties here and there leave the verdict to the others.
    told = [part for part in parts if part.verdict != WITHIN_NOISE] or parts
    return together(told, "; ".join(said)) if parts else None


def least_bits(results: Results) -> Found | None:
    """At about half a real bit: whether the codec with the smaller error loses less."""
    codecs = {
        "QU, 2 bits": compress.Uniform(bits=2),
        "MS, 1 bit": compress.MaskEncoded(bits=1),
        "EntropyMask, 0.5 bits": compress.EntropyMask(bits=0.5, levels=5),
    }
    parts, all_rows = [], {name: [] for name in codecs}
    for rows in _blocks(results).values():
        found = {name: rows[str(codec)] for name, codec in codecs.items() if str(codec) in rows}
        if len(found) < len(codecs):
            continue
        by_error = sorted(found.values(), key=lambda row: row["error"])
        for name, row in found.items():
            all_rows[name].append(row)
        for smaller, larger in itertools.pairwise(by_error):
            parts.append(Part(judged(smaller["top1_percent"] - larger["top1_percent"], TIE), "", UNTRAINED))
    said = []
    for name, rows in all_rows.items():
        if rows:
            tops = ", ".join(f"{row['top1_percent']:.0f}" for row in rows)
            said.append(f"{name}: error {span(row['error'] for row in rows)}, top-1 {tops} %")
    return together(parts, "; ".join(said)) if parts else None


def fine_tuned(results: Results) -> Found | None:
    """MS against no compression after two epochs of fine-tuning."""
    parts = []
    for cut, block in fine_tuning.CUTS.items():
        parts += behind(results, fine_tuning, f"none, {study.PLAIN_CUT}", f"MS, {cut}", block, at_most=NEAR)
    return together(parts, f"loss after two epochs: {'; '.join(part.text for part in parts)}") if parts else None


def same_steps(results: Results) -> Found | None:
    """msjax beside PyTorch, step by step, against PyTorch beside itself."""
    parts, factors = [], []
    for row in results.rows("beside_pytorch"):
        # Weights after the first step alone: those of PyTorch's two runs are soon as far apart as they can be.
        own = [row[name] / row[f"{name}_again"] for name in ("losses", "weights_1")]
        factors += own
        network = beside_pytorch.network_of(row)
        where = f"{beside_pytorch.NETWORKS[network].title}, CIFAR-10, {row['steps']} steps"
        parts.append(Part(judged(2.0 - max(own), 0.0), row["codec"], where, (1,)))
    names = ", ".join(dict.fromkeys(part.text for part in parts))
    return together(parts, f"{names}: {span(factors, '{:.1f}')} times as far as PyTorch from itself") if parts else None


def same_accuracy(results: Results) -> Found | None:
    """Whole trainings in PyTorch and in msjax, in pairs of seeds."""
    rows = results.rows("beside_pytorch_training")
    whole = max((row["steps"] for row in rows), default=0)
    parts = []
    for codec, own in study.grouped([row for row in rows if row["steps"] == whole], "codec").items():
        off = [row["msjax_top1_percent"] - row["torch_top1_percent"] for row in own]
        noise = 2 * statistics.stdev(off) / math.sqrt(len(off)) if len(off) > 1 else POINT
        mean = statistics.mean(off)
        text = f"{codec} {mean:+.2f} ± {noise:.2f}"
        # That no difference was found shows nothing; that it is below a point has to be beyond the noise.
        parts.append(Part(judged(POINT - abs(mean), noise), text, "lite: ResNet9, CIFAR-10", (len(own),), noise))
    return together(parts, f"msjax − PyTorch: {'; '.join(part.text for part in parts)} points") if parts else None


def published_weights(results: Results) -> Found | None:
    """Published networks, tested."""
    parts = []
    for row in results.rows("published_weights"):
        off = abs(row["top1_percent"] - row["published_top1_percent"])
        text = f"{row['model'].replace('resnet', 'ResNet')} {row['top1_percent']:.2f} %"
        parts.append(Part(judged(0.005 - off, 0.0), text, f"CIFAR-10, {row['images']:,} test images"))
    return together(parts)

"""Which features does MS suit? Errors at equal bits against statistics of the values.

    python -m experiments.distributions --data-dir DIR

Features and gradients at each cut of a trained network, and synthetic sources of many sparsities, tails and skews, all
through MS at 2.32 bits, 3.32 where values have signs, and QU and SP at as many: of QU, which has whole bits, the
logarithm of the error is interpolated between the two nearest. MS's advantage over another is the logarithm to base 2
of the ratio of their squared errors; a statistic predicts it as well as their rank correlation is far from 0.
"""

import sys

import matplotlib.figure
import numpy as np
import scipy.stats

from benchmarks import timing
from experiments import driver, feature_maps, rate_distortion, study
from msjax import compress

TITLE = "Distributions"
STATISTICS = ("zeros", "kurtosis", "skewness", "largest / deviation", "energy of the top 1 %")
OTHERS = ("QU", "SP")
TINY = 1e-12  # an error that counts as none


def runs(scale):
    return study.measured(scale, f"{__spec__.name}:measure")


def measure(folder, cfg, scale):
    found = feature_maps.collect(str(folder), samples=100, cuts=study.cuts(scale), **study.places(cfg))
    found |= synthetic(1 << (12 if scale == "smoke" else 18), seed=cfg.seed)
    return [{"source": name, **statistics_of(h), **errors(h)} for name, h in found.items()]


def synthetic(values, seed):
    """float32 (values,) by name: magnitudes of a given tail, of which some are zeros, and some have signs."""
    rng = np.random.default_rng(seed)
    tails = {
        "uniform": rng.random(values),
        "half normal": np.abs(rng.normal(size=values)),
        "exponential": rng.exponential(size=values),
        "gamma 0.5": rng.gamma(0.5, size=values),
        "lognormal": rng.lognormal(size=values),
        "Student's t, 3": np.abs(rng.standard_t(3, values)),
    }
    found = {}
    for name, h in tails.items():
        for zeros in (0.0, 0.5, 0.8, 0.95):
            found[f"{name}, {zeros:.0%} zeros"] = h * (rng.random(values) >= zeros)
        for negative in (0.1, 0.5):
            found[f"{name}, {negative:.0%} negative"] = h * np.where(rng.random(values) < negative, -1, 1)
    return {name: h.astype(np.float32) for name, h in found.items()}


def statistics_of(h):
    h = h.reshape(-1).astype(np.float64)
    top = np.sort(np.abs(h))[-max(1, h.size // 100) :]
    found = np.mean(h == 0), scipy.stats.kurtosis(h), scipy.stats.skew(h), np.abs(h).max() / h.std()
    return dict(zip(STATISTICS, map(float, (*found, np.sum(top**2) / np.sum(h**2))), strict=True))


def errors(h):
    signed = bool((h < 0).any())
    bits = 2.32 + signed
    uniform = []
    for width in (2 + signed, 3 + signed):
        error = rate_distortion.measure(h, compress.Uniform(bits=width))["error"]
        uniform.append({"bits": width, "error": max(error, TINY)})
    return {
        "MS": rate_distortion.measure(h, compress.MaskEncoded(signed=signed))["error"],
        "QU": rate_distortion.at(uniform, "bits", bits, "error"),
        "SP": rate_distortion.measure(h, compress.TopK(ratio=1 - (bits - 1) / 32))["error"],
    }


def advantage(row, other):
    return float(np.log2(max(row[other], TINY) / max(row["MS"], TINY)))


def report(scale, records):
    rows = study.measurements(records)
    lines = []
    for statistic in STATISTICS:
        x = [row[statistic] for row in rows]
        found = [scipy.stats.spearmanr(x, [advantage(row, other) for row in rows]).statistic for other in OTHERS]
        lines.append([statistic, *(f"{value:+.2f}" for value in found)])
    ranks = timing.table(["rank correlation with MS's advantage over", *OTHERS], lines)
    lines = []
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        cells = [f"{np.mean([row[name] for row in own]):.3g}" for name in (*STATISTICS, "MS", *OTHERS)]
        lines.append([source, *cells])
    text = f"{ranks}\n\n{timing.table(['source', *STATISTICS, 'error: MS', *OTHERS], lines)}\n"
    return study.Page(f"{text}\n![MS's advantage](distributions.png)\n", {"distributions": plot(rows)})


def plot(rows):
    figure = matplotlib.figure.Figure(figsize=(14, 6), layout="constrained")
    panels = figure.subplots(len(OTHERS), len(STATISTICS), sharex="col", sharey="row")
    for line, other in enumerate(OTHERS):
        for column, statistic in enumerate(STATISTICS):
            axes = panels[line, column]
            for real in (False, True):
                own = [row for row in rows if ("/" in row["source"]) == real]
                points = [(row[statistic], advantage(row, other)) for row in own]
                if points:
                    axes.plot(*zip(*points, strict=True), "o" if real else ".", label="real" if real else "synthetic")
            axes.axhline(0, color="k", linewidth=0.5)
            if statistic in ("kurtosis", "largest / deviation"):
                axes.set_xscale("symlog")
            if line:
                axes.set(xlabel=statistic)
        panels[line, 0].set(ylabel=f"advantage over {other}, log2")
    study.legend(figure.axes, fontsize="small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

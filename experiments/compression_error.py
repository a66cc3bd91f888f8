"""Compression error of real feature maps against compression ratio (the paper's Figure 2), with its bounds.

    python -m experiments.compression_error --data-dir DIR

The features of one batch at each cut of a network trained without compression, through each codec at a range of rates.
Errors are squared and relative, ‖h − ĥ‖²/‖h‖², as in the paper's bounds (31)–(33); the ratio is 1 − bits/32, of the
payload as the paper counts it; of `EntropyMask`, which has no size before it is coded, that of the messages. Real bits
are those of whole messages, Huffman-coded. At about 2.32 bits QU has 3, the nearest above; "QU at equal bits" is
interpolated between 2 and 3. Theorem 4's condition for MS to have a smaller bound than QU at equal size is α < 1/2 with
few values kept; α is ‖values MS does not keep‖/‖h‖. The paper's figure has RT > SP ≫ QU > MS.
"""

import sys

import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from benchmarks import timing
from experiments import driver, feature_maps, rate_distortion, study
from msjax import compress

TITLE = "Compression error (Figure 2)"
NAMES = {"Uniform": "QU", "TopK": "SP", "RandTopK": "RT", "MaskEncoded": "MS", "EntropyMask": "EntropyMask"}
EQUAL = (  # about 2.32 bits
    compress.Uniform(bits=3),
    compress.TopK(ratio=0.95875),
    compress.RandTopK(ratio=0.95875),
    compress.MaskEncoded(),
    compress.EntropyMask(bits=2.32, levels=31),
)
MORE = (
    *(compress.Uniform(bits=bits) for bits in (2, 4, 5, 6)),
    *(kind(ratio=r) for kind in (compress.TopK, compress.RandTopK) for r in (0.81, 0.85, 0.9, 0.93, 0.97)),
    *(compress.MaskEncoded(ratio=r) for r in (0.85, 0.9, 0.93, 0.95, 0.97, 0.997)),
    *(compress.EntropyMask(bits=b, levels=n) for b, n in ((1.0, 15), (1.5, 15), (3.0, 31), (4.0, 63))),
)
FEW = (compress.Uniform(bits=2), compress.Uniform(bits=3), compress.TopK(ratio=0.95875), compress.MaskEncoded())


def runs(scale):
    return study.measured(scale, f"{__spec__.name}:measure")


def measure(folder, cfg, scale):
    cuts = study.cuts(scale)
    maps = feature_maps.collect(str(folder), samples=250, cuts=cuts, **study.places(cfg))
    rows = []
    for cut in cuts:
        h = maps[f"{cut}/features"]
        kept = np.sort(np.abs(h.reshape(-1)))[-max(1, h.size // 100) :].astype(np.float64)
        alpha = float(np.sqrt(1 - np.sum(kept**2) / np.sum(h.astype(np.float64) ** 2)))
        for codec in FEW if scale == "smoke" else (*EQUAL, *MORE):
            row = {"cut": cut, "values": h.size, "alpha": alpha, **rate_distortion.measure(h, codec)}
            rows.append(row | {"bound": bound(codec, h)})
    return rows


def bound(codec, h):
    """The paper's bound on the relative squared error; None where it has none."""
    h = jnp.asarray(h)
    match codec:
        case compress.Uniform():
            found = compress.uniform_error_bound(h, codec.bits)
        case compress.TopK():
            found = compress.topk_error_bound(h, codec.ratio)
        case compress.MaskEncoded():
            found = compress.mask_encoded_error_bound(h, codec.ratio, codec.bits)
        case _:
            return None
    return float(found / jnp.sum(jnp.square(h)))


def report(scale, records):
    rows = study.measurements(records)
    header = ["codec at about 2.32 bits", "cut", "bits", "real bits", "error", "bound", "error is within it"]
    lines = []
    for codec in EQUAL:
        for cut in study.CUTS:
            own = [row for row in rows if row["codec"] == str(codec) and row["cut"] == cut]
            if not own:
                continue
            mean = {name: np.mean([row[name] for row in own]) for name in ("nominal_bits", "bits", "error")}
            bounds = [row["bound"] for row in own if row["bound"] is not None]
            nominal = "–" if codec.entropy_coded else f"{mean['nominal_bits']:.2f}"  # else that of its payload
            cells = [NAMES[type(codec).__name__], cut, nominal, f"{mean['bits']:.2f}"]
            cells += [study.mean_and_deviation([row["error"] for row in own], digits=4)]
            within = all(row["error"] <= row["bound"] * 1.001 for row in own) if bounds else None
            cells += [f"{np.mean(bounds):.3g}" if bounds else "–", {True: "yes", False: "**no**", None: "–"}[within]]
            lines.append(cells)
    for cut in study.CUTS:
        widths = [str(compress.Uniform(bits=bits)) for bits in (2, 3)]
        own = [row | {"bits": row["nominal_bits"]} for row in rows if row["cut"] == cut and row["codec"] in widths]
        if own:
            errors, limits = (_equal([r | {"error": r[name]} for r in own]) for name in ("error", "bound"))
            cells = [study.mean_and_deviation(errors, digits=4), f"{np.mean(limits):.3g}"]
            lines.append(["QU at equal bits", cut, "2.32", "–", *cells, "–"])
    alphas = [
        f"{cut} {study.mean_and_deviation(sorted({row['alpha'] for row in rows if row['cut'] == cut}))}"
        for cut in study.CUTS
    ]
    text = (
        f"α, of 1 % kept: {'; '.join(alphas)}. Theorem 4 wants α < 1/2 for MS's bound to beat that of QU.\n\n"
        f"{timing.table(header, lines)}\n\n![Error against compression ratio](compression_error.png)\n"
    )
    return study.Page(text, {"compression_error": plot(rows)})


def _equal(rows):
    """The error at 2.32 bits of each seed, between those of other rates."""
    by_seed = study.grouped(rows, "seed").values()
    return [rate_distortion.at(own, "bits", 2.32, "error") for own in by_seed]


def plot(rows):
    """A panel a cut; bounds are dashed."""
    figure = matplotlib.figure.Figure(figsize=(13, 4.5), layout="constrained")
    for axes, cut in zip(figure.subplots(1, len(study.CUTS), sharey=True), study.CUTS, strict=True):
        for color, (kind, name) in enumerate(NAMES.items()):
            points = {}
            for row in rows:
                if row["cut"] == cut and row["codec"].startswith(f"{kind}("):
                    # The rate of EntropyMask is known from its messages alone.
                    bits = row["bits"] if kind == "EntropyMask" else row["nominal_bits"]
                    points.setdefault(row["codec"], []).append((1 - bits / 32, row["error"], row["bound"] or np.nan))
            if points:
                x, error, limit = zip(*sorted(tuple(np.mean(found, axis=0)) for found in points.values()), strict=True)
                axes.semilogy(x, error, ".-", color=f"C{color}", label=name)
                axes.semilogy(x, limit, "--", color=f"C{color}", linewidth=0.8)
        axes.set(title=f"{cut} cut", xlabel="compression ratio, 1 − bits/32", xlim=(0.78, 0.98))
    figure.axes[0].set(ylabel="relative squared error")
    study.legend(figure.axes[::-1], fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

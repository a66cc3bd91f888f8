"""Error against real bits of every codec, beside the rate–distortion limit where the source is known.

    python -m experiments.rate_distortion                           # synthetic sources: about five minutes on two cores
    python -m experiments.rate_distortion --maps maps.npz           # and real ones, see experiments.feature_maps
    python -m experiments.rate_distortion --values 65536 --out /tmp/rd --codecs MaskEncoded EntropyMask

Bits are those of whole messages of `msjax.wire` with Huffman coding, by the number of values; errors are squared and
relative to the energy. The limit is that of independent values, by Blahut's and Arimoto's iteration on a fine histogram
of the source; real feature maps have neighbours that are alike, and no such limit is known of them. Writes a record
and a plot.
"""

import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from msjax import compress, wire

ROOT = pathlib.Path(__file__).parent
POINTS = 400  # of the histogram that the limit is computed on


def codecs(*, signed: bool) -> list[compress.Codec]:
    """Returns every codec at a range of rates."""
    found = [compress.MaskEncoded(bits=bits, signed=signed) for bits in (1, 2, 3, 4)]
    for kind in (compress.TopK, compress.RandTopK, compress.RandK):
        found += [kind(ratio=ratio) for ratio in (0.8, 0.9, 0.95875, 0.98)]
    for kind in (compress.Uniform, compress.StochasticUniform):
        found += [kind(bits=bits) for bits in (1, 2, 3, 4, 6)]
    for bits in (0.5, 1.0, 1.5, 2.0, 2.32, 3.0, 4.0):
        levels = 5 if bits < 1 else 15 if bits < 2 else 31 if bits < 4 else 63
        for rounding in ("nearest", "stochastic"):
            found.append(compress.EntropyMask(bits=bits, levels=levels, signed=signed, rounding=rounding))
    return found


def synthetic(values: int) -> dict[str, np.ndarray]:
    """Returns float32 samples (values,) by name."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(4, values))
    return {
        "relu(normal)": np.maximum(normal[0], 0).astype(np.float32),
        "normal": normal[0].astype(np.float32),
        "Student's t, 3 degrees": rng.standard_t(3, values).astype(np.float32),
        "80 % zeros": (np.abs(normal[0]) * (rng.random(values) < 0.2)).astype(np.float32),
        "max-pooled relu(normal)": np.maximum(normal, 0).max(0).astype(np.float32),
    }


@functools.partial(jax.jit, static_argnames="codec")
def _encode(h, key, *, codec):
    return codec.encode(h, key)


@functools.partial(jax.jit, static_argnames="codec")
def _decode(payload, like, *, codec):
    return codec.decode(payload, like)


def measure(h: np.ndarray, codec: compress.Codec) -> dict:
    """Returns real and nominal bits a value and the relative squared error of one codec."""
    key = jax.random.key(1) if codec.needs_key else None
    payload = jax.device_get(_encode(h, key, codec=codec))
    message = wire.encode(payload, codec, h, compression="huffman")
    decoded = _decode(payload, h, codec=codec)
    error = float(jnp.sum((decoded - h) ** 2) / np.sum(h.astype(np.float64) ** 2))
    nominal = codec.payload_bytes(h)
    return {
        "codec": str(codec),
        "bits": 8 * len(message) / h.size,
        "nominal_bits": 8 * nominal / h.size,
        "error": error,
    }


def limit(h: np.ndarray, *, rounds: int = 400) -> list[tuple[float, float]]:
    """Returns points (bits, relative squared error) of the rate–distortion curve of independent values as in `h`.

    Blahut, IEEE Trans. IT 18, 1972: for a slope, the output distribution that the best test channel has is a fixed
    point. Values are rounded to at most 2·POINTS levels: evenly spaced ones, and such as share out the energy evenly.
    """
    h = h.astype(np.float64) / np.sqrt(np.mean(h.astype(np.float64) ** 2))
    ordered = np.sort(h)
    energy = np.cumsum(ordered**2)
    tails = ordered[np.searchsorted(energy, np.linspace(0, energy[-1], POINTS, endpoint=False))]
    edges = np.unique(np.concatenate([np.linspace(-4, 4, POINTS), tails, [-1e-12, 1e-12]]))
    place = np.digitize(h, edges)
    counts = np.bincount(place, minlength=len(edges) + 1).astype(np.float64)
    sums = np.bincount(place, h, minlength=len(edges) + 1)
    x, p = sums[counts > 0] / counts[counts > 0], counts[counts > 0] / h.size
    # What was lost by rounding is part of the error.
    rounding = 1 - np.sum(p * x**2)
    distance = (x[:, None] - x[None]) ** 2
    curve = []
    for slope in np.geomspace(0.6, 3000, 20):
        # Without the smallest numbers, which processors are slow with.
        kernel, q = np.exp(-np.minimum(slope * distance, 300)), p.copy()
        for _ in range(rounds):
            q = np.maximum(q * ((p / (kernel @ q)) @ kernel), 1e-100)
        joint = p[:, None] * kernel * q[None] / (kernel @ q)[:, None]
        out = joint.sum(0)
        ratio = np.divide(joint, p[:, None] * out[None], out=np.ones_like(joint), where=joint > 0)
        curve.append((float(np.sum(joint * np.log2(ratio))), float(np.sum(joint * distance)) + rounding))
    return curve


def main() -> int:
    parser = timing.parser(__doc__)
    parser.set_defaults(out=ROOT / "results" / "rate_distortion")
    parser.add_argument("--values", type=int, default=1 << 20, help="of the synthetic sources")
    parser.add_argument("--maps", type=pathlib.Path, help="a file of experiments.feature_maps")
    parser.add_argument("--codecs", nargs="+", help="names of some codecs; by default all")
    options = parser.parse_args()
    start = time.monotonic()
    sources = synthetic(options.values)
    curves = {name: limit(h) for name, h in sources.items()}
    if options.maps:
        with np.load(options.maps) as maps:
            sources |= {name: maps[name] for name in sorted(maps)}
    rows = []
    for name, h in sources.items():
        for codec in codecs(signed=bool((h < 0).any())):
            if options.codecs is None or type(codec).__name__ in options.codecs:
                rows.append({"source": name, **measure(h, codec)})
                print(f"{name}: {rows[-1]['bits']:.3f} bits, error {rows[-1]['error']:.5f}, {codec}", flush=True)
    rows += [{"source": name, "codec": "limit", "bits": b, "error": e} for name, c in curves.items() for b, e in c]
    print(table(rows))
    timing.save(options.out, timing.record(options, rows, time.monotonic() - start), plot(rows))
    return 0


def table(rows: list[dict]) -> str:
    """Returns, of each source, MS and what EntropyMask makes of its bits and of its error, as a Markdown table."""
    lines = []
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        ms = next((row for row in own if row["codec"].startswith("MaskEncoded(ratio=0.99, bits=2")), None)
        ours = [row for row in own if row["codec"].startswith("EntropyMask") and "nearest" in row["codec"]]
        if ms is None or not ours:
            continue
        error = at(ours, "bits", ms["nominal_bits"], "error")
        bits = at(ours, "error", ms["error"], "bits")
        best = at([row for row in own if row["codec"] == "limit"], "bits", ms["nominal_bits"], "error")
        cells = [f"{ms['nominal_bits']:.2f}", f"{ms['bits']:.2f}", f"{ms['error']:.4f}", f"{error:.5f}"]
        cells += ["–" if best is None else f"{best:.5f}", f"{bits:.2f}", f"{32 / bits:.1f}×"]
        lines.append([source, *cells])
    header = ["source", "MS, bits", "with Huffman", "error", "EntropyMask at MS's bits", "limit", "bits at MS's error"]
    return timing.table([*header, "saved"], lines)


def at(rows: list[dict], along: str, value: float, of: str) -> float | None:
    """`of` interpolated over `along`: bits as they are, errors by their logarithm; None without rows.

    Beyond what was measured it is that of the nearest row, so that no ratio can be made with `value` there.
    """
    if not rows:
        return None
    scale = {"bits": (lambda x: x, lambda x: x), "error": (np.log, np.exp)}
    rows = sorted(rows, key=lambda row: row[along])
    xs, ys = ([scale[name][0](row[name]) for row in rows] for name in (along, of))
    return float(scale[of][1](np.interp(scale[along][0](value), xs, ys)))


def plot(rows: list[dict]):
    """Returns a figure, one panel a source."""
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(row["source"] for row in rows))
    across = min(3, len(sources))
    down = -(-len(sources) // across)
    figure = Figure(figsize=(5 * across, 4 * down))
    axes = figure.subplots(down, across, squeeze=False).reshape(-1)
    for ax, source in zip(axes, sources, strict=False):
        kinds = {}
        for row in rows:
            if row["source"] == source:
                stochastic = ", unbiased" if "stochastic" in row["codec"] else ""
                kinds.setdefault(row["codec"].partition("(")[0] + stochastic, []).append((row["bits"], row["error"]))
        for kind, points in kinds.items():
            ax.semilogy(*zip(*sorted(points), strict=True), "k--" if kind == "limit" else ".-", label=kind)
        ax.set(title=source, xlabel="real bits a value", ylabel="relative squared error", xlim=(0, 5), ylim=(1e-4, 2))
    for ax in axes[len(sources) :]:
        ax.axis("off")
    axes[len(sources) - 1].legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())

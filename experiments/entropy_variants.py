"""What `EntropyMask` might have been: parts that were tried, and what each would save or cost in real bits.

    python -m experiments.entropy_variants --maps maps.npz       # a file of experiments.feature_maps; three minutes

Every variant differs from the codec in one thing. Its curve of relative squared error against bits a value is drawn
with some twenty steps, and read off at the errors of MS and of a seventh of that. "Huffman" is zlib's, real bytes;
"entropy" is what an ideal arithmetic coder or rANS would come to, with the cost of describing its statistics, half of
log2(values) a parameter (Rissanen, Ann. Statist. 14, 1986). Writes a record.

What the record says. The parts that the codec has each earn their place: without conditional means or the dead zone
features take 2 to 8 % more. Widening steps, a step for each channel, Hadamard rotation (which spreads the zeros) and
product quantization cost more than they save. An ideal coder instead of zlib's Huffman code saves at most 4 %, as pairs
of codes share a byte. Channels first would save 2 to 7 % for a transposition on either side, and is left to who
arranges the features. Only contexts of neighbours save much, 6 to 27 %: `msjax.wire` has come to use them, with zlib,
see `experiments.contexts`.
"""

import pathlib
import sys
import time
from collections.abc import Callable, Iterable

import numpy as np
import scipy.linalg

from benchmarks import timing
from experiments import rate_distortion
from msjax.compress import _deflate

ROOT = pathlib.Path(__file__).parent
ERRORS = (0.07, 0.01)
STEPS = np.geomspace(0.08, 6, 20)  # in standard deviations
HALF = 16  # bits of an outlier, and of a level


# -- Quantizers: values and a step to codes, and what they decode to. --------------------------------------------------


def uniform(h, step, *, dead_zone=0.1, levels=15, means=True, power=1.0):
    """(codes, decoded, bits of outliers and levels); codes from −m to m, and m + 1 for outliers.

    With `power` below 1 the steps widen with the values: they are even in x^power.
    """
    signed = bool((h < 0).any())
    most = levels // 2 if signed else levels - 1
    magnitude = (np.abs(h) / step) ** power
    codes = np.where(magnitude < 0.5 + dead_zone, 0, np.floor(magnitude + 0.5))
    beyond = codes > most
    codes = np.where(beyond, most + 1, np.copysign(codes, h)).astype(np.int32)
    table = np.copysign(np.abs(np.arange(-most, most + 1)) ** (1 / power) * step, np.arange(-most, most + 1))
    if means:
        count = np.bincount(codes.reshape(-1) + most, minlength=2 * most + 2)[:-1]
        total = np.bincount(codes.reshape(-1) + most, h.reshape(-1), minlength=2 * most + 2)[:-1]
        table = np.where(count > 0, total / np.maximum(count, 1), table)
    decoded = np.where(beyond, h.astype(np.float16), table[np.minimum(codes, most) + most])
    return codes, decoded, HALF * (beyond.sum() + levels)


def channel_steps(h, step, **options):
    """Steps in proportion to each channel's own deviation, but for the factor that keeps their geometric mean."""
    scale = h.std(axis=(0, 1, 2)) + 1e-12 * h.std()
    scale /= np.exp(np.mean(np.log(scale)))
    codes, decoded, bits = uniform(h / scale, step, **options)
    return codes, decoded * scale, bits + HALF * scale.size


def hadamard(h, step, **options):
    """Channels rotated by a Hadamard matrix with random signs (as in QuIP, arXiv 2307.13304)."""
    c = h.shape[-1]
    padded = 1 << (c - 1).bit_length()
    matrix = scipy.linalg.hadamard(padded)[:, :c] / np.sqrt(padded)
    matrix = matrix * np.random.default_rng(0).choice([-1, 1], c)
    codes, decoded, bits = uniform(h @ matrix.T, step, **options)
    return codes, decoded @ matrix, bits


# -- Coders: bits of codes. --------------------------------------------------------------------------------------------


def huffman_bytes(codes, *, levels=15):
    """zlib's Huffman code of bytes that hold as many codes as fit, as the codec does it."""
    symbols = (codes - min(codes.min(), 0)).reshape(-1)
    base = levels + 1
    together = next(g for g in range(8, 0, -1) if base**g <= 256)
    digits = np.pad(symbols, (0, -symbols.size % together)).reshape(-1, together)
    return 8 * len(_deflate.huffman((digits * base ** np.arange(together)).sum(1).astype(np.uint8).tobytes()))


def channels_first(codes, **options):
    return huffman_bytes(np.ascontiguousarray(np.moveaxis(codes, -1, 1)), **options)


def entropy(codes, contexts=None):
    """Bits of an ideal coder with the statistics of each context."""
    symbols = (codes - codes.min()).reshape(-1).astype(np.int64)
    count = symbols.max() + 1
    contexts = np.zeros(symbols.size, np.int64) if contexts is None else contexts.reshape(-1).astype(np.int64)
    joint = np.bincount(contexts * count + symbols, minlength=(contexts.max() + 1) * count).reshape(-1, count)
    share = joint / np.maximum(joint.sum(1, keepdims=True), 1)
    body = -np.sum(joint * np.log2(np.where(share > 0, share, 1)))
    return body + 0.5 * np.log2(symbols.size) * np.count_nonzero(joint)


def entropy_of_pairs(codes):
    symbols = (codes - codes.min()).reshape(-1)
    return entropy(np.pad(symbols, (0, symbols.size % 2)).reshape(-1, 2) @ [symbols.max() + 1, 1])


def neighbours(codes):
    """A context of the codes to the left, above, and in the channel before."""
    size = np.minimum(np.abs(codes), 3)
    left, above, before = (np.zeros_like(size) for _ in range(3))
    left[:, :, 1:], above[:, 1:], before[..., 1:] = size[:, :, :-1], size[:, :-1], size[..., :-1]
    return (left * 4 + above) * 4 + before


def channels(codes):
    return np.broadcast_to(np.arange(codes.shape[-1]), codes.shape)


def both(codes):
    size = np.minimum(np.abs(codes), 2)
    left, above = np.zeros_like(size), np.zeros_like(size)
    left[:, :, 1:], above[:, 1:] = size[:, :, :-1], size[:, :-1]
    return (channels(codes) * 3 + left) * 3 + above


# -- Variants: values and a step to (bits a value, relative squared error). --------------------------------------------


def variant(quantizer: Callable = uniform, coder: Callable = huffman_bytes, **options) -> Callable:
    def measure(h, step):
        codes, decoded, bits = quantizer(h, step, **options)
        levels = {"levels": options["levels"]} if "levels" in options else {}
        return (coder(codes, **levels) + bits) / h.size, np.sum((h - decoded) ** 2) / np.sum(h**2)

    return measure


def product(values: int) -> Callable:
    """Product quantization: neighbours by k-means to 2 … 256 centroids, whose numbers are Huffman-coded.

    (Jégou et al., IEEE TPAMI 33, 2011). Here the step says how many centroids.
    """

    def measure(h, step):
        flat = h.reshape(-1)
        vectors = flat[: flat.size // values * values].reshape(-1, values)
        count = int(np.clip(2 ** np.round(8 - 1.5 * np.log2(step / STEPS[0])), 2, 256))
        from sklearn import cluster  # which nothing else needs

        means = cluster.MiniBatchKMeans(count, batch_size=4096, n_init=1, random_state=0, max_iter=10)
        means.fit(vectors[np.random.default_rng(0).permutation(len(vectors))[:100_000]])
        codes = means.predict(vectors)
        bits = 8 * len(_deflate.huffman(codes.astype(np.uint8).tobytes())) + HALF * means.cluster_centers_.size
        error = np.sum((vectors - means.cluster_centers_[codes]) ** 2) / np.sum(vectors**2)
        return bits / vectors.size, error

    return measure


BASE = "EntropyMask: Huffman, 2 codes a byte"
VARIANTS = {
    BASE: variant(),
    "no dead zone": variant(dead_zone=0.0),
    "dead zone 0.2": variant(dead_zone=0.2),
    "middles instead of means": variant(means=False),
    "steps that widen, x^0.8": variant(power=0.8),
    "5 levels, 3 codes a byte": variant(levels=5),
    "31 levels, 1 code a byte": variant(levels=31),
    "channels first": variant(coder=channels_first),
    "a step for each channel": variant(channel_steps),
    "Hadamard rotation": variant(hadamard),
    "product quantization, 2 values": product(2),
    "product quantization, 4 values": product(4),
    "entropy of single codes (rANS)": variant(coder=entropy),
    "entropy of pairs (rANS)": variant(coder=entropy_of_pairs),
    "entropy, a context for each channel": variant(coder=lambda codes: entropy(codes, channels(codes))),
    "entropy, contexts of neighbours": variant(coder=lambda codes: entropy(codes, neighbours(codes))),
    "entropy, contexts of channel and neighbours": variant(coder=lambda codes: entropy(codes, both(codes))),
}


def compare(h: np.ndarray, names: Iterable[str] = VARIANTS) -> dict[str, list[float | None]]:
    """Returns, of each variant, its bits a value at each of `ERRORS`; None where its curve does not go there."""
    h = h.astype(np.float64)
    found = {}
    for name in names:
        points = [dict(zip(("bits", "error"), VARIANTS[name](h, step * h.std()), strict=True)) for step in STEPS]
        errors = [point["error"] for point in points]
        found[name] = [
            rate_distortion.at(points, "error", e, "bits") if min(errors) <= e <= max(errors) else None for e in ERRORS
        ]
    return found


def table(rows: list[dict]) -> str:
    """Returns a Markdown table of bits: of the codec as they are, of variants by how many percent they differ."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    base = {(row["source"], e): row["bits"][n] for row in rows if row["variant"] == BASE for n, e in enumerate(ERRORS)}

    def cell(row, n):
        bits, reference = row["bits"][n], base[row["source"], ERRORS[n]]
        if bits is None or reference is None:
            return "–"
        return f"{bits:.2f}" if row["variant"] == BASE else f"{100 * (bits / reference - 1):+.1f} %"

    lines = []
    for name in VARIANTS:
        own = {row["source"]: row for row in rows if row["variant"] == name}
        lines.append([name, *(cell(own[source], n) for n in range(len(ERRORS)) for source in sources)])
    return timing.table(["variant", *(f"{source}, error {e}" for e in ERRORS for source in sources)], lines)


def main() -> int:
    parser = timing.parser(__doc__)
    parser.set_defaults(out=ROOT / "results" / "entropy_variants")
    parser.add_argument("--maps", type=pathlib.Path, required=True, help="a file of experiments.feature_maps")
    parser.add_argument("--samples", type=int, default=100, help="of each map")
    options = parser.parse_args()
    start = time.monotonic()
    rows = []
    with np.load(options.maps) as maps:
        for source in sorted(maps):
            found = compare(maps[source][: options.samples])
            rows += [{"source": source, "variant": name, "bits": bits} for name, bits in found.items()]
            print(f"{source}: {time.monotonic() - start:.0f} s", flush=True)
    print(table(rows))
    timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())

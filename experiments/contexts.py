"""What neighbours save: real bytes of codes of real maps, by the codings of `msjax.wire` and by what else was tried.

    python -m experiments.contexts --weights resnet20.safetensors --data-dir DIR      # half an hour on two busy cores
    python -m experiments.contexts --weights resnet20.safetensors --data-dir DIR --save-maps maps.npz

Features and gradients of the mean loss behind four blocks of the published ResNet20 (see `published_weights`), of
CIFAR-10's first training images, not augmented, as in training. "Today" is what version 2 had: the shorter of zlib's
Huffman code and of that with runs. "Flags" codes the commonest byte by one bit; the classes have flags, too, where
they are shorter. "Above" takes classes from the pixel above alone, and the others from those to the left and above.
"Channels first" and "pairs of pixels" put other codes into a byte, and code it as today. The estimate is that of
`wire.estimate_bytes` against the whole message; speeds are those of one core beside other work. Writes a
record; what is done is kept, and not done again.

What the record says, of two of the blocks and 25 samples so far, since the machine was busy. With 16 classes features
take 16 to 47 % less than before, gradients 5 to 19 %, most of it by flags where noise is let grow. Putting codes of one
channel into a byte saves 11 to 41 % of features without classes, but less than they do. Of 4, 9 and 16 classes the
last are best or near it. Estimates are within 3.1 %. Encoding, with its trial, has a tenth to a half of the speed of
Huffman's code alone.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import feature_maps, published_weights
from msjax import compress, wire
from msjax.compress import _contexts, _deflate

ROOT = pathlib.Path(__file__).parent
BLOCKS = ("stage1_block1", "stage1_block3", "stage2_block3", "stage3_block3")
FEATURES = (*(compress.EntropyMask(bits=bits) for bits in (0.5, 1.1, 1.6, 2.3)), compress.MaskEncoded())
GRADIENTS = tuple(
    compress.EntropyMask(signed=True, rounding="stochastic", **target) for target in ({"error": 0.3}, {"bits": 1.5})
)


def maps_of(weights: str, data_dir: str, samples: int) -> dict[str, np.ndarray]:
    """Returns `BLOCK/features` and `BLOCK/gradients`, float32 (samples, height, width, channels)."""
    network, found = published_weights.network("resnet20", weights, data_dir), {}
    x, labels = network.batch(samples)
    for cut in network.list_cuts():
        if cut.block in BLOCKS:
            h, g = feature_maps.at_cut(*network.cuts(cut.layer), x, labels, label_smoothing=0.0)
            found[f"{cut.block}/features"], found[f"{cut.block}/gradients"] = np.asarray(h), np.asarray(g)
    return found


def measure(h: np.ndarray, codec: compress.Codec, repeats: int) -> dict:
    """Returns bytes of the codes of `h` by coding, the estimate's error, and speeds in codes a second."""
    payload = jax.jit(codec.encode)(jnp.asarray(h), jax.random.key(0) if codec.needs_key else None)
    payload = jax.device_get(payload)
    raw, grid = payload.codes, _contexts.grid_of(codec, h)
    found = {"today": today(raw), "flags": len(_contexts.coded(raw, None)), **reordered(raw, codec, h.shape)}
    if grid is not None:
        found["above, 16 classes"] = above_bytes(raw, grid)
        for levels in (2, 3, 4):
            found[f"left and above, {levels**2} classes"] = classes_bytes(raw, grid, levels)
    message = wire.encode(payload, codec, h, compression="huffman")
    estimate = jax.jit(functools.partial(wire.estimate_bytes, codec=codec, like=h, compression="huffman"))(payload)
    row = {"bytes": found, "raw_bytes": raw.size, "message_bytes": len(message), "version": message[4]}
    row["estimate_percent"] = 100 * (float(estimate) / len(message) - 1)
    if grid is not None:
        coded = memoryview(_contexts.coded(raw, grid))
        calls = {
            "Huffman": lambda: _deflate.huffman(raw),
            "classes": lambda: _contexts.coded(raw, grid),
            "classes, decoded": lambda: _contexts.decoded(coded, raw.size, grid),
            "encode": lambda: wire.encode(payload, codec, h, compression="huffman"),
            "decode": lambda: wire.decode(message, expect=(codec, h)),
        }
        seconds = timing.interleaved(calls, repeats=repeats)
        row["values_a_second"] = {name: h.size / value for name, value in seconds.items()}
    return row


def today(raw):
    return min(raw.size, len(_deflate.huffman(raw)), len(_deflate.runs(raw)))


def classes_bytes(raw, grid, levels):
    """As `_contexts.coded`, with the first of its thresholds in as many levels."""
    factors = tuple(3.5 * (level / levels) ** 1.5 for level in range(1, levels))
    before, _contexts._FACTORS = _contexts._FACTORS, factors
    try:
        return len(_contexts.coded(raw, grid))
    finally:
        _contexts._FACTORS = before


def above_bytes(raw, grid):
    """As if each row were a column of its own: the neighbour above is the only one."""
    shape = (grid.samples, grid.height, grid.width, grid.pixel_bytes)
    columns = np.ascontiguousarray(raw.reshape(shape).transpose(0, 2, 1, 3)).reshape(-1)
    alone = dataclasses.replace(grid, samples=grid.samples * grid.width, width=1)
    return len(_contexts.coded(columns, alone))


def reordered(raw, codec, shape):
    """Codes of other neighbours in a byte, coded as today."""
    form = _contexts._form(codec)
    if form is None:
        return {}
    base, together, _ = form
    places = base ** np.arange(together)
    codes = (raw[:, None] // places % base).reshape(-1)[: int(np.prod(shape))].reshape(shape)

    def packed(codes):
        return (np.pad(codes.reshape(-1), (0, -codes.size % together)).reshape(-1, together) * places).sum(1)

    b, height, width, c = shape
    first = np.moveaxis(codes, -1, 1)
    pairs = codes.reshape(b, height, width // 2, 2, c).swapaxes(3, 4)
    return {
        "channels first": today(packed(first).astype(np.uint8)),
        "pairs of pixels": today(packed(pairs).astype(np.uint8)),
    }


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: bits a value of today's codes, and by how many percent others differ."""
    names = list(dict.fromkeys(name for row in rows for name in row["bytes"] if name != "today"))
    lines = []
    for row in rows:
        before = row["bytes"]["today"]
        cells = [f"{row['source']}, {row['samples']} samples, {row['codec']}", f"{before:,}"]
        cells.append(f"{8 * before / row['values']:.3f}")
        cells += [f"{100 * (row['bytes'][n] / before - 1):+.1f} %" if n in row["bytes"] else "–" for n in names]
        cells.append(f"{row['estimate_percent']:+.1f} %")
        speeds = row.get("values_a_second", {})
        cells.append(", ".join(f"{speeds[n] / 1e6:.0f}" for n in ("encode", "decode")) if speeds else "–")
        lines.append(cells)
    header = ["codes of", "bytes today", "bits a value", *names, "estimate", "M values/s, to bytes and back"]
    return timing.table(header, lines)


def parser_of(description: str, name: str) -> argparse.ArgumentParser:
    """Returns the parser of a study of these maps, whose record has this name."""
    parser = timing.parser(description)
    parser.set_defaults(out=ROOT / "results" / name, repeats=5)
    parser.add_argument("--weights", required=True, help="the safetensors file of ResNet20")
    parser.add_argument("--data-dir", required=True, help="where CIFAR-10 is, as --data.data-dir of msjax train")
    return parser


def main() -> int:
    parser = parser_of(__doc__, "contexts")
    parser.add_argument("--samples", type=int, nargs="+", default=[25, 250])
    parser.add_argument("--save-maps", type=pathlib.Path, help="saves the maps for benchmarks.wire, and ends")
    options = parser.parse_args()
    maps = maps_of(options.weights, options.data_dir, max(options.samples))
    if options.save_maps:
        np.savez(options.save_maps, **maps)
        return 0
    made = timing.Continued(options.out)
    rows = made.rows
    done = {(row["source"], row["samples"], row["codec"]) for row in rows}
    for samples in options.samples:
        for source, h in maps.items():
            for codec in FEATURES if source.endswith("features") else GRADIENTS:
                if (source, samples, _short(codec)) in done:
                    continue
                row = {"source": source, "samples": samples, "codec": _short(codec), "values": h[:samples].size}
                rows.append(row | measure(h[:samples], codec, options.repeats))
                made.save(options)
            print(f"{source}, {samples}: {made.seconds:.0f} s", flush=True)
    print(table(rows))
    return 0


def _short(codec):
    """Its name and what it aims at."""
    aims = [f"{name}={getattr(codec, name)}" for name in ("bits", "error") if getattr(codec, name, None) is not None]
    return f"{type(codec).__name__}({', '.join(aims)})"


if __name__ == "__main__":
    sys.exit(main())

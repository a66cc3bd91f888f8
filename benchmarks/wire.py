"""Lossless coders on packed codes: bits an element and speed; and the whole way from features to message and back.

    taskset -c 0 python -m benchmarks.wire                   # 4 M values of relu(N(0, 1)): about a minute
    python -m benchmarks.wire --maps maps.npz                # and maps that experiments.feature_maps or .contexts saved
    python -m benchmarks.wire --maps maps.npz --choice       # only how a message's coding is chosen

The coders are to choose from what `msjax.wire` offers; "classes" is its coding by neighbours, of codes that have some.
With `--choice` messages of features and gradients are made in two ways, side by side: with the coding that an estimate
chooses, as `wire.encode` does, and with the shortest of all codings, made whole by the same coders. The coders have
one thread, JAX on the whole way as many as it gets.
"zstd literals" is level 1 with matches of at least 7 bytes and the smallest hash table, which leaves nearly all to its
Huffman coder. Needs `pip install -e '.[bench]'`.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from benchmarks import timing
from msjax import compress, wire
from msjax.compress import _coding_costs, _contexts, _deflate

WHOLE = (
    compress.MaskEncoded(),
    compress.EntropyMask(),
    compress.EntropyMask(bits=2.0),
    compress.EntropyMask(levels=31),
)
CHOSEN = {
    "features": (*(compress.EntropyMask(bits=bits) for bits in (0.5, 1.0, 1.5, 2.0)), compress.MaskEncoded()),
    "gradients": tuple(
        compress.EntropyMask(signed=True, rounding="stochastic", **target) for target in ({"error": 0.3}, {"bits": 1.5})
    ),
}
CODECS = (compress.MaskEncoded(), compress.MaskEncoded(bits=3), compress.TopK(), compress.Uniform(bits=3))


def zstd(parameters):
    return zstandard.ZstdCompressor(compression_params=parameters).compress, zstandard.ZstdDecompressor().decompress


_from_level = zstandard.ZstdCompressionParameters.from_level
CODERS = {
    "zlib Huffman": (_deflate.huffman, functools.partial(zlib.decompress, wbits=-15)),
    "zlib 1": (functools.partial(zlib.compress, level=1), zlib.decompress),
    "zlib 6": (functools.partial(zlib.compress, level=6), zlib.decompress),
    "zstd literals": zstd(_from_level(1, min_match=7, hash_log=6, strategy=zstandard.STRATEGY_FAST)),
    "zstd 1": zstd(_from_level(1)),
    "zstd 3": zstd(_from_level(3)),
}


def main() -> int:
    parser = timing.parser(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--maps", type=pathlib.Path, help="a file of experiments.feature_maps or experiments.contexts")
    parser.add_argument("--choice", action="store_true", help="only how a message's coding is chosen")
    parser.add_argument("--samples", type=int, help="the first so many samples of each map; by default all")
    options = parser.parse_args()
    start = time.monotonic()
    relu = np.maximum(np.random.default_rng(0).normal(size=(64, 16, 16, 256)), 0).astype(np.float32)
    sources = {"relu(N(0, 1))": relu}
    if options.maps:
        with np.load(options.maps) as maps:
            sources |= {name: maps[name][: options.samples] for name in maps}
    if options.choice:
        rows = choices(sources, options)
        print(choice_table(rows))
        if options.out:
            timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
        return 0
    rows, ways = [], []
    for name, h in sources.items():
        if name.endswith("gradients"):
            ways += [whole_way(name, h, codec, options.repeats) for codec in CHOSEN["gradients"]]
            continue
        rows += [row for codec in CODECS for row in measure(name, h, codec, options.repeats)]
        ways += [whole_way(name, h, codec, options.repeats) for codec in WHOLE]
    print(table(rows), whole_table(ways), sep="\n\n")
    if options.out:
        timing.save(options.out, timing.record(options, rows + ways, time.monotonic() - start))
    return 0


def measure(source: str, h: np.ndarray, codec: compress.Codec, repeats: int) -> list[dict]:
    """Returns one row a coder, of the bytes and seconds that it takes for the packed codes of `h`."""
    packed = max((leaf for leaf in codec.encode_numpy(h) if leaf.dtype == np.uint8), key=lambda leaf: leaf.nbytes)
    packed = packed.reshape(-1)
    raw, coders, grid = packed.tobytes(), dict(CODERS), _contexts.grid_of(codec, h)
    if grid is not None and grid.buffer_bytes == packed.size:
        coders["classes"] = (
            lambda raw: _contexts.coded(np.frombuffer(raw, np.uint8), grid),
            lambda coded: _contexts.decoded(memoryview(coded), packed.size, grid).tobytes(),
        )
    coded = {name: encode(raw) for name, (encode, _) in coders.items()}
    contenders = {}
    for name, (encode, decode) in coders.items():
        if decode(coded[name]) != raw:
            raise RuntimeError(f"{name} does not give back what it coded")
        contenders[name, "encode"] = functools.partial(encode, raw)
        contenders[name, "decode"] = functools.partial(decode, coded[name])
    seconds = timing.interleaved(contenders, repeats=repeats, warmup=1)
    return [
        {
            "source": source,
            "codec": str(codec),
            "coder": name,
            "values": h.size,
            "raw_bytes": len(raw),
            "coded_bytes": len(coded[name]),
            "encode_seconds": seconds[name, "encode"],
            "decode_seconds": seconds[name, "decode"],
        }
        for name in coders
    ]


def whole_way(source: str, h: np.ndarray, codec: compress.Codec, repeats: int) -> dict:
    """Returns the bytes of a message, and the seconds from features to it and from it to features."""
    h, key = jnp.asarray(h), jax.random.key(0) if codec.needs_key else None
    encode = jax.jit(codec.encode)
    decode = jax.jit(lambda payload: codec.decode(payload, jax.ShapeDtypeStruct(h.shape, h.dtype)))

    def send():
        return wire.encode(jax.device_get(encode(h, key)), codec, h, compression="huffman")

    message = send()
    contenders = {"send": send, "receive": lambda: decode(wire.decode(message, expect=(codec, h)).payload)}
    seconds = timing.interleaved(contenders, repeats=repeats)
    row = {"source": source, "codec": str(codec), "values": h.size, "message_bytes": len(message)}
    return row | {f"{name}_seconds": value for name, value in seconds.items()}


def whole_table(rows: list[dict]) -> str:
    """Returns a Markdown table: real bits an element, and millions of elements a second each way."""
    lines = []
    for row in rows:
        speeds = (f"{row['values'] / row[f'{name}_seconds'] / 1e6:.0f}" for name in ("send", "receive"))
        lines.append([f"{row['source']}, {row['codec']}", f"{8 * row['message_bytes'] / row['values']:.3f}", *speeds])
    return timing.table(["features or gradients", "real bits", "to bytes, M/s", "back, M/s"], lines)


def choices(sources: dict[str, np.ndarray], options: argparse.Namespace) -> list[dict]:
    """Returns one row a map and codec: bytes and seconds of a message, its coding chosen in two ways."""
    rows = []
    for name, h in sources.items():
        for codec in CHOSEN["gradients" if name.endswith("gradients") else "features"]:
            rows.append(choice(name, h, codec, options.repeats))
            print("{source}, {codec}: {estimate_bytes} and {all_bytes} bytes".format(**rows[-1]), flush=True)
    return rows


def choice(source: str, h: np.ndarray, codec: compress.Codec, repeats: int) -> dict:
    """Returns the bytes of the message of `h` and the seconds from payload to message, both ways.

    Seconds are the medians of those of the processor, which other work on the machine disturbs less.
    """
    payload = jax.jit(codec.encode)(jnp.asarray(h), jax.random.key(0) if codec.needs_key else None)
    payload = jax.device_get(payload)

    def send():
        return wire.encode(payload, codec, h, compression="huffman")

    def send_shortest():
        before, _coding_costs.ALWAYS_WHOLE = _coding_costs.ALWAYS_WHOLE, 1 << 62
        try:
            return send()
        finally:
            _coding_costs.ALWAYS_WHOLE = before

    calls = {"estimate": send, "all": send_shortest}
    row = {"source": source, "codec": str(codec), "values": h.size}
    row |= {f"{name}_bytes": len(call()) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return row | {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}


def choice_table(rows: list[dict]) -> str:
    """Returns a Markdown table: bytes against the shortest, and millions of values a second both ways."""
    lines = []
    for row in rows:
        more = 100 * (row["estimate_bytes"] / row["all_bytes"] - 1)
        speeds = (f"{row['values'] / row[f'{name}_seconds'] / 1e6:.0f}" for name in ("all", "estimate"))
        bits = f"{8 * row['estimate_bytes'] / row['values']:.3f}"
        lines.append([f"{row['source']}, {row['codec'].split(', r')[0]}", bits, f"{more:+.2f} %", *speeds])
    return timing.table(["message of", "real bits", "above the shortest", "all tried, M/s", "estimated, M/s"], lines)


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: of each coder bits an element, and millions of elements a second to code and decode."""
    lines, names = [], list(dict.fromkeys(row["coder"] for row in rows))
    for row in [row for row in rows if row["coder"] == names[0]]:
        same = {r["coder"]: r for r in rows if (r["source"], r["codec"]) == (row["source"], row["codec"])}
        cells = [f"{row['source']}, {row['codec'].split(', r')[0]}", f"{8 * row['raw_bytes'] / row['values']:.2f}"]
        for r in map(same.get, names):
            if r is None:
                cells.append("–")
                continue
            speeds = (r["values"] / r[f"{operation}_seconds"] / 1e6 for operation in ("encode", "decode"))
            cells.append(f"{8 * r['coded_bytes'] / r['values']:.3f} ({', '.join(f'{s:.0f}' for s in speeds)})")
        lines.append(cells)
    return timing.table(["codes of", "packed, bits", *names], lines)


if __name__ == "__main__":
    sys.exit(main())

"""Lossless coders on packed codes: bits an element and speed; and the whole way from features to message and back.

    taskset -c 0 python -m benchmarks.wire                   # 4 M values of relu(N(0, 1)): about a minute
    python -m benchmarks.wire --maps maps.npz                # and the feature maps that experiments.feature_maps saved

The coders are to choose from what `msjax.wire` offers. They have one thread, JAX on the whole way as many as it gets.
"zstd literals" is level 1 with matches of at least 7 bytes and the smallest hash table, which leaves nearly all to its
Huffman coder. Needs `pip install -e '.[bench]'`.
"""

import functools
import pathlib
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from benchmarks import timing
from msjax import compress, wire

WHOLE = (
    compress.MaskEncoded(),
    compress.EntropyMask(),
    compress.EntropyMask(bits=2.0),
    compress.EntropyMask(levels=31),
)
CODECS = (compress.MaskEncoded(), compress.MaskEncoded(bits=3), compress.TopK(), compress.Uniform(bits=3))


def zstd(parameters):
    return zstandard.ZstdCompressor(compression_params=parameters).compress, zstandard.ZstdDecompressor().decompress


_from_level = zstandard.ZstdCompressionParameters.from_level
CODERS = {
    "zlib Huffman": (wire.huffman, functools.partial(zlib.decompress, wbits=-15)),
    "zlib 1": (functools.partial(zlib.compress, level=1), zlib.decompress),
    "zlib 6": (functools.partial(zlib.compress, level=6), zlib.decompress),
    "zstd literals": zstd(_from_level(1, min_match=7, hash_log=6, strategy=zstandard.STRATEGY_FAST)),
    "zstd 1": zstd(_from_level(1)),
    "zstd 3": zstd(_from_level(3)),
}


def main() -> int:
    parser = timing.parser(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--maps", type=pathlib.Path, help="a file of experiments.feature_maps")
    options = parser.parse_args()
    start = time.monotonic()
    relu = np.maximum(np.random.default_rng(0).normal(size=(64, 16, 16, 256)), 0).astype(np.float32)
    sources = {"relu(N(0, 1))": relu}
    if options.maps:
        with np.load(options.maps) as maps:
            sources |= {name: maps[name] for name in maps if name.endswith("features")}
    rows, ways = [], []
    for name, h in sources.items():
        rows += [row for codec in CODECS for row in measure(name, h, codec, options.repeats)]
        ways += [whole_way(name, h, codec, options.repeats) for codec in WHOLE]
    print(table(rows), whole_table(ways), sep="\n\n")
    if options.out:
        timing.save(options.out, timing.record(options, rows + ways, time.monotonic() - start))
    return 0


def measure(source: str, h: np.ndarray, codec: compress.Codec, repeats: int) -> list[dict]:
    """Returns one row a coder, of the bytes and seconds that it takes for the packed codes of `h`."""
    raw = max(
        (leaf for leaf in codec.encode_numpy(h) if leaf.dtype == np.uint8), key=lambda leaf: leaf.nbytes
    ).tobytes()
    coded = {name: encode(raw) for name, (encode, _) in CODERS.items()}
    contenders = {}
    for name, (encode, decode) in CODERS.items():
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
        for name in CODERS
    ]


def whole_way(source: str, h: np.ndarray, codec: compress.Codec, repeats: int) -> dict:
    """Returns the bytes of a message, and the seconds from features to it and from it to features."""
    h = jnp.asarray(h)
    encode = jax.jit(codec.encode)
    decode = jax.jit(lambda payload: codec.decode(payload, jax.ShapeDtypeStruct(h.shape, h.dtype)))

    def send():
        return wire.encode(jax.device_get(encode(h)), codec, h, compression="huffman")

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
    return timing.table(["features", "real bits", "to bytes, M/s", "back, M/s"], lines)


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: of each coder bits an element, and millions of elements a second to code and decode."""
    lines = []
    for row in rows[:: len(CODERS)]:
        same = [r for r in rows if (r["source"], r["codec"]) == (row["source"], row["codec"])]
        cells = [f"{row['source']}, {row['codec'].split(', r')[0]}", f"{8 * row['raw_bytes'] / row['values']:.2f}"]
        for r in same:
            speeds = (r["values"] / r[f"{operation}_seconds"] / 1e6 for operation in ("encode", "decode"))
            cells.append(f"{8 * r['coded_bytes'] / r['values']:.3f} ({', '.join(f'{s:.0f}' for s in speeds)})")
        lines.append(cells)
    return timing.table(["codes of", "packed, bits", *CODERS], lines)


if __name__ == "__main__":
    sys.exit(main())

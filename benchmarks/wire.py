"""Lossless coders on packed codes: bits an element and speed, to choose what `msjax.wire` offers.

    python -m benchmarks.wire                                # 4 M values of relu(N(0, 1)): about a minute
    python -m benchmarks.wire --maps maps.npz                # and the feature maps that experiments.feature_maps saved

One thread. "zstd literals" is level 1 with matches of at least 7 bytes and the smallest hash table, which leaves nearly
all to its Huffman coder. Needs `pip install -e '.[bench]'`.
"""

import functools
import pathlib
import sys
import time
import zlib

import numpy as np
import zstandard

from benchmarks import timing
from msjax import compress

CODECS = (compress.MaskEncoded(), compress.MaskEncoded(bits=3), compress.TopK(), compress.Uniform(bits=3))


def huffman(raw):
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(raw) + coder.flush()


def zstd(parameters):
    return zstandard.ZstdCompressor(compression_params=parameters).compress, zstandard.ZstdDecompressor().decompress


_from_level = zstandard.ZstdCompressionParameters.from_level
CODERS = {
    "zlib Huffman": (huffman, functools.partial(zlib.decompress, wbits=-15)),
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
    rows = [row for name, h in sources.items() for codec in CODECS for row in measure(name, h, codec, options.repeats)]
    print(table(rows))
    if options.out:
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
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

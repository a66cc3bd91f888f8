"""What an arithmetic coder would save: constriction's beside the coder of `msjax.wire`, on the same codes.

    python -m experiments.arithmetic_coder --weights resnet20.safetensors --data-dir DIR      # some minutes

The maps and codecs are those of `contexts`, and gradients with more noise. `msjax.wire` codes bytes of two codes by
zlib's Huffman coder, in classes by their neighbours. Here the same bytes go through constriction's asymmetric numeral
systems (range variant, Duda, arXiv 1311.2540), which come within a few bytes of the entropy: once with one frequency
table for all bytes, and once with a table for each of the wire's classes. A table counts 12 bits for each byte value
that occurs. Speeds are values a second of one core, with the split into classes; decoding leaves out putting bytes back
in their places. Needs the extra `bench`. Writes a record.
"""

import importlib.metadata
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from experiments import contexts
from msjax import compress, wire
from msjax.compress import _contexts

TABLE_BITS = 12
NOISY = compress.EntropyMask(error=1.0, levels=7, signed=True, rounding="stochastic")


def _stream():
    import constriction  # for this alone; the report must do without it

    return constriction.stream


class Stream:
    """Bytes of one frequency table."""

    def __init__(self, raw: np.ndarray):
        counts = _contexts.histogram(raw)
        self.values = np.flatnonzero(counts)
        numbers = np.zeros(256, np.int32)
        numbers[self.values] = np.arange(len(self.values))
        self.symbols = numbers[raw]
        self.model = None
        if len(self.values) > 1:
            counts = counts[self.values].astype(np.float32)
            self.model = _stream().model.Categorical(counts / counts.sum(), perfect=False)

    def encode(self):
        coder = _stream().stack.AnsCoder()
        if self.model is not None:
            coder.encode_reverse(self.symbols, self.model)
        return coder.get_compressed()

    def decode(self, words):
        if self.model is None:
            return np.zeros(len(self.symbols), np.int32)
        return _stream().stack.AnsCoder(words).decode(self.model, len(self.symbols))

    @property
    def table_bytes(self):
        return len(self.values) * TABLE_BITS / 8


def nbytes(raws: list[np.ndarray]) -> float:
    """Returns the bytes of these streams, with their tables; checked by decoding."""
    found = 0.0
    for raw in raws:
        stream = Stream(raw)
        words = stream.encode()
        if not np.array_equal(stream.decode(words), stream.symbols):
            raise RuntimeError("constriction decodes something else")
        found += words.nbytes + stream.table_bytes
    return found


def measure(h: np.ndarray, codec: compress.Codec, repeats: int) -> dict:
    """Returns the bytes of the codes of `h` by coder, and speeds."""
    key = jax.random.key(0) if codec.needs_key else None
    payload = jax.device_get(jax.jit(codec.encode)(jnp.asarray(h), key))
    raw, grid = payload.codes, _contexts.grid_of(codec, h)
    classes = streams_of(raw, grid)
    coded = _contexts.coded(raw, grid)
    found = {
        "wire": min(len(coded), contexts.today(raw)),
        "one table": nbytes([raw]),
        "a table a class": nbytes(classes),
    }
    whole, each = Stream(raw), [Stream(one) for one in classes]
    words, words_of_each = whole.encode(), [stream.encode() for stream in each]
    calls = {
        "wire": lambda: _contexts.coded(raw, grid),
        "wire, back": lambda: _contexts.decoded(memoryview(coded), raw.size, grid),
        "one table": lambda: Stream(raw).encode(),
        "one table, back": lambda: whole.decode(words),
        "a table a class": lambda: [Stream(one).encode() for one in streams_of(raw, grid)],
        "a table a class, back": lambda: [s.decode(w) for s, w in zip(each, words_of_each, strict=True)],
    }
    seconds = timing.interleaved(calls, repeats=repeats)
    speeds = {name: h.size / value for name, value in seconds.items()}
    message = wire.encode(payload, codec, h)
    return {"bytes": found, "message_bytes": len(message), "values": h.size, "values_a_second": speeds}


def streams_of(raw: np.ndarray, grid: _contexts.Grid | None) -> list[np.ndarray]:
    """Returns the bytes of each of the wire's classes that has any; without a grid there is one class."""
    if grid is None:
        return [raw]
    thresholds = tuple(map(int, _contexts.thresholds_of(np.float32(grid.mean_size(_contexts.histogram(raw))))))
    return [stream for stream in _contexts._split(raw, thresholds, grid) if stream.size]


def table(rows: list[dict]) -> str:
    """Returns a Markdown table of bits a value and speeds."""
    lines = []
    for row in rows:
        bits = {name: 8 * value / row["values"] for name, value in row["bytes"].items()}
        speeds = {name: value / 1e6 for name, value in row["values_a_second"].items()}
        saved = 100 * (1 - bits["a table a class"] / bits["wire"])
        lines.append(
            [
                f"{row['source']}, {row['codec']}",
                *(f"{bits[name]:.3f}" for name in bits),
                f"{saved:.1f} %",
                *(f"{speeds[name]:.0f} / {speeds[f'{name}, back']:.0f}" for name in bits),
            ]
        )
    names = ["wire", "one table", "a table a class"]
    header = ["codes of", *(f"{n}, bits" for n in names), "saved", *(f"{n}, M values/s and back" for n in names)]
    return timing.table(header, lines)


def main() -> int:
    parser = contexts.parser_of(__doc__, "arithmetic_coder")
    parser.add_argument("--samples", type=int, default=25)
    options = parser.parse_args()
    start, rows = time.monotonic(), []
    for source, h in contexts.maps_of(options.weights, options.data_dir, options.samples).items():
        codecs = contexts.FEATURES[:3] if source.endswith("features") else (*contexts.GRADIENTS, NOISY)
        for codec in codecs:
            rows.append({"source": source, "codec": contexts._short(codec), **measure(h, codec, options.repeats)})
    record = timing.record(options, rows, time.monotonic() - start)
    timing.save(options.out, record | {"constriction": importlib.metadata.version("constriction")})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

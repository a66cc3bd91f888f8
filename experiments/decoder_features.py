"""Hidden states of a decoder: relative error and perplexity against real bits, by what has a scale of its own.

    python -m experiments.decoder_features --data-dir TEXTS --weights DIR     # thirteen minutes on two CPU cores

What stories260k (see `language`) has behind its blocks of 1,024 tokens at a time, 4 texts of 256, of WikiText-2's
validation text and of the first of Shakespeare: 4,096 tokens each. Nothing is trained; what is done is kept, and not
done again. A codec has one scale for a batch ("tensor"), or one for each sample, token or channel; `EntropyMask` none
for each token, which has 64 values here, fewer bits than its means and outliers would take. Bits are those of whole
messages, Huffman-coded, scales included; "error" is the squared error relative to the features', "by token" the median
over tokens of the same, and "nats" what the loss rises by behind the decoded features: below about 0.01 it is noise.

Large decoders have few channels whose values are some hundred times as large as others. This one is too small for
that, so "outlier channels" is the same network with two channels, those of the largest mean square, times 100 in front
of the codec and divided by it behind: the same function, but that the codec sees what it would of a large one. There
errors are those behind the division.

`EntropyMask` sends at most 1 % of the values as outliers by default, which two of 64 channels are not, but two of the
2,048 of a network of a billion parameters would be; with `ratio=0.9` it sends up to 10 %.

"EntropyMask, divided" is what a scale for each token or channel within `EntropyMask` would be: the features are divided
by the root mean square of each, rounded to a quarter of an octave and sent in a byte, or by the root of that, and then
coded as one tensor.

What the record says. As they are, quantizers with a fixed number of levels gain most from scales: quantile levels of 3
bits have an error of 0.206 with one scale, 0.060 by channel and 0.056 by token; MS falls from 0.102 to 0.070 by
channel. Top-k loses by either. `EntropyMask` has no need of them: at 2 bits it has 0.083 with one step, between 2 %
less and 13 % more divided, and 0.080 at 2.23 bits by channel. With two outlier channels all quantizers and MS fail with
one scale, and with one for each token; by channel nothing is lost, and top-k loses little. `EntropyMask` then does not
reach its bits: of 2 it spends 0.37, as its step has to be so coarse that 1 % of outliers suffice. With `ratio=0.9` it
has 0.166 at 2.03 bits; divided by channel 0.093 at 2.03, by channel 0.080 at 2.23.
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
from experiments import language, study
from msjax import compress, data, models, wire

OUT = study.RESULTS / "decoder_features"
TEXTS = {"WikiText-2": "wikitext2_valid.txt", "Shakespeare": "shakespeare.txt"}
COMMAND = "python -m experiments.decoder_features --data-dir TEXTS --weights DIR"
CUTS = (3, 1, 4)
BATCHES, BATCH, LENGTH = 4, 4, 256
OUTLIERS, FACTOR = 2, 100.0
GRANULARITIES = ("tensor", "sample", "token", "channel")
CODECS = tuple(language.CODECS[name]["codec"] for name in ("MS", "QU", "quantile", "e2m1", "top-k"))
ENTROPY = tuple(language.entropy(bits) for bits in (1.0, 2.0, 3.0))
DIVISORS = {"token": ((2,), 1.0), "channel": ((0, 1), 1.0), "root of channel": ((0, 1), 0.5)}
"""The axes of the mean square, and the power of what features are divided by."""
DIVIDED = ", divided"
CODINGS = [
    *({"codec": str(codec), "scales": scale} for codec in CODECS for scale in GRANULARITIES),
    *({"codec": str(codec), "scales": scale} for codec in ENTROPY for scale in GRANULARITIES if scale != "token"),
    *({"codec": f"{codec}{DIVIDED}", "scales": scale} for codec in ENTROPY for scale in DIVISORS),
    {"codec": str(language.entropy(2.0, ratio=0.9)), "scales": "tensor"},
]


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    parser.add_argument("--data-dir", type=pathlib.Path, required=True, help="the folder of the texts")
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="the folder that has stories260k")
    options = parser.parse_args()
    made = timing.Continued(options.out)
    rows = made.rows
    done = {_name(row) for row in rows}
    # Where things lie on this machine says nothing of the run.
    said = argparse.Namespace(out=options.out)
    for found in measure(options.data_dir, options.weights / language.WEIGHTS, done):
        rows += found
        made.save(said, command=COMMAND)
    print(table(rows))
    return 0


def _name(row):
    return tuple(row[name] for name in ("text", "cut", "outliers", "codec", "scales"))


def measure(texts: pathlib.Path, weights: pathlib.Path, done: set[tuple]):
    """Lists of the rows that are not `done`, one for each text, cut and kind of features."""
    network = models.decoder(models.DecoderConfig.load(weights), length=LENGTH)
    whole = models.load_weights(weights, network)
    for cut in CUTS:
        for text, file in TEXTS.items():
            found = data.from_text(texts / file, tokenizer=weights, length=LENGTH, test_share=None).train
            x, labels = found[: BATCHES * BATCH]
            client, server = models.split(network, cut, weights=whole)
            h = np.asarray(jax.jit(_features, static_argnums=0)(client.apply, client.params, x))
            loss = functools.partial(_loss, server.apply, server.params, labels)
            plain = float(loss(h))
            for outliers in (False, True):
                said = {"text": text, "cut": cut, "outliers": outliers}
                codings = [one for one in CODINGS if _name(said | one) not in done]
                rise = functools.partial(_rise, loss, plain)
                yield [said | row for row in of_features(h, rise, codings, outliers=outliers)]


def _features(apply, params, x):
    return apply(params, {}, x, train=False)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss(apply, params, labels, h):
    logits = jax.nn.log_softmax(apply(params, {}, h, train=False)[0])
    return -jnp.take_along_axis(logits, labels[..., None], -1).mean()


def _rise(loss, plain, h):
    return float(loss(h)) - plain


def of_features(h, rise, codings, *, outliers):
    """Rows of the features `h` (n, length, channels) of all batches; `rise` is the loss's behind decoded ones."""
    factors = np.ones(h.shape[-1], np.float32)
    if outliers:
        factors[np.argsort(np.square(h).mean((0, 1)))[-OUTLIERS:]] = FACTOR
    batches = (h * factors).reshape(BATCHES, BATCH, *h.shape[1:])
    for one in codings:
        codec, divided, _ = one["codec"].partition(DIVIDED)
        codec = compress.from_string(codec)
        if divided:
            found = []
            for batch in batches:
                scale = scales(batch, *DIVISORS[one["scales"]])
                decoded, sent = through(codec, batch / scale)
                found.append((decoded * scale, sent + scale.size))
        else:
            found = [through(dataclasses.replace(codec, granularity=one["scales"]), batch) for batch in batches]
        yield one | _row(h, factors, found, rise)


def _row(h, factors, found, rise):
    decoded = np.concatenate([one for one, _ in found]) / factors
    wrong, whole = (np.square(a).sum(-1) for a in (decoded - h, h))
    return {
        "bits": 8 * sum(sent for _, sent in found) / h.size,
        "error": float(wrong.sum() / whole.sum()),
        "error_by_token": float(np.median(wrong / whole)),
        "nats": rise(decoded),
    }


def scales(h, axes, power):
    """What features are divided by: a power of the root mean square, to a quarter of an octave."""
    octaves = np.log2(np.square(h).mean(axes, keepdims=True)) / 2
    return np.exp2(np.round(4 * power * octaves) / 4).astype(np.float32)


def through(codec: compress.Codec, h: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the decoded features, and the bytes of their message."""
    payload, decoded = jax.device_get(_coded(codec, h))
    return decoded, len(wire.encode(payload, codec, h, compression="huffman"))


@functools.partial(jax.jit, static_argnums=0)
def _coded(codec, h):
    payload = codec.encode(h)
    return payload, codec.decode(payload, h)


def table(rows):
    """A table for each kind of features: of the mean over texts and cuts, a line a codec and scale."""
    parts = []
    for outliers in (False, True):
        lines = []
        own = [row for row in rows if row["outliers"] == outliers]
        for codec, scale in dict.fromkeys((row["codec"], row["scales"]) for row in own):
            some = [row for row in own if (row["codec"], row["scales"]) == (codec, scale)]
            means = {name: np.mean([row[name] for row in some]) for name in ("bits", "error", "error_by_token", "nats")}
            cells = [f"{means['bits']:.2f}", *(f"{means[n]:.4f}" for n in ("error", "error_by_token", "nats"))]
            lines.append([f"`{short(codec)}`", scale, *cells])
        parts.append(f"{'With two outlier channels' if outliers else 'As they are'}, mean over texts and cuts:\n")
        parts.append(timing.table(["codec", "a scale for each", "bits", "error", "by token", "nats"], lines) + "\n")
    return "\n".join(parts)


def short(text):
    """A codec's text without what all have."""
    return text.replace(", granularity='tensor'", "").replace("error=None, ", "").replace(", ratio=0.99", "")


if __name__ == "__main__":
    sys.exit(main())

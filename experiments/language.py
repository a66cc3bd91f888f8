"""A published Llama, fine-tuned on texts through a cut: perplexity with every codec, before training and after.

    python -m experiments.language --data-dir TEXTS --weights DIR     # one or two minutes a run on two CPU cores
    # TEXTS has shakespeare.txt, wikitext2_valid.txt, wikitext2_test.txt; DIR has stories260k in Hugging Face's layout

The authors' later program fine-tunes Llama-3.2-1B and Qwen3-1.7B on WikiText-2 through a cut. This is the same in
small: stories260k, a Llama of 260 thousand parameters trained on children's stories, with its 512 tokens, behind block
1, 3 or 4 of 5; one client, batches of 4 texts of 256 tokens, all weights trained or adapters alone (LoRA of rank 8 at
every dense layer). The texts are Shakespeare's, whose last tenth is the test text, and of WikiText-2 the validation
text to train on and the test text, as its training text was not at hand. Perplexities are a token's, of this tokenizer,
and not to be compared with those of others.

MS has 2 bits and a sign, as there; QU and quantile levels 3 bits; e2m1 is a float of 4 bits, the sign among them; top-k
and RandTopk keep 7.25 %. Test features go through the codec, at test RandTopk is top-k. There is one epoch, for want of
time; the learning rates, of all weights and of adapters, are those that `language_schedule` found best without
compression on a part of Shakespeare's training text, for both texts and all codecs. Bytes are those of all payloads of
a training, features up and gradients down, or of coded messages where a codec is made for that; bits are the same for
each value of the features. Both are the middle cut's, and of seed 0. There are three seeds with all weights trained;
one of adapters, at the lower rate, and of what fails at other cuts than the middle one. Gradients are float32 where
nothing is said.

"Kept" is `grad_kept_only`: gradients are sent only where the features were kept. All other arms send the gradient of
every value, also where the feature was dropped, as the paper's straight-through gradient does. With that training fails
at this learning rate where a codec drops most values. The arms with kept gradients were added after this had been seen
at the middle cut of Shakespeare, as was a third of the learning rate for a few codecs; neither rate was tuned.
"""

import dataclasses
import math
import statistics
import sys
from typing import NamedTuple

import matplotlib
import matplotlib.figure

from benchmarks import timing
from experiments import driver, study
from msjax import compress
from msjax.config import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, TaskConfig
from msjax.models import TARGETS
from msjax.split.sent import cut_bytes, feature_bytes

TITLE = "Language models, fine-tuned through a cut"
WEIGHTS = "stories260k"
TEXTS = {
    "Shakespeare": DataConfig(name="shakespeare.txt", test_share=0.1, text_length=256),
    "WikiText-2": DataConfig(name="wikitext2_valid.txt", test="wikitext2_test.txt", text_length=256),
}
CUTS = ("1", "3", "4")
MIDDLE = "3"
EPOCHS = 1
LEARNING_RATES = {"full": 3e-3, "full at 1e-3": 1e-3, "LoRA": 3e-3}
"""By what is trained: those that `language_schedule` found best, and a third of the first."""
NONE = compress.Identity()


def entropy(bits, **options):
    return compress.EntropyMask(bits=bits, signed=True, **options)


def unbiased(bits):
    return entropy(bits, rounding="stochastic")


class Arm(NamedTuple):
    """What is compressed and how, and of what it is trained besides all weights at the middle cut with three seeds.

    Attributes:
      codec, grad_codec, grad_kept_only: fields of the config.
      elsewhere: seeds at the other cuts.
      adapters, low_rate: whether adapters are trained, too, and all weights at a third of the learning rate.
    """

    codec: compress.Codec
    grad_codec: compress.Codec = NONE
    grad_kept_only: bool = False
    elsewhere: int = 3
    adapters: bool = False
    low_rate: bool = False

    @property
    def fields(self):
        """Those of the config in which an arm differs from others."""
        return {name: getattr(self, name) for name in ("codec", "grad_codec", "grad_kept_only")}


TOP_K, RAND_TOP_K = compress.TopK(ratio=0.9275), compress.RandTopK(ratio=0.9275)
# Where training fails at the middle cut it is not repeated elsewhere; what has no seeds there is left out of time.
ARMS = {
    "none": Arm(NONE, adapters=True, low_rate=True),
    "MS": Arm(compress.MaskEncoded(ratio=0.99, bits=2, signed=True), adapters=True, low_rate=True),
    "QU": Arm(compress.Uniform(bits=3)),
    "quantile": Arm(compress.Quantile(bits=3), adapters=True),
    "e2m1": Arm(compress.SmallFloat(exponent_bits=2, mantissa_bits=1)),
    "top-k": Arm(TOP_K, elsewhere=1, adapters=True, low_rate=True),
    "RandTopk": Arm(RAND_TOP_K, elsewhere=1, low_rate=True),
    "EntropyMask 2 up": Arm(entropy(2.0), adapters=True, low_rate=True),
    "EntropyMask 1 up": Arm(entropy(1.0), elsewhere=1, adapters=True, low_rate=True),
    "EntropyMask 2 up 1.5 down": Arm(entropy(2.0), unbiased(1.5)),
    "EntropyMask 1 up 1 down": Arm(entropy(1.0), unbiased(1.0), elsewhere=0, low_rate=True),
    "quantile, by channel": Arm(compress.Quantile(bits=3, granularity="channel"), elsewhere=0),
    "QU, by token": Arm(compress.Uniform(bits=3, granularity="token"), elsewhere=0),
    "top-k, kept": Arm(TOP_K, grad_kept_only=True, adapters=True),
    "RandTopk, kept": Arm(RAND_TOP_K, grad_kept_only=True),
    "EntropyMask 1 up, kept": Arm(entropy(1.0), grad_kept_only=True, elsewhere=0, adapters=True),
    "EntropyMask 1 up 1 down, kept": Arm(entropy(1.0), unbiased(1.0), grad_kept_only=True),
    "EntropyMask 0.5 up 0.5 down, kept": Arm(entropy(0.5), unbiased(0.5), grad_kept_only=True),
}
CODECS = {name: one.fields for name, one in ARMS.items()}
TRAINED = {
    "full": "all weights",
    "full at 1e-3": "all weights, at a third of the learning rate",
    "LoRA": "adapters alone",
}
ORDERINGS = (
    ("MS", "QU"),
    ("MS", "quantile"),
    ("e2m1", "MS"),
    ("MS", "top-k"),
    ("MS", "RandTopk"),
    ("MS", "top-k, kept"),
    ("MS", "RandTopk, kept"),
)
"""What is said of the authors' codecs here: which of two has the lower perplexity."""


def base(scale, text="Shakespeare"):
    """The published network on a text; at smoke scale any network."""
    if scale == "smoke":
        return study.base(scale)
    return Config(
        model=ModelConfig(name="decoder", weights=WEIGHTS),
        data=TEXTS[text],
        task=TaskConfig(name="next_token"),
        optim=OptimConfig(kind="adamw", learning_rate=LEARNING_RATES["full"], weight_decay=0.0, warmup_epochs=0.1),
        clients=1,
        batch_size=4,
        epochs=EPOCHS,
        test_every=EPOCHS,
    )


def runs(scale):
    """The middle cut first, then other cuts, other seeds; at smoke scale two codecs, and nothing at paper scale."""
    if scale == "paper":
        return {}
    if scale == "smoke":
        arms = {name: _with(base(scale), name) for name in ("none", "MS")}
        found = {f"Shakespeare, full, {name}, {MIDDLE}": cfg for name, cfg in arms.items()}
        return study.with_seeds(found, range(1)) | {"Shakespeare, before": before(scale, "Shakespeare")}
    found = {}
    others = [cut for cut in CUTS if cut != MIDDLE]
    for text in TEXTS:
        found |= study.with_seeds(_arms(text, "full", ARMS, [MIDDLE]), range(1))
        if text == "Shakespeare":
            low = [name for name, one in ARMS.items() if one.low_rate]
            found |= study.with_seeds(_arms(text, "full at 1e-3", low, [MIDDLE]), range(1))
        found[f"{text}, before"] = before(scale, text)
        adapted = [name for name, one in ARMS.items() if one.adapters]
        found |= study.with_seeds(_arms(text, "LoRA", adapted, [MIDDLE]), range(1))
    for seed in range(3):
        elsewhere = [name for name, one in ARMS.items() if one.elsewhere > seed]
        for text in TEXTS:
            found |= study.with_seeds(_arms(text, "full", ARMS, [MIDDLE]), [seed])
            found |= study.with_seeds(_arms(text, "full", elsewhere, others), [seed])
    return found


def _arms(text, trained, names, cuts):
    cfg = base("lite", text)
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, learning_rate=LEARNING_RATES[trained]))
    if trained == "LoRA":
        cfg = dataclasses.replace(cfg, lora=LoraConfig(rank=8, targets=TARGETS))
    return {
        f"{text}, {trained}, {name}, {cut}": study.with_cut(_with(cfg, name), cut)
        for cut in cuts
        for name in names
        if name != "none" or cut == MIDDLE  # it is the same network wherever it is cut
    }


def _with(cfg, name):
    return dataclasses.replace(cfg, **CODECS[name])


def before(scale, text):
    """The measurement of the network as it is published, with each codec of features at each cut."""
    cfg = _with(base(scale, text), "none")
    cfg = cfg if scale == "smoke" else study.with_cut(cfg, MIDDLE)
    return study.Measured(cfg, "experiments.language:untrained")


def untrained(folder, cfg, scale):
    """Rows: the test loss in nats of what a run starts from, by codec and cut."""
    from msjax.training import evaluator, loaded  # these start JAX
    from msjax.training.from_config import load_run

    rows = []
    for name, of in CODECS.items():
        if of != Arm(of["codec"]).fields or (scale == "smoke" and name not in ("none", "MS")):
            continue
        for cut in [cfg.model.cut] if name == "none" or scale == "smoke" else CUTS:
            run = load_run(study.with_cut(_with(cfg, name), cut))
            state, mesh = loaded.placed(run)
            loss = evaluator.Evaluator(run, mesh)(state)["loss"]
            rows.append({"codec": name, "cut": cut, "loss": loss})
    return rows


def report(scale, records):
    groups = study.by_arm(study.trained(records))
    parts, shown = [], [text for text in TEXTS if any(name.startswith(text) for name in records)]
    for text in shown:
        first = untrained_perplexities(records, text)
        parts.append(f"### {text}\n")
        for trained, said in TRAINED.items():
            rows = []
            for name in CODECS:
                at = {
                    cut: groups.get(f"{text}, {trained}, {name}, {MIDDLE if name == 'none' else cut}", [])
                    for cut in CUTS
                }
                if not any(at.values()):
                    continue
                one = (at[MIDDLE] or next(found for found in at.values() if found))[0]
                bits = f"{study.feature_bits(one):.2f} / {gradient_bits(one):.2f}"
                megabytes = " / ".join(f"{sent / 1e6:.1f}" for sent in (up_bytes(one), down_bytes(one)))
                same = next((n for n, of in CODECS.items() if of == Arm(CODECS[name]["codec"]).fields), name)
                cells = [first.get((same, cut)) for cut in CUTS]
                cells = ["–" if cell is None else f"{cell:.2f}" for cell in cells]
                after = [study.mean_and_deviation([perplexity(r) for r in found]) for found in at.values()]
                rows.append(
                    [name, bits, megabytes, *cells, *after, study.counts(found for found in at.values() if found)]
                )
            if rows:
                header = [
                    said,
                    "bits up / down",
                    "MB up / down",
                    *(f"{cut}, before" for cut in CUTS),
                    *(f"{cut}, after" for cut in CUTS),
                ]
                parts.append(timing.table([*header, "seeds"], rows) + "\n")
        parts.append(_orderings(groups, text))
    parts.append("![Perplexity against bits](language.png)\n")
    return study.Page("\n".join(parts), {"language": plot(groups, shown)})


def _orderings(groups, text):
    """Which of two codecs is better, at each cut where both have been trained."""
    lines = []
    for one, other in ORDERINGS:
        said = []
        for cut in CUTS:
            found = [groups.get(f"{text}, full, {name}, {cut}", []) for name in (one, other)]
            if all(found):
                first, second = ([perplexity(record) for record in records] for records in found)
                said.append(f"{_ordering(first, second)} at {cut}")
        if said:
            lines.append(f"- {one} below {other}: {', '.join(said)}.")
    whether = (
        "Whether of two codecs the first has the lower perplexity after training, by cut; “within noise” where the "
    )
    whether += "means differ by less than the larger standard deviation of seeds:\n"
    return "\n".join([whether, *lines, ""])


def _ordering(first, second):
    """What is said of two codecs' perplexities: whether the first ones are lower."""
    difference = statistics.mean(second) - statistics.mean(first)
    if not math.isfinite(difference):
        return "cannot be told"
    noise = max((statistics.stdev(values) for values in (first, second) if len(values) > 1), default=0.0)
    return "within noise" if abs(difference) <= noise else "holds" if difference > 0 else "does not hold"


def untrained_perplexities(records, text):
    """{(codec, cut): perplexity} of the published network; of no compression, of the one network that it is."""
    rows = records.get(f"{text}, before", {}).get("rows", [])
    found = {(row["codec"], row["cut"]): math.exp(row["loss"]) for row in rows}
    plain = next((math.exp(row["loss"]) for row in rows if row["codec"] == "none"), None)
    return found if plain is None else found | {("none", cut): plain for cut in CUTS}


def perplexity(record):
    """A token's, on the test text."""
    return math.exp(record["test"]["loss"])


def up_bytes(record):
    return feature_bytes(record["traffic"])


def down_bytes(record):
    return cut_bytes(record["traffic"]) - up_bytes(record)


def gradient_bits(record):
    """Bits a value of the gradients."""
    return 32 * down_bytes(record) / record["uncompressed_feature_bytes"]


def plot(groups, texts):
    """A panel a text: perplexity after training against bits up, a marker a cut; without compression a line."""
    figure = matplotlib.figure.Figure(figsize=(6 * max(1, len(texts)), 4.5), layout="constrained")
    for axes, text in zip(figure.subplots(1, max(1, len(texts)), squeeze=False)[0], texts, strict=False):
        for color, name in enumerate(name for name in CODECS if name != "none"):
            for cut, marker in zip(CUTS, "osv", strict=True):
                if found := groups.get(f"{text}, full, {name}, {cut}"):
                    x, y = study.feature_bits(found[0]), statistics.mean(map(perplexity, found))
                    axes.plot(x, y, marker, color=matplotlib.colormaps["tab20"](color), label=name)
        if found := groups.get(f"{text}, full, none, {MIDDLE}"):
            axes.axhline(statistics.mean(map(perplexity, found)), color="k", linewidth=0.8, label="none")
        axes.set(title=text, xlabel="bits a value of the features", ylabel="perplexity", yscale="log")
        drawn = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(drawn.values(), drawn.keys(), fontsize="x-small")
    return figure


if __name__ == "__main__":
    sys.exit(driver.main(sys.modules[__name__]))

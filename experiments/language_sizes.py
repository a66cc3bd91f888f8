"""Llama-3.2-1B and Qwen3-1.7B at the cuts of the authors' later program: what they need, from shapes alone.

    python -m experiments.language_sizes      # five minutes on two CPU cores, no weights are made

The presets `configs/llama32_1b_wikitext2.py` and `configs/qwen3_1_7b_wikitext2.py`, which have not been trained: no
machine for it was at hand. That they can be built is seen here: the parties' steps are traced with abstract arrays, and
lowered for CUDA, so for an H100 as for any other GPU. XLA has not compiled them. "All weights" is float32 with plain
SGD, as in their program; "adapters" is LoRA of rank 8 at every dense layer of the blocks, with AdamW, the other weights
in bfloat16, of which features are then, too. Where the output layer is tied to the embedding each party has its own
copy, so the parties' parameters are more than the network's; the network's are the published counts.

Memory is that of weights, gradients, the optimizer's state and activations. Activations are what JAX's differentiation
keeps of the forward pass, before XLA fuses any of it; behind the slash with `model.remat`, which keeps each block's
input alone and makes one block's anew at a time. A step makes new weights beside the old ones, which are not counted
twice here.

Bytes are of a step of one client, 4 texts of 256 tokens: payloads, and for `EntropyMask` the bits it aims at; the
labels' 4 KiB come on top. A step takes the computing of both parties, one after the other, and its messages at the
link's full rate, one way after the other. Operations are floating-point ones as XLA's cost analysis counts them; both
parties have an H100, at the speed that `experiments.scaling` assumes. What codecs and latency take is not in it.
"""

import dataclasses
import json
import sys
import time

from benchmarks import timing
from experiments import language, scaling, study
from msjax import models, plan
from msjax.config import Config, LoraConfig, OptimConfig
from msjax.split.payloads import aimed_bytes

OUT = study.RESULTS / "language_sizes"
PRESETS = {"Llama-3.2-1B": "llama32_1b_wikitext2", "Qwen3-1.7B": "qwen3_1_7b_wikitext2"}
CUTS = {"Llama-3.2-1B": (1, 8, 15), "Qwen3-1.7B": (1, 14, 27)}
LINKS = (10, 100, 1000)
"""Mbit/s."""
CODECS = ("none", "MS", "QU", "quantile", "e2m1", "top-k", "EntropyMask 2 up", "EntropyMask 2 up 1.5 down")
SIDES = ("client", "server")
PLATFORM = "cuda"
GIB = 1 << 30


def main() -> int:
    parser = timing.parser(__doc__, repeats=False)
    parser.set_defaults(out=OUT)
    options = parser.parse_args()
    start = time.monotonic()
    rows = []
    for name, cuts in CUTS.items():
        for cut in cuts:
            for trained in ("all weights", "adapters"):
                found = needs(config_of(name, cut, adapters=trained == "adapters"))
                rows.append({"model": name, "cut": cut, "trained": trained, **found})
                print(f"{name}, cut {cut}, {trained}", flush=True)
    timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    print(table(rows))
    return 0


def config_of(name, cut, *, adapters):
    """The preset at a cut; with adapters as the docstring says."""
    cfg = study.with_cut(study.preset(PRESETS[name]), str(cut))
    if not adapters:
        return cfg
    optim = OptimConfig(kind="adamw", learning_rate=1e-4, weight_decay=0.0)
    return dataclasses.replace(cfg, lora=LoraConfig(rank=8, targets=models.TARGETS), optim=optim, dtype="bfloat16")


def needs(cfg: Config) -> dict:
    """Returns parameters, bytes of memory and operations of both parties, and a step's bytes with each codec."""
    run = described_run(cfg)
    spared = described_run(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=True)))
    row = {"parameters": parameters(described(cfg)), **{side: party(run, side) for side in SIDES}}
    operations, lowered = plan.operations(run), plan.lowered_bytes(run, PLATFORM)
    for side in SIDES:
        row[side] |= {
            "remat_activation_bytes": plan.needs(spared, side).activation_bytes,
            "step_flops": operations[side],
            "seconds": scaling.compute_seconds(operations[side]),
            "lowered_bytes": lowered[side],
        }
    row["label_bytes"] = cfg.batch_size * run.spec.labels.nbytes
    features = run.spec.features.batch(cfg.batch_size)
    return row | {"codecs": {codec: step_bytes(codec, features) for codec in CODECS}}


def described_run(cfg):
    """The run of a config as shapes and dtypes."""
    return plan.describe_run(cfg, *plan.describe_data(cfg))


def described(cfg):
    """What the decoder of a config is."""
    return models.DecoderConfig.from_json(json.loads(cfg.model.decoder))


def parameters(c: models.DecoderConfig) -> int:
    """Returns how many weights a whole decoder has, by formula; a tied output layer has none of its own."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    biases = (
        c.qkv_bias * c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads) + c.output_bias * c.hidden_size
    )
    feed_forward = 3 * c.hidden_size * c.intermediate_size + c.mlp_bias * (2 * c.intermediate_size + c.hidden_size)
    norms = 2 * c.hidden_size + c.qk_norm * 2 * c.head_dim
    table = c.vocab_size * c.hidden_size
    blocks = c.num_hidden_layers * (attention + biases + feed_forward + norms)
    return blocks + table * (1 if c.tie_word_embeddings else 2) + c.hidden_size


def party(run, side) -> dict:
    """Returns the numbers of values and bytes that a party has in memory for its part in a step."""
    found = plan.needs(run, side)
    return {name: n for name, n in found._asdict().items() if name != "average_bytes"} | {"bytes": found.bytes}


def step_bytes(name, features) -> dict:
    """Returns a step's bytes up and down with a codec of `language`, and the seconds of both on each link."""
    of = language.CODECS[name]
    codecs = {"up_bytes": of["codec"], "down_bytes": of["grad_codec"]}
    found = {direction: aimed_bytes(codec, features) for direction, codec in codecs.items()}
    bits = 8 * (found["up_bytes"] + found["down_bytes"])
    return found | {"seconds": {f"{rate} Mbit/s": bits / (rate * 1e6) for rate in LINKS}}


def table(rows):
    """Parameters, memory and computing; a step's bytes and the seconds of these; and a step's seconds in all."""
    memory = [
        [
            f"{r['model']}, {r['trained']}",
            str(r["cut"]),
            *(f"{r[side]['trained_values'] / 1e6:,.1f} / {r[side]['frozen_values'] / 1e6:,.1f}" for side in SIDES),
            *(f"{(r[side]['bytes'] - r[side]['activation_bytes']) / GIB:.2f}" for side in SIDES),
            *(
                f"{r[side]['activation_bytes'] / GIB:.2f} / {r[side]['remat_activation_bytes'] / GIB:.2f}"
                for side in SIDES
            ),
            *(f"{r[side]['step_flops'] / 1e12:.2f}" for side in SIDES),
        ]
        for r in rows
    ]
    header = ["", "cut", *(f"{s}: trained / frozen, M" for s in SIDES), *(f"{s}, GiB" for s in SIDES)]
    header += [f"{s}: activations, GiB" for s in SIDES]
    parts = [timing.table([*header, *(f"{s}, 10¹² operations a step" for s in SIDES)], memory)]
    whole = {r["model"]: f"{r['parameters']:,}" for r in rows}
    parts.append(
        "Parameters of the whole networks: " + ", ".join(f"{name} {count}" for name, count in whole.items()) + "."
    )
    for trained in dict.fromkeys(r["trained"] for r in rows):  # the features of both networks are of one shape
        one = next(r for r in rows if r["trained"] == trained)
        lines = [
            [
                codec,
                *(f"{sent[f'{way}_bytes'] / 1e6:.3f}" for way in ("up", "down")),
                *(f"{seconds:.3f}" for seconds in sent["seconds"].values()),
            ]
            for codec, sent in one["codecs"].items()
        ]
        links = [f"messages, s at {link}" for link in next(iter(one["codecs"].values()))["seconds"]]
        parts.append(timing.table([f"{trained}, a step", "MB up", "MB down", *links], lines))
    link = f"{LINKS[1]} Mbit/s"
    steps = [
        [
            f"{r['model']}, {r['trained']}",
            str(r["cut"]),
            f"{(computing := sum(r[side]['seconds'] for side in SIDES)):.2f}",
            *(f"{computing + sent['seconds'][link]:.2f}" for sent in r["codecs"].values()),
        ]
        for r in rows
    ]
    codecs = [f"step, s: {codec}" for codec in rows[0]["codecs"]]
    parts.append(timing.table([f"at {link}", "cut", "computing, s", *codecs], steps))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning steps and generation of decoders, through a cut, beside Hugging Face's transformers in PyTorch.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.language              # some minutes on a CPU

Both have the same initial weights, written by transformers and read by msjax, and the losses of the first step are
checked to be equal. A step is what `msjax train` runs: client and server part behind the second block, the codec at the
cut, AdamW; in PyTorch it is the whole network, uncut, with the same AdamW. Adapters in PyTorch are written out after
LoRA's paper. Generation is greedy, of one text, with a key-value cache on each side. All contenders of a row run in
turn in one process. OMP_WAIT_POLICY=PASSIVE keeps PyTorch's threads from spinning between its turns. Needs
`pip install -e '.[bench,lm]'`.
"""

import copy
import math
import os
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import msjax
from benchmarks import timing
from msjax import build, compress, config, models
from msjax.split.metrics import zero_sums
from msjax.split.state import TrainState
from msjax.split.trees import TreeSpec
from msjax.training import program

SIZES = {
    # After stories260K and, in its proportions, a decoder of 7 million parameters.
    "0.26 M": {"hidden": 64, "inner": 172, "layers": 5, "vocabulary": 512},
    "7 M": {"hidden": 256, "inner": 688, "layers": 6, "vocabulary": 4096},
}
CUT = 2
RANK, ALPHA = 8, 16.0
CODECS = {
    "none": compress.Identity(),
    "MS": compress.MaskEncoded(ratio=0.9, bits=4, signed=True),
    "EntropyMask": compress.EntropyMask(bits=2.0, signed=True),
}
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.0}


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, default=16, help="texts of a step, over all clients")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--tokens", type=int, default=64, help="to be generated, behind a prompt of 16")
    parser.add_argument("--only", choices=("step", "generate"), help="one of the two")
    options = parser.parse_args()
    start = time.monotonic()
    rows = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            network = make_network(SIZES[size], options.length, folder)
            if options.only != "generate":
                rows += [step_row(size, trained, network, folder, options) for trained in ("adapters", "all weights")]
            if options.only != "step":
                rows.append(generation_row(size, network, folder, options))
    print(table([row for row in rows if row["kind"] == "step"]), generations(rows), sep="\n\n")
    if options.out:
        timing.save(options.out, timing.record(options, rows, time.monotonic() - start))
    return 0


def make_network(size, length, folder):
    """A Llama of transformers with random weights, which is written to `folder`, too."""
    import torch
    import transformers

    torch.manual_seed(0)
    described = transformers.LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * length,
        tie_word_embeddings=False,
    )
    network = transformers.LlamaForCausalLM(described)
    network.save_pretrained(folder)
    return network


def step_row(size, trained, network, folder, options) -> dict:
    """Returns the medians of a step with each codec and of PyTorch's."""
    tokens = np.random.default_rng(0).integers(0, SIZES[size]["vocabulary"], (options.batch, options.length), np.int32)
    found = {
        name: make_step(folder, codec, tokens, options, adapters=trained == "adapters")
        for name, codec in CODECS.items()
    }
    first_losses = {name: float(loss) for name, (_, loss) in found.items()}
    calls = {name: call for name, (call, _) in found.items()}
    calls["torch"], first_losses["torch"] = make_torch_step(network, tokens, adapters=trained == "adapters")
    if not math.isclose(first_losses["none"], first_losses["torch"], rel_tol=1e-5):
        raise RuntimeError(f"the first losses must be equal, got {first_losses}")
    seconds = timing.interleaved(calls, repeats=options.repeats)
    return {"kind": "step", "size": size, "trained": trained, "first_losses": first_losses, "seconds": seconds}


def make_step(folder, codec, tokens, options, *, adapters):
    """(a call that takes the next step, the first one's loss)."""
    length, per_client = options.length, options.batch // options.clients
    cfg = config.Config(
        model=config.ModelConfig(name="decoder", cut=str(CUT), weights=folder),
        lora=config.LoraConfig(rank=RANK, alpha=ALPHA, targets=models.TARGETS) if adapters else config.LoraConfig(),
        data=config.DataConfig(text_length=length),
        task=config.TaskConfig(name="next_token"),
        optim=config.OptimConfig(kind="adamw", warmup_epochs=0.0, **OPTIMIZER),
        codec=codec,
        clients=options.clients,
        batch_size=per_client,
        epochs=1,
    )
    form = TreeSpec.of(jax.ShapeDtypeStruct((length,), np.int32))
    built = build.build(build.resolved(cfg), build.DataSummary(form, form), samples=per_client * 10**6, test_samples=0)
    spec = built.spec
    state = program.place(spec, TrainState(built.client, built.server, jnp.int32(0)), None)
    carry, everyone = [state, zero_sums(spec)], np.arange(options.clients, dtype=np.int32)
    by_client = jnp.asarray(tokens.reshape(options.clients, per_client, length))
    labels = jnp.concatenate([by_client[..., 1:], jnp.full_like(by_client[..., :1], -100)], -1)

    def call():
        args = (by_client, labels, None, everyone, jax.random.key(0))
        *carry[:], losses = program.train_steps(spec, None, *carry, *args)
        return losses

    return call, call().mean()


def make_torch_step(network, tokens, *, adapters):
    """The same of PyTorch."""
    import torch

    network = with_adapters(network) if adapters else copy.deepcopy(network)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    tokens = torch.from_numpy(tokens).long()

    def call():
        optimizer.zero_grad()
        logits = network(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return call, call()


def with_adapters(network):
    """A copy whose dense layers in the blocks have adapters, which alone are trained."""
    import torch

    class Adapted(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            bound = 1 / math.sqrt(layer.in_features)
            self.a = torch.nn.Parameter(torch.empty(layer.in_features, RANK).uniform_(-bound, bound))
            self.b = torch.nn.Parameter(torch.zeros(RANK, layer.out_features))

        def forward(self, x):
            return self.layer(x) + (x @ self.a @ self.b) * (ALPHA / RANK)

    network = copy.deepcopy(network).requires_grad_(False)
    for block in network.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in models.TARGETS:
                if hasattr(part, name):
                    setattr(part, name, Adapted(getattr(part, name)))
    return network


def generation_row(size, network, folder, options) -> dict:
    """Returns the medians of a greedy generation, whole and cut, and of transformers'."""
    import torch

    described = models.DecoderConfig.load(folder)
    model = models.decoder(described, length=options.length)
    weights = models.load_decoder(folder, model)
    client, server = models.split(model, CUT, weights=weights)
    prompt = np.random.default_rng(0).integers(0, described.vocab_size, 16).tolist()
    generators = {name: msjax.Generator(client, server, codec=codec) for name, codec in CODECS.items()}
    found = {}

    def contender(name, generator):
        def call():
            generation = generator.start([prompt], max_tokens=options.tokens, end=())
            for _ in generation:
                pass
            found[name] = generation

        return call

    given = torch.tensor([prompt])
    limits = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}

    def call_torch():
        with torch.no_grad():
            found["torch"] = network.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **limits)

    calls = {name: contender(name, generator) for name, generator in generators.items()} | {"torch": call_torch}
    network.eval()
    seconds = timing.interleaved(calls, repeats=options.repeats)
    if found["none"].tokens[0] != found["torch"][0, len(prompt) :].tolist():
        raise RuntimeError("both must choose the same tokens where nothing is compressed")
    traffic = {name: found[name].traffic for name in CODECS}
    later = {name: it.tokens - 1 for name, it in traffic.items()}
    return {
        "kind": "generate",
        "size": size,
        "tokens": options.tokens,
        "prompt_tokens": len(prompt),
        "seconds": seconds,
        "up_bytes_a_token": {name: round(it.up_bytes / later[name], 1) for name, it in traffic.items()},
        "down_bytes_a_token": {name: round(it.down_bytes / later[name], 1) for name, it in traffic.items()},
    }


def table(rows: list[dict]) -> str:
    """Returns the steps in milliseconds and the ratio to PyTorch's as a Markdown table."""
    header = ["parameters", "trained", *(f"{name}, ms" for name in CODECS), "PyTorch, ms", "none : PyTorch"]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        times = [f"{seconds[name] * 1e3:.1f}" for name in (*CODECS, "torch")]
        lines.append([row["size"], row["trained"], *times, f"{seconds['none'] / seconds['torch']:.2f}"])
    return timing.table(header, lines)


def generations(rows: list[dict]) -> str:
    """Returns the tokens a second, and the bytes that each sends up, as a Markdown table."""
    header = ["parameters", *(f"{name}, tokens/s (bytes up)" for name in CODECS), "transformers, tokens/s"]
    lines = []
    for row in (row for row in rows if row["kind"] == "generate"):
        rates = {name: row["tokens"] / value for name, value in row["seconds"].items()}
        cells = [f"{rates[name]:.0f} ({row['up_bytes_a_token'][name]:g})" for name in CODECS]
        lines.append([row["size"], *cells, f"{rates['torch']:.0f}"])
    return timing.table(header, lines)


if __name__ == "__main__":
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        print("OMP_WAIT_POLICY is not PASSIVE: PyTorch's threads may spin between its turns", file=sys.stderr)
    sys.exit(main())

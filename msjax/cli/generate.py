"""`msjax generate`: a decoder continues a text, whole or through a cut."""

import dataclasses
import sys
import time
from typing import Any, Literal

import jax
import tyro

from msjax import config, data, models
from msjax.cli.options import PresetFlag, network, parse, preset_of, split_options
from msjax.compress import Codec, Identity
from msjax.generation import Generation, Generator
from msjax.models import ModelPart, Sampling
from msjax.pair import load_pair, model_parts
from msjax.parts import TrainedPart
from msjax.paths import expand

_MOST_TOKENS = 256
"""Without `--max-tokens`, where the context has room for so many."""

DESCRIPTION = """\
Continue a text with a decoder: the folder of a run of msjax train, the files of its two parts, CLIENT.safetensors
SERVER.safetensors, or a folder of Hugging Face's with published weights, whole or cut by --cut. With --server HOST:PORT
and CLIENT.safetensors alone the server's part is elsewhere (msjax serve --part). The text goes to standard output; what
it took and the bytes that crossed the cut go to standard error at the end. Client and server each keep the keys and
values of their own layers, so that a token's features cross the cut once, through the run's codec or --codec. The
client chooses: the server answers with as many of the largest logits as that takes, of greedy decoding with the token
(4 bytes), with --temperature and --top-k K with K logits and tokens (8 bytes each), else with all logits (4 bytes
each). The server sees the features of every token, and knows what it answers. Of a U-shaped run it answers with
features instead, and sees no logits."""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What is continued, and how tokens are chosen."""

    network: tyro.conf.Positional[tuple[str, ...]] = tyro.MISSING
    """RUN, CLIENT.safetensors SERVER.safetensors, or a folder of Hugging Face's."""
    prompt: str = tyro.MISSING
    """The text that is continued."""
    max_tokens: int | None = None
    """How many tokens are chosen at most; by default 256, or what the context has room for."""
    temperature: float = 0.0
    """0 takes the most probable token (greedy); above it tokens are drawn."""
    top_k: int | None = None
    """With a temperature: draw among so many of the most probable ones."""
    top_p: float | None = None
    """With a temperature: draw among the most probable ones that together reach this probability."""
    seed: int = 0
    """Of what is drawn, also by random codecs."""
    codec: str | None = None
    """Of the features at the cut; by default the one of the run's tests, of published weights none (Identity)."""
    compression: Literal["huffman", "all"] | None = None
    """Lossless coding of what is sent, beside the codec: of codes, or of all, floats too. See msjax.wire."""
    tokenizer: str | None = None
    """A tokenizer.json, or a folder that has one; by default that of the run or of the published weights."""
    cut: str | None = None
    """Of published weights: behind which layer they are cut, as --model.cut of msjax train; by default nowhere."""
    tail_cut: str | None = None
    """Of published weights: where the client's last layers begin (U-shaped), as --mode.tail-cut of msjax train."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of published weights: what is computed and sent."""

    def sampling(self) -> Sampling:
        """The rule by which tokens are chosen; raises ValueError where there is none such."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    def own_codec(self) -> Codec | None:
        """The codec that is given; raises ValueError where it is none."""
        return None if self.codec is None else config.parse_codec("codec", self.codec, own_code=True)


@dataclasses.dataclass(frozen=True)
class _Flags(GenerateOptions, PresetFlag):
    """With both parts here; `--server` leads to other options."""

    server: str | None = None
    """HOST:PORT of a server that has the other part (msjax serve --part); `--server HOST:PORT --help` lists what else a
    network takes."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    if split_options(arguments, "--server")[0].server is not None:
        return network().generate(arguments)
    where, rest = split_options(arguments, "--config")
    options = parse(_Flags, rest, prog="msjax generate", description=DESCRIPTION)
    options.sampling()  # before anything is loaded
    parts, codec, tokenizer = _network(options, preset_of(where))
    for name in ("codec", "compression"):
        if len(parts) == 1 and (value := getattr(options, name)) is not None:
            raise ValueError(f"{name} must not be given without --cut, got {value!r}")
    generator = Generator(*jax.device_put(parts), codec=codec, compression=options.compression)
    continue_text(generator, options, tokenizer)
    return 0


def _network(options: GenerateOptions, preset: Any) -> tuple[tuple[ModelPart, ...], Codec | None, str | None]:
    """(parts, codec, where the tokenizer is) that the options name."""
    codec, paths = options.own_codec(), options.network
    files = all(path.endswith(".safetensors") for path in paths)
    if not paths or len(paths) != (2 if files else 1):
        raise ValueError(f"network must be a folder, or CLIENT.safetensors SERVER.safetensors, got {' '.join(paths)!r}")
    if not files and models.is_decoder(expand("network", paths[0])):
        if preset is not None:
            raise ValueError("config must be given for a trained network alone, got one with published weights")
        parts = _published(options)
        return parts, Identity() if codec is None and len(parts) > 1 else codec, options.tokenizer or paths[0]
    check_trained(options)
    pair = load_pair(*paths, preset=preset)
    check_decoder(pair.config, paths[0])
    parts = model_parts(pair.client, pair.server)
    return parts, codec or codec_of(pair.client), options.tokenizer or pair.config.data.tokenizer


def _published(options):
    folder = expand("network", options.network[0])
    described = models.DecoderConfig.load(folder)
    model = models.decoder(described, length=described.max_position_embeddings, dtype=options.dtype)
    if options.cut is None:
        if options.tail_cut is not None:
            raise ValueError(f"tail_cut must go with cut, got {options.tail_cut!r} without it")
        return (models.load_decoder(folder, model, model.dtype),)
    cuts = [int(cut) if cut is not None and cut.isdigit() else cut for cut in (options.cut, options.tail_cut)]
    weights = models.open_decoder(folder, model, model.dtype)
    return models.split(model, cuts[0], tail_cut=cuts[1], weights=weights)


def check_decoder(cfg: config.Config, path: str) -> None:
    """Raises ValueError for a network that continues no texts."""
    if cfg.model.name != models.DECODER:
        raise ValueError(f"network must be one with model.name='decoder', got {cfg.model.name!r} of {path}")


def check_trained(options: GenerateOptions) -> None:
    """Raises ValueError for options of published weights, where the network is a trained one."""
    for name in ("cut", "tail_cut", "dtype"):
        value, default = getattr(options, name), getattr(GenerateOptions, name)
        if value != default:
            raise ValueError(f"{name} must not be given for a trained network, which has its own, got {value!r}")


def codec_of(client: TrainedPart) -> Codec:
    """The codec of its run's tests, aimed at what training aimed at in the end.

    U-shaped it has its own target: it is also that of what the server returns, which has no part in the budget.
    """
    cfg = client.config
    if not cfg.eval_compressed:
        return Identity()
    aimed = client.up_bits is not None and client.tail is None
    return dataclasses.replace(cfg.codec, bits=client.up_bits) if aimed else cfg.codec


def continue_text(generator: Generator, options: GenerateOptions, tokenizer: str | None) -> None:
    """Prints the prompt and, token by token, what comes behind it; then what that took.

    Raises:
      ValueError: the prompt, an option or the tokenizer does not fit.
    """
    if tokenizer is None:
        raise ValueError("tokenizer must be given, as the network does not say where it is: a tokenizer.json")
    described = generator.config
    try:
        start = data.start_token(tokenizer) if described.bos_token_id is None else described.bos_token_id
        found = data.load_tokenizer(tokenizer, start=start, vocabulary=described.vocab_size)
    except data.DataError as error:
        more = "" if options.tokenizer else ": give --tokenizer"
        raise ValueError(f"{error}{more}") from None
    if not options.prompt:
        raise ValueError("prompt must be a text, got ''")
    prompt = data.tokens_of(found, options.prompt, start=start)
    most = options.max_tokens
    if most is None:
        most = min(_MOST_TOKENS, generator.room([prompt]))
    folder = expand("tokenizer", tokenizer)
    end = models.end_tokens(folder if folder.is_dir() else folder.parent) or described.end_tokens
    end = tuple({*end, *(() if start is None else (start,))})
    rule = {"sampling": options.sampling(), "seed": options.seed, "end": end}
    began = time.perf_counter()
    with generator.start([prompt], max_tokens=most, **rule) as generation:
        seconds = _print_text(options.prompt, prompt, generation, found)
    print(report(generation, generator, [began, *seconds]), file=sys.stderr)


def _print_text(text, prompt, generation, tokenizer):
    """Prints prompt and tokens; returns when each token was chosen."""
    from tokenizers.decoders import DecodeStream

    stream, seconds = DecodeStream(skip_special_tokens=True), []
    for token in prompt:
        stream.step(tokenizer, token)
    print(text, end="", flush=True)
    for (token,) in generation:
        seconds.append(time.perf_counter())
        # None where it takes more tokens to make a character.
        print(stream.step(tokenizer, token) or "", end="", flush=True)
    print(flush=True)
    return seconds


def report(generation: Generation, generator: Generator, seconds: list[float]) -> str:
    """Returns what a generation took, as lines.

    Args:
      seconds: when it began, and when each token was chosen.
    """
    sent, more = generation.traffic, generation.traffic.tokens - 1
    lines = [
        f"{sent.tokens} tokens behind a prompt of {sent.prompt_tokens}: the first after {seconds[1] - seconds[0]:.2f} s"
    ]
    if more > 1:  # the second one's program is compiled with it
        lines[0] += f", and behind the second {(more - 1) / (seconds[-1] - seconds[2]):.1f} a second"
    if generator.server is None:
        return lines[0]
    lines.append(f"cut with {generator.codec}, bytes as messages")
    lines.append(f"  prompt: {sent.prompt_up_bytes:,} up, {sent.prompt_down_bytes:,} down")
    up, down = sent.up_bytes, sent.down_bytes
    if more:
        lines.append(f"  a token behind it: {up / more:,.1f} up, {down / more:,.1f} down")
    features = up + sent.prompt_up_bytes
    everything = features + down + sent.prompt_down_bytes
    if generator.tail is not None:
        features = everything
    serialized = getattr(generation.session, "serialized_bytes", None)
    lines.append(f"  all: {features:,} of features, {everything:,} of everything")
    if serialized is not None:
        lines[-1] += f"; {serialized:,} as serialized for the network"
    return "\n".join(lines)

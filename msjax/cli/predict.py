"""`msjax predict`: what a trained network says of a user's own inputs."""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from msjax import build, data, models
from msjax.cli.options import network, preset_of, split_options
from msjax.pair import Pair, load_pair, of_length, predict, predictions
from msjax.parts import TrainedPart
from msjax.paths import expand
from msjax.runs import to_json
from msjax.runs.files import write_atomically

LINE_TASKS = ("classification", "multi_label", "regression")
"""Whose outputs make a line each."""

_DESCRIPTION = """\
Print what a trained network says of inputs, one line each: what it is called, the label, and of a classification the
label's probability; of multi-label tasks all labels that are there, each with its probability; of a regression the
numbers; of a language model the token that follows the text, its probability, and the text's perplexity. The network
is the folder of a run of msjax train, or the files of its two parts, CLIENT.safetensors SERVER.safetensors; with
--server HOST:PORT it is CLIENT.safetensors alone, and the server's part is elsewhere (msjax serve --part). Inputs are
images or folders of images, an .npz (an array of inputs; labels are passed over), a .csv with the columns that the
network was trained on, or, of texts, a .txt with a text a line; of a language model also a .csv or .jsonl with a column
of texts, each of at most the tokens that the run's texts have, and computed at its own length. Images are decoded,
resized and normalised as the run's were. Features go through the codec, as in msjax eval, but each input by itself, so
that what becomes of it does not depend on the others; eval compresses a batch together, as --batch-size does here."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    if split_options(arguments, "--server")[0].server is not None:
        return network().predict(arguments)
    where, rest = split_options(arguments, "--config")
    parser = make_parser()
    parser.add_argument("--config", metavar="FILE.py", help="the preset of a model of one's own")
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="where the server's part is (msjax serve --part); `--server HOST:PORT --help` lists what that takes",
    )
    options, server = parser.parse_intermixed_args(rest), None
    if options.network.endswith(".safetensors"):
        server, *options.inputs = options.inputs
        if not server.endswith(".safetensors") or not options.inputs:
            parser.error(
                "with files the network is CLIENT.safetensors SERVER.safetensors, or CLIENT.safetensors with --server, "
                "and inputs come behind them"
            )
    check_out(options)
    pair = load_pair(options.network, server, preset=preset_of(where))
    return print_predictions(pair, read_all(pair.client, options), options)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of what is said of which inputs, and where to."""
    parser = argparse.ArgumentParser(prog="msjax predict", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("network", help="the run folder, or CLIENT.safetensors SERVER.safetensors")
    parser.add_argument(
        "inputs", nargs="+", metavar="input", help="image, folder of images, .npz, .csv, .txt or .jsonl"
    )
    parser.add_argument("--uncompressed", action="store_true", help="leave the features as they are")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="inputs that are compressed together")
    parser.add_argument("--json", action="store_true", help="print an object a line, with all outputs")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the lines to a file instead; where an error ends them, those so far to FILE.partial",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="of a language model, where the run's is not on this machine"
    )
    return parser


def check_out(options: argparse.Namespace) -> None:
    """Raises ValueError where nothing can be written to `out`, before all is computed."""
    if options.out is None:
        return
    out = expand("out", options.out)
    if out.is_dir() or not out.parent.is_dir():
        why = "it is a folder" if out.is_dir() else "its folder is not there"
        raise ValueError(f"out must be a file that can be written, got {options.out!r}: {why}")


def read_all(client: TrainedPart, options: argparse.Namespace) -> list[data.Inputs] | list[data.Texts]:
    """Returns the inputs, before anything is computed, so that a wrong path is told at once.

    Raises:
      ValueError: an option or an input does not fit the network.
    """
    task = build.make_task(client.config, client.summary).name
    if client.config.model.name == models.DECODER:
        if options.batch_size != 1:
            raise ValueError(
                f"batch_size must be 1 for texts, each of which has its own length, got {options.batch_size}"
            )
        return [_read_texts(client, path, options.tokenizer) for path in options.inputs]
    if options.tokenizer is not None:
        raise ValueError(f"tokenizer must be None where no tokenizer.json splits the inputs, got {options.tokenizer!r}")
    if task not in LINE_TASKS and not options.json:
        raise ValueError(f"--json must be given for task {task!r}, whose outputs are no line")
    return [_read(client, path) for path in options.inputs]


def print_predictions(pair: Pair, inputs: list[Any], options: argparse.Namespace) -> int:
    """Prints what the network says of each input of `read_all`, or writes it to a file; returns the exit status."""
    compressed = False if options.uncompressed else None
    if pair.config.model.name == models.DECODER:
        line, records = _text_line, (record for one in inputs for record in _text_records(pair, one, compressed))
    else:
        line, task = _line, build.make_task(pair.config, pair.summary).name
        each = (_records(pair, task, one, options.batch_size, compressed) for one in inputs)
        records = itertools.chain.from_iterable(each)
    return _write(map(to_json if options.json else line, records), options.out)


def _write(lines: Iterable[str], to: str | None) -> int:
    """Prints the lines, or writes them to a file; returns the exit status.

    Where an error ends them, those so far are in another file, with `.partial` behind its name.
    """
    if to is None:
        for line in lines:
            print(line, flush=True)
        return 0
    found: list[str] = []
    try:
        for line in lines:
            found.append(line)
    except BaseException:
        if found:
            try:
                _write_lines(found, to + ".partial")
            except ValueError as error:
                print(f"msjax predict: {error}", file=sys.stderr)
        raise
    _write_lines(found, to)
    with contextlib.suppress(OSError):
        expand("out", to + ".partial").unlink()  # of an earlier try
    return 0


def _write_lines(lines, to):
    out = expand("out", to)
    try:
        write_atomically(out, "".join(line + "\n" for line in lines))
    except OSError as error:
        raise ValueError(f"out must be a file that can be written, got {to!r}: {error.strerror}") from None
    print(f"msjax predict: {len(lines)} lines in {out}", file=sys.stderr)


def _read_texts(client: TrainedPart, path: str, tokenizer: str | None) -> data.Texts:
    """Texts for a language model, of which each fits it."""
    cfg, length = client.config, client.summary.input_shape[0]
    tokenizer = cfg.data.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer must be given for texts, got None")
    described = build.decoder_config(cfg)
    options = {"column": cfg.data.text_column, "start": described.bos_token_id, "vocabulary": described.vocab_size}
    found = data.read_texts(path, tokenizer=tokenizer, **options)
    build.check_tokenizer(found.tokenizer, client.summary.tokenizer)
    for name, tokens in zip(found.names, found.tokens, strict=True):
        if not 1 <= len(tokens) <= length:
            raise ValueError(
                f"inputs must have texts of 1 to {length} tokens, as the run's, got {len(tokens)} in {name}"
            )
    return found


def _text_records(pair: Pair, texts: data.Texts, compressed: bool | None) -> Iterator[dict]:
    """An object for each text: the token that follows it, and how well the network knew those that are in it."""
    for name, tokens in zip(texts.names, texts.tokens, strict=True):
        logits = np.float64(predict(of_length(pair, len(tokens)), tokens[None], compressed=compressed)[0])
        logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        nats = -logs[np.arange(len(tokens) - 1), tokens[1:]]
        token = int(np.argmax(logs[-1]))
        found = {"input": name, "tokens": len(tokens), "next_token": token, "next_text": texts.decode([token])}
        found["probability"] = float(np.exp(logs[-1, token]))
        yield found | {"perplexity": float(np.exp(nats.mean())) if len(nats) else None}


def _text_line(record):
    perplexity = "" if record["perplexity"] is None else f"{record['perplexity']:.4f}"
    return "\t".join([record["input"], repr(record["next_text"]), f"{record['probability']:.4f}", perplexity])


def _read(client: TrainedPart, path: str) -> data.Inputs:
    cfg, summary = client.config, client.summary
    build.check_tokenizer(None if summary.tokenizer is None else data.TOKENIZER, summary.tokenizer)
    return data.read_inputs(
        path,
        like=jax.tree.unflatten(summary.inputs.structure, summary.inputs.leaves),
        columns=summary.columns,
        is_text=isinstance(summary.tokenizer, int),
        vocabulary=cfg.data.vocabulary,
        set_name=cfg.data.name,
        streamed=cfg.data.streamed,
    )


def _records(pair: Pair, task: str, inputs: data.Inputs, batch_size: int, compressed: bool | None) -> Iterator[dict]:
    """An object for each input."""
    names = iter(inputs.names)
    options: dict[str, Any] = {"batch_size": batch_size, "compressed": compressed}
    for outputs in predictions(pair, inputs.fetch, len(inputs.names), **options):
        count = len(jax.tree.leaves(outputs)[0])
        for i in range(count):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], outputs)
            yield {"input": next(names)} | describe(task, own, pair.summary.classes)


def describe(task: str, outputs: Any, classes: tuple[str, ...] | None) -> dict[str, Any]:
    """Returns what the outputs of one input say, JSON-ready.

    Args:
      task: its name.
      outputs: of one input, without the batch axis.
      classes: their names; None: their numbers.
    """
    if task == "classification":
        probabilities = _softmax(outputs)
        number = int(np.argmax(probabilities))
        label = str(number) if classes is None else classes[number]
        found = {"label": label, "class": number, "probability": float(probabilities[number])}
        return found | {"probabilities": probabilities.tolist()}
    if task == "multi_label":
        probabilities = 1 / (1 + np.exp(-np.float64(outputs).ravel()))
        there = np.flatnonzero(probabilities > 0.5).tolist()  # as the task's metrics have it: a logit above 0
        return {"labels": there, "probabilities": probabilities.tolist()}
    return {"outputs": jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), outputs)}


def _softmax(logits):
    logits = np.float64(logits)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _line(record):
    """The name and what there is to say, with tabs between."""
    if "label" in record:
        cells = [record["label"], f"{record['probability']:.4f}"]
    elif "labels" in record:
        cells = [f"{label}:{record['probabilities'][label]:.4f}" for label in record["labels"]] or ["none"]
    else:
        cells = [f"{value:.6g}" for value in np.ravel(record["outputs"])]
    return "\t".join([record["input"], *cells])

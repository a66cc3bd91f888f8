"""`msjax predict`: what a trained network says of a user's own inputs."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from msjax import build, data
from msjax.cli.options import preset_of, split_options
from msjax.pair import Pair, load_pair, predictions
from msjax.paths import expand
from msjax.runs import to_json
from msjax.runs.files import write_atomically

LINE_TASKS = ("classification", "multi_label", "regression")
"""Whose outputs make a line each."""

_DESCRIPTION = """\
Print what a trained network says of inputs, one line each: what it is called, the label, and of a classification the
label's probability; of multi-label tasks all labels that are there, each with its probability; of a regression the
numbers. The network is the folder of a run of msjax train, or the files of its two parts, CLIENT.safetensors
SERVER.safetensors. Inputs are images or folders of images, an .npz (an array of inputs; labels are passed over), a .csv
with the columns that the network was trained on, or, of texts, a .txt with a text a line. Images are decoded, resized
and normalised as the run's were. Features go through the codec, as in msjax eval, but each input by itself, so that
what becomes of it does not depend on the others; eval compresses a batch together, as --batch-size does here."""


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    where, rest = split_options(arguments, "--config")
    parser = argparse.ArgumentParser(prog="msjax predict", description=_DESCRIPTION)
    parser.add_argument("network", help="the run folder, or CLIENT.safetensors SERVER.safetensors")
    parser.add_argument("inputs", nargs="+", metavar="input", help="image, folder of images, .npz, .csv or .txt")
    parser.add_argument("--uncompressed", action="store_true", help="leave the features as they are")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="inputs that are compressed together")
    parser.add_argument("--json", action="store_true", help="print an object a line, with all outputs")
    parser.add_argument("--out", metavar="FILE", help="write the lines to a file instead")
    parser.add_argument("--config", metavar="FILE.py", help="the preset of a model of one's own")
    options = parser.parse_intermixed_args(rest)
    preset, inputs, server = preset_of(where), options.inputs, None
    if options.network.endswith(".safetensors"):
        server, *inputs = inputs
        if not server.endswith(".safetensors") or not inputs:
            parser.error("with files the network is CLIENT.safetensors SERVER.safetensors, and inputs come behind them")
    pair = load_pair(options.network, server, preset=preset)
    task = build.make_task(pair.config, pair.summary).name
    if task not in LINE_TASKS and not options.json:
        raise ValueError(f"--json must be given for task {task!r}, whose outputs are no line")
    compressed = False if options.uncompressed else None
    found = [_read(pair, path) for path in inputs]  # before anything is computed, so that a wrong path is told at once
    lines = (
        to_json(record) if options.json else _line(record)
        for one in found
        for record in _records(pair, task, one, options.batch_size, compressed)
    )
    if options.out is None:
        for line in lines:
            print(line, flush=True)
        return 0
    out = expand("out", options.out)
    text = "".join(line + "\n" for line in lines)
    try:
        write_atomically(out, text)
    except OSError as error:
        raise ValueError(f"out must be a file that can be written, got {options.out!r}: {error.strerror}") from None
    print(f"msjax predict: {sum(len(one.names) for one in found)} lines in {out}", file=sys.stderr)
    return 0


def _read(pair: Pair, path: str) -> data.Inputs:
    cfg, summary = pair.config, pair.summary
    build.check_tokenizer(None if summary.tokenizer is None else data.TOKENIZER, summary.tokenizer)
    return data.read_inputs(
        path,
        like=jax.tree.unflatten(summary.inputs.structure, summary.inputs.leaves),
        columns=summary.columns,
        is_text=summary.tokenizer is not None,
        vocabulary=cfg.data.vocabulary,
        set_name=cfg.data.name,
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

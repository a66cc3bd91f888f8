"""Both parts of a trained network together: predictions from inputs, and one file of the whole.

    pair = msjax.load_pair("runs/NAME")                     # or the files of the two parts
    outputs = msjax.predict(pair, x)                        # x as the data set stores inputs; outputs are logits
    msjax.pair.save_network("network.safetensors", pair)    # without the cut

Predictions go through the run's codec, as the test at its end did. The server's part may be elsewhere, behind a
network: `distributed.remote.connected_pair`.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from msjax import build, config, models
from msjax.checks import integer
from msjax.compress import Identity
from msjax.parts import NETWORK, TrainedPart, check_complete, check_run_ids, load_part, merged, save_trained
from msjax.paths import existing_file, expand
from msjax.runs import RunFolder
from msjax.split.payloads import Codecs, Payload, PayloadSpec
from msjax.split.spec import RunSpec
from msjax.split.state import prediction_key, tail_key

log = logging.getLogger("msjax")

Names = Literal["pytorch", "msjax"]
"""How the arrays of a network's file are named."""
CHUNK = 64
"""Inputs that are computed at a time, where each is compressed by itself."""


class PartElsewhere(Protocol):
    """A server's part that is not here, as `distributed.remote.RemoteServer`."""

    def answers(self, payloads: Sequence[Payload], up: PayloadSpec, down: PayloadSpec) -> list[Payload]:
        """Returns, as `down` describes them, what the part answers to features of a batch each, in order."""
        ...


class Pair(NamedTuple):
    """The two parts of one trained network; the client's has the tail, too, where the run is U-shaped."""

    client: TrainedPart
    server: TrainedPart | PartElsewhere

    @property
    def config(self) -> config.Config:
        """The config of the run that trained them."""
        if self.client.config is None:  # which `load_pair` refuses
            raise ValueError("client must be a part with a config, got one of a run from Python")
        return self.client.config

    @property
    def summary(self) -> build.DataSummary:
        """What the network has to know of its data; the client's, which knows more of it than the server's."""
        if self.client.summary is None:
            raise ValueError("client must be a part with a summary of its data, got one of a run from Python")
        return self.client.summary


def load_pair(
    run: str | os.PathLike, server: str | os.PathLike | None = None, *, preset: config.Config | None = None
) -> Pair:
    """Reads both parts of a trained network.

    Args:
      run: the folder of a finished run of `msjax train`; or, with `server`, the file of the client's part.
      server: the file of the server's part.
      preset: of a model or task of one's own; a run's folder names its preset itself.

    Raises:
      ValueError: there are no such parts, they are not of one run, or their model is not here.
    """
    if server is None:
        folder, cfg = RunFolder.open(run, read_only=True)
        folder.close()
        paths = [folder.path / f"{part}.safetensors" for part in ("client", "server")]
        if folder.is_served:
            raise ValueError(
                f"the run must be one of msjax train, got {os.fspath(run)!r} of msjax serve, whose clients have their "
                f"parts: give both files, CLIENT.safetensors and {paths[1]}"
            )
        if lacking := next((path for path in paths if not path.exists()), None):
            raise ValueError(
                f"the run must be finished, got {os.fspath(run)!r} without {lacking.name}: msjax train --resume {run}"
            )
        preset = preset or cfg
    else:
        paths = [existing_file("client", run), existing_file("server", server)]
    parts = [load_part(path, preset=preset) for path in paths]
    pair = Pair(*parts)
    if server is None and not (folder.path / "summary.json").exists():
        said = "%s has no summary.json, as it goes on to more epochs or did not end: its parts are those of step %d"
        log.warning(said, os.fspath(run), pair.client.step)
    for name, part, path in zip(Pair._fields, parts, paths, strict=True):
        if part.part != name:
            raise ValueError(f"{name} must be the file of a {name}'s part, got that of a {part.part}: {path}")
        check_complete(part, os.fspath(path))
    check_run_ids(*(part.run_id for part in parts), ("of the client", "of the server"))
    return pair


def predict(pair: Pair, inputs: Any, *, batch_size: int = 1, compressed: bool | None = None) -> Any:
    """Returns the network's outputs for inputs, in float32; logits of a classification.

    The features go through the codec of the run's tests, with a budget (`cut_bits`) aimed at what training aimed at in
    the end. A codec compresses what it is given at once together, so that what becomes of an input depends on what else
    is in its batch; with a batch size of 1 it does not.

    Args:
      inputs: (N, …), as the data set stores them: uint8 images, tokens, or a table's inputs, which
        `data.read_inputs` makes of files.
      batch_size: inputs whose features are compressed together; a test takes the run's own. A codec that draws random
        numbers draws the same in every batch, so that equal batches have equal outputs.
      compressed: whether features go through the codec; by default as in the run's tests.

    Raises:
      ValueError: `inputs` are not such as the network takes, `batch_size` is below 1, or a server elsewhere refuses.
      ConnectionError: such a server is lost.
    """
    inputs = jax.tree.map(np.asarray, inputs)  # also of a pandas.DataFrame
    leaves = jax.tree.leaves(inputs)
    if not all(np.ndim(leaf) for leaf in leaves):
        raise ValueError("inputs must be arrays (N, …), or a dict or tuple of such, got single numbers")
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) != 1:
        raise ValueError(f"inputs must have one length, got {sorted(lengths)}")
    fetch = lambda lo, hi: jax.tree.map(lambda leaf: leaf[lo:hi], inputs)  # noqa: E731
    found = list(predictions(pair, fetch, lengths.pop(), batch_size=batch_size, compressed=compressed))
    if not found:
        raise ValueError("inputs must have an example, got none")
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def predictions(
    pair: Pair, fetch: Any, count: int, *, batch_size: int = 1, compressed: bool | None = None
) -> Iterator[Any]:
    """Yields the outputs of `predict` piece by piece, of inputs that `fetch(first, last)` reads; see `data.Inputs`."""
    batch_size = integer("batch_size", batch_size, 1)
    cfg = pair.config
    if compressed is not None:
        cfg = dataclasses.replace(cfg, eval_compressed=compressed)
    spec = build.spec_of(cfg, pair.summary, test_samples=cfg.clients)
    up_bits = None if pair.client.up_bits is None else jnp.float32(pair.client.up_bits)
    key = prediction_key(cfg.seed)
    client = jax.device_put((pair.client.params, pair.client.stats))
    if isinstance(pair.server, TrainedPart):
        server = jax.device_put((pair.server.params, pair.server.stats))
        compute = lambda x: _outputs(spec, client, server, x, key, up_bits)  # noqa: E731
    else:
        compute = lambda x: _outputs_of_elsewhere(spec, client, pair.server, x, key, up_bits)  # noqa: E731
    at = 0
    while at < count:
        batches = max(1, CHUNK // batch_size)
        if count - at < batches * batch_size:  # what is left: whole batches, then the rest of one
            batches = max(1, (count - at) // batch_size)
        taken = min(batches * batch_size, count - at)
        x = fetch(at, at + taken)
        _check_inputs(x, pair.summary)
        x = jax.tree.map(lambda leaf, b=batches: np.reshape(leaf, (b, len(leaf) // b, *np.shape(leaf)[1:])), x)
        outputs = jax.device_get(compute(x))
        yield jax.tree.map(lambda leaf: np.asarray(leaf, np.float32).reshape(-1, *leaf.shape[2:]), outputs)
        at += taken


def of_length(pair: Pair, length: int) -> Pair:
    """Returns a language model for texts of `length` tokens: the same arrays, as no array's shape depends on it.

    Raises:
      ValueError: the model has no such context; raised where it is used.
    """
    tokens = pair.summary.inputs.of_length(length)
    summary = pair.summary._replace(inputs=tokens, labels=tokens)
    cfg = config.with_fields(pair.config, {"data.text_length": length})
    return pair._replace(client=pair.client._replace(summary=summary, config=cfg))


def _check_inputs(x, summary):
    expected = summary.inputs
    found = [(np.shape(leaf)[1:], leaf.dtype) for leaf in jax.tree.leaves(x)]
    if found != [(leaf.shape, leaf.dtype) for leaf in expected.leaves]:
        got = ", ".join(f"{dtype}{list(shape)}" for shape, dtype in found)
        raise ValueError(f"inputs must be {expected} each, as the network takes them, got {got}")


@functools.partial(jax.jit, static_argnums=0)
def _outputs(spec, client, server, x, key, up_bits):
    """Outputs (K, B, …) of inputs (K, B, …), each batch through the codec by itself."""
    payloads = _features(spec, client, x, key, up_bits)

    def one_batch(payload):
        batch_size = jax.tree.leaves(x)[0].shape[1]
        y, _ = spec.server(*server, spec.test_payload(batch_size).decode(payload), train=False, key=None)
        if spec.u_shaped:
            tail = spec.tail_test_payload(batch_size)
            y = tail.decode(tail.encode(y, tail_key(key)))
        return y

    y = jax.vmap(one_batch)(payloads)
    return _tail_outputs(spec, client, y) if spec.u_shaped else y


def _outputs_of_elsewhere(spec, client, server, x, key, up_bits):
    """The same, with a message for each batch to where the server's part is."""
    batches, batch_size = jax.tree.leaves(x)[0].shape[:2]
    up, down = spec.test_payload(batch_size), answer_spec(spec, batch_size)
    payloads = jax.device_get(_features(spec, client, x, key, up_bits))
    answers = server.answers([jax.tree.map(lambda leaf, n=n: leaf[n], payloads) for n in range(batches)], up, down)
    return _received(spec, down, client, jax.tree.map(lambda *leaves: np.stack(leaves), *answers))


def answer_spec(spec: RunSpec, batch_size: int) -> PayloadSpec:
    """Returns the spec of what a server's part elsewhere answers to test features: outputs or the tail's features."""
    if spec.u_shaped:
        return spec.tail_test_payload(batch_size)
    return PayloadSpec.of_features(spec.outputs, Codecs(Identity()), batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _received(spec, down, client, payloads):
    """Outputs (K, B, …) from what the server answered, payloads (K, …)."""
    y = jax.vmap(down.decode)(payloads)
    return _tail_outputs(spec, client, y) if spec.u_shaped else y


@functools.partial(jax.jit, static_argnums=0)
def _features(spec, client, x, key, up_bits):
    """Payloads (K, …) of inputs (K, B, …)."""

    def one_batch(x):
        h, _ = spec.client(*client, spec.preprocess(x), train=False, key=None)
        return spec.test_payload(jax.tree.leaves(x)[0].shape[0]).encode(h, key, up_bits)

    return jax.vmap(one_batch)(x)


@functools.partial(jax.jit, static_argnums=0)
def _tail_outputs(spec, client, h):
    """Outputs (K, B, …) of the tail for its features (K, B, …)."""
    return jax.vmap(lambda h: spec.tail(*client, h, train=False, key=None)[0])(h)


def model_parts(client: TrainedPart, server: TrainedPart | PartElsewhere) -> tuple[models.ModelPart, ...]:
    """Returns the parts of a network: client, server and, where the run was U-shaped, tail.

    A server's part that is elsewhere has shapes and dtypes in place of arrays.
    """
    first, second, *tail = jax.eval_shape(lambda: build.make_parts(client.config, client.summary))

    def filled(part, trained):
        return part._replace(
            params={name: trained.params[name] for name in part.params},
            stats={name: trained.stats[name] for name in part.stats},
        )

    second = filled(second, server) if isinstance(server, TrainedPart) else second
    return filled(first, client), second, *(filled(part, client) for part in tail)


def whole(pair: Pair) -> models.ModelPart:
    """Returns all parts as one, from the network's inputs, normalised, to its outputs; nothing is compressed in it.

    Raises:
      ValueError: the server's part is elsewhere.
    """
    if not isinstance(pair.server, TrainedPart):
        raise ValueError("pair must have both parts here, got one whose server's part is elsewhere")
    return merged(pair.config, model_parts(pair.client, pair.server))


def save_network(path: str | os.PathLike, pair: Pair, *, names: Names | None = None) -> Names:
    """Writes all parts of a network as one safetensors file, atomically.

    Args:
      names: "pytorch": as `models.save_weights` names the arrays, which `models.load_weights`, `--model.weights` and
        PyTorch read; the file does not say what inputs are normalised by. A decoder becomes a folder that Hugging
        Face's transformers reads, adapters merged, with the tokenizer's files where they are on this machine. "msjax":
        `params/BLOCK/…` and `stats/BLOCK/…`
        with config and normalisation, which `load_part` reads as one part. By default the first where the model has
        such names.

    Returns:
      Which names they are.

    Raises:
      ValueError: the model has no names in PyTorch, or `names` is neither.
      OSError: the file cannot be written.
    """
    cfg, summary = pair.config, pair.summary
    own = config.is_reference(cfg.model.name)
    if names is None:
        names = "pytorch" if cfg.model.name in models.PYTORCH else "msjax"
    network = whole(pair)
    if names == "pytorch":
        if own:
            raise ValueError(
                'names must be "msjax" for a model of one\'s own, which has no names in PyTorch, got "pytorch"'
            )
        model, beside = build.make_model(cfg, summary), _tokenizer_folder(cfg)
        models.save_weights(path, model, network.params, network.stats, beside=beside)
    elif names == "msjax":
        ids = {"run_id": pair.client.run_id, "step": pair.client.step}
        save_trained(path, NETWORK, network, cfg, summary, **ids)
    else:
        raise ValueError(f'names must be "pytorch" or "msjax", got {names!r}')
    return names


def _tokenizer_folder(cfg):
    """Where the files of a decoder's tokenizer are, if the config says so and they are on this machine."""
    if cfg.data.tokenizer is None:
        return None
    path = expand("data.tokenizer", cfg.data.tokenizer)
    folder = path if path.is_dir() else path.parent
    return folder if (folder / "tokenizer.json").is_file() else None

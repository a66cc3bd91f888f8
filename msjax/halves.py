"""A trained half of a network in one file, to be used or trained further elsewhere.

    trained = halves.load("server.safetensors")
    y, _ = trained.apply(trained.params, trained.stats, h, train=False)

A client's half takes inputs as its data set gives them, normalised: `data.normalize(x, info.mean, info.std)` of its
`info`; a server's takes features.

The file is in the safetensors format: float32 arrays by name, `params/BLOCK/…` and `stats/BLOCK/…`, and in its header
what they are. Reading it executes nothing, and other frameworks read it too.
"""

import json
import os
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from msjax import assemble, config, models

_FORMAT = "msjax-half-1"


class TrainedHalf(NamedTuple):
    """One party's part of a trained network; `params` and `stats` are those of the head too, where it has it."""

    apply: models.Apply
    params: dict[str, Any]
    stats: dict[str, Any]
    part: Literal["client", "server"]
    config: config.Config
    """Of the run that trained it, without the paths of its machine."""
    info: assemble.SetInfo
    """Of the data set: shape of an input, number of classes, and what inputs are normalised by."""
    run: str
    """Names the run that trained it: halves of one run have the same."""
    step: int
    """How many steps it was trained for."""
    head: models.Apply | None
    """U-shaped: the client's layers behind the server's."""


def save(
    path: str | os.PathLike,
    part: Literal["client", "server"],
    half: Any,
    cfg: config.Config,
    info: assemble.SetInfo,
    *,
    run: str,
    step: int,
) -> None:
    """Writes `half`, anything with `params` and `stats`, whole or not at all; see `TrainedHalf` for the rest.

    Raises:
      OSError: it cannot be written.
    """
    header = {
        "format": _FORMAT,
        "part": part,
        "run": run,
        "step": str(step),
        "config": json.dumps(config.to_json(config.without_paths(cfg))),
        "info": json.dumps({name: np.asarray(value).tolist() for name, value in info._asdict().items()}),
    }
    arrays = {name: np.asarray(leaf) for name, leaf in _by_name(half.params, half.stats)}
    path = pathlib.Path(path)
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        temporary.write_bytes(safetensors.numpy.save(arrays, metadata=header))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> TrainedHalf:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is not a half of a network, or not one that fits its own config.
      OSError: it cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} must have the format {_FORMAT!r}, got {header.get('format')!r}")
    try:
        cfg = config.from_json(json.loads(header["config"]))
        info = json.loads(header["info"])
        info = assemble.SetInfo(
            tuple(info["input_shape"]), info["num_classes"], tuple(info["mean"]), tuple(info["std"])
        )
        part, run, step = header["part"], header["run"], int(header["step"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not fit this version of msjax: {error}") from None
    if part not in ("client", "server"):
        raise ValueError(f"{path} must be of a client or a server, got {part!r}")
    client, server, *head = jax.eval_shape(lambda: assemble.make_halves(cfg, info))
    mine = [client, *head] if part == "client" else [server]
    params = {name: value for half in mine for name, value in half.params.items()}
    stats = {name: value for half in mine for name, value in half.stats.items()}
    params, stats = _fill(params, stats, arrays, path)
    head_apply = head[0].apply if head and part == "client" else None
    return TrainedHalf(mine[0].apply, params, stats, part, cfg, info, run, step, head_apply)


def _by_name(params, stats):
    """Pairs of name and leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path({"params": params, "stats": stats})
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in leaves]


def _fill(params, stats, arrays, path):
    """`params` and `stats`, whose leaves are shapes and dtypes, with the arrays of their names."""
    names = _by_name(params, stats)
    expected = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in names}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if expected != found:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(f"{path} must hold the arrays of its config, but these differ: {', '.join(wrong[:5])}")
    structure = jax.tree.structure({"params": params, "stats": stats})
    tree = jax.tree.unflatten(structure, [arrays[name] for name, _ in names])
    return tree["params"], tree["stats"]

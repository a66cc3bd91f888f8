"""A trained part of a network in one file, to be used or trained further elsewhere.

    trained = msjax.load_part("server.safetensors")
    y, _ = trained.apply(trained.params, trained.stats, h, train=False)

A client's part takes inputs as its data set gives them, normalised: `summary.normalize(x)` of its `summary`; a server's
takes features. Of a table, `data.standardized_inputs(rows, summary.columns)` makes such inputs of them.

The file of a whole network, which `pair.save_network` writes, is read likewise: its `apply` takes inputs.

The file is in the safetensors format: arrays by name, `params/BLOCK/…` and `stats/BLOCK/…`, and in its header what they
are. Reading it executes nothing, and other frameworks read it too. Of a model of one's own the file holds the arrays
alone: `load_part(path, model)` puts them into the model.
"""

import dataclasses
import functools
import json
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from msjax import build, config, models
from msjax.runs.files import write_atomically
from msjax.split.make_spec import merge_arrays
from msjax.split.trees import TreeSpec, named_leaves

_FORMAT = "msjax-half-1"  # of parts of a config's model; the name is of the first version
_OWN_FORMAT = "msjax-part-1"  # of parts of a user's model
NETWORK = "network"
"""In place of a part: all parts merged, see `pair.save_network`."""


class TrainedPart(NamedTuple):
    """One party's part of a trained network; `params` and `stats` are those of the tail too, where it has it.

    Attributes:
      apply: the part's function; None of a user's model that was not given.
      part: "client" or "server"; of a model of one's own also "tail"; or "network", all of them merged.
      config: of the run that trained it, without the paths of its machine; None where it was started from Python.
      summary: of the data set: one input, classes, what inputs are normalised by; None where nobody told it.
      run_id: names the run that trained it, and of a served one the course that led to its end: parts that belong
        together have the same. See `served_run_id`.
      step: how many steps it was trained for.
      tail: U-shaped: the function of the client's layers behind the server's.
      up_bits: of a client's part that was trained with a budget (`cut_bits`): the bits that its features were aimed at
        in the end, at which it goes on; else None.
      description: of a model of one's own, what `save_part` was given; else None.
    """

    apply: Callable[..., Any] | None
    params: dict[str, Any]
    stats: dict[str, Any]
    part: str
    config: config.Config | None
    summary: build.DataSummary | None
    run_id: str
    step: int
    tail: Callable[..., Any] | None
    up_bits: float | None = None
    description: dict[str, Any] | None = None


def save_trained(
    path: str | os.PathLike,
    part: str,
    trained: Any,
    cfg: config.Config,
    summary: build.DataSummary,
    *,
    run_id: str,
    step: int,
    up_bits: float | None = None,
) -> None:
    """Writes a part of a config's run, atomically; `trained` is anything with `params` and `stats`.

    The other arguments are as of `TrainedPart`.

    Raises:
      OSError: it cannot be written.
    """
    header = {
        "format": _FORMAT,
        "part": part,
        "run": run_id,
        "step": str(step),
        "config": json.dumps(config.to_json(config.without_paths(cfg), paths=False)),
        "info": json.dumps(summary.to_json()),
    }
    _write(path, trained, header | _aim(up_bits))


def save_part(
    path: str | os.PathLike,
    part: str,
    trained: Any,
    *,
    description: dict[str, Any] | None = None,
    summary: build.DataSummary | None = None,
    step: int = 0,
    up_bits: float | None = None,
) -> None:
    """Writes a part of a user's model, atomically; `trained` is anything with `params` and `stats`.

    A loop of your own that is to go on from there keeps the optimizer's state beside it, for example with Orbax.

    Args:
      part: one of `models.PARTS`.
      description: of the run that trained it, JSON-ready.
      summary, up_bits: see `TrainedPart`.

    Raises:
      TypeError: `trained` has no `params` or `stats`, as a module has none.
      ValueError: `part` is none of `models.PARTS`, or `up_bits` not what `load_part` takes.
      OSError: it cannot be written.
    """
    if not (hasattr(trained, "params") and hasattr(trained, "stats")):
        raise TypeError(f"trained must have params and stats, as what as_part returns, got {type(trained).__name__}")
    if part not in models.PARTS:
        raise ValueError(f"part must be one of {', '.join(models.PARTS)}, got {part!r}")
    if not _may_aim(part, None, up_bits):
        raise ValueError(f"up_bits must be above 0 and at most 64, and only of a client, got {up_bits} of {part!r}")
    header = {"format": _OWN_FORMAT, "part": part, "step": str(step), "description": json.dumps(description or {})}
    info = {} if summary is None else {"info": json.dumps(summary.to_json())}
    _write(path, trained, header | info | _aim(up_bits))


def _may_aim(part, cfg, up_bits):
    """Whether a part may have these `up_bits`; `cfg` is the config of its run, None where that has none."""
    return up_bits is None or (part == "client" and (cfg is None or cfg.cut_bits is not None) and 0 < up_bits <= 64)


def _aim(up_bits):
    return {} if up_bits is None else {"up_bits": f"{up_bits:.6g}"}


def _write(path, trained, header):
    # In order and of this machine's bytes, as safetensors takes an array's memory as it is.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _by_name(trained.params, trained.stats)}
    arrays = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    content = safetensors.numpy.save(arrays, metadata=header | {"crc32": _crc(arrays)})
    write_atomically(path, _in_order(content))


def _in_order(content):
    """The same file with its metadata in order, which safetensors writes in another order each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:end])
    metadata = dict(sorted(head.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata} | head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def _crc(arrays):
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), crc))
    return str(crc)


def load_part(
    path: str | os.PathLike, model: Any = None, inputs: Any = None, *, preset: config.Config | None = None
) -> TrainedPart:
    """Reads what `save_trained` or `save_part` wrote.

    Args:
      model: of a model of one's own, the part that the arrays belong to, as `models.as_part` takes it. Without it they
        come as nested dicts, and `apply` is None.
      inputs: arrays of a batch as the part takes them, or their shapes and dtypes; needed for a Linen module.
      preset: of a run whose config names functions of a preset, or has a codec of one's own, the preset; see
        `config.load_preset`.

    Raises:
      ValueError: the file is not a part of a network, or not one that fits its own config or the model.
      OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file of a part, got the folder {str(path)!r}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None
    if "crc32" in header and header["crc32"] != _crc(arrays):
        raise ValueError(f"{path} is damaged: its arrays are not those that were written")
    if header.get("format") not in (_FORMAT, _OWN_FORMAT):
        raise ValueError(f"{path} must have the format {_FORMAT!r} or {_OWN_FORMAT!r}, got {header.get('format')!r}")
    try:
        own = header["format"] == _OWN_FORMAT
        cfg = None if own else config.from_json(json.loads(header["config"]), preset=preset)
        told = not own or "info" in header  # earlier versions did not tell it of a model of one's own
        summary = build.DataSummary.from_json(json.loads(header["info"])) if told else None
        part, run_id, step = header["part"], header.get("run", ""), int(header["step"])
        up_bits = float(header["up_bits"]) if "up_bits" in header else None
        description = json.loads(header.get("description", "{}")) if own else None
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not fit this version of msjax: {error}") from None
    if part not in (models.PARTS if own else (*models.PARTS[:2], NETWORK)):
        raise ValueError(f"{path} must be of a client or a server, got {part!r}")
    if not _may_aim(part, cfg, up_bits):
        raise ValueError(
            f"{path} must have up_bits above 0, at most 64, and only of a client trained with cut_bits, got {up_bits:g}"
        )
    if cfg is not None and preset is not None:
        cfg = config.with_places_of(cfg, preset)
    rest = {"part": part, "config": cfg, "summary": summary, "run_id": run_id, "step": step, "up_bits": up_bits}
    rest["description"] = description
    if model is not None:
        like = models.as_part(model, inputs, name="model", x_name="inputs")
        fits = {name for name, _ in _by_name(like.params, like.stats)}
        params, stats = _fill(like.params, like.stats, _unscoped(arrays, part, fits), path)
        return TrainedPart(like.apply, params, stats, tail=None, **rest)
    if cfg is None or summary is None or (config.is_reference(cfg.model.name) and preset is None):
        tree = unflatten_dict(arrays, sep="/")
        return TrainedPart(None, tree.get("params", {}), tree.get("stats", {}), tail=None, **rest)
    client, server, *tail = jax.eval_shape(lambda: build.make_parts(cfg, summary))
    if part == NETWORK:
        whole = merged(cfg, (client, server, *tail))
        params, stats = _fill(whole.params, whole.stats, arrays, path)
        apply = _NamedApply(part, whole.apply, _what_it_takes(cfg, summary, (client, server, *tail), 0))
        return TrainedPart(apply, params, stats, tail=None, **rest)
    mine = [client, *tail] if part == "client" else [server]
    params = {name: value for p in mine for name, value in p.params.items()}
    stats = {name: value for p in mine for name, value in p.stats.items()}
    params, stats = _fill(params, stats, arrays, path)
    chain, at = (client, server, *tail), models.PARTS.index(part)
    tail_apply = _NamedApply("tail", tail[0].apply, _what_it_takes(cfg, summary, chain, 2)) if tail and not at else None
    apply = _NamedApply(part, chain[at].apply, _what_it_takes(cfg, summary, chain, at))
    return TrainedPart(apply, params, stats, tail=tail_apply, **rest)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _NamedApply:
    """A part's function that says what it takes, where it cannot take what it is given."""

    part: str
    apply: Callable[..., Any]
    takes: Callable[[], Any] = dataclasses.field(compare=False)

    @property
    def constants(self) -> frozenset[str]:
        """See `models.constants_of`."""
        return models.constants_of(self.apply)

    @property
    def draws_by_place(self) -> bool:
        """See `models.ModelPart`."""
        return getattr(self.apply, "draws_by_place", False)

    def __call__(self, params, stats, x, *, train, key=None):
        try:
            return self.apply(params, stats, x, train=train, key=key)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            wanted, given = _show(self.takes()), _show(x)
            if wanted == given:
                raise
            raise ValueError(f"x must be what the {self.part}'s part takes, {wanted}, got {given}") from error


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Sequence:
    """The functions of all parts, one after the other, of which each takes its own of the arrays."""

    parts: tuple[Callable[..., Any], ...]

    def __call__(self, params, stats, x, *, train, key=None):
        new_stats = dict(stats)
        for apply in self.parts:
            x, changed = apply(params, stats, x, train=train, key=key)
            new_stats |= changed
        return x, new_stats


def merged(cfg: config.Config, chain: tuple[models.ModelPart, ...]) -> models.ModelPart:
    """Returns all parts of a network as one, without what happens to the features between them.

    The arrays of msjax's own models keep their blocks' names; those of a model of one's own, which may have the same
    names in two parts, are under "client", "server" and "tail".
    """
    if config.is_reference(cfg.model.name):
        chain = tuple(part.scoped(name) for name, part in zip(models.PARTS, chain, strict=False))
    params, stats = (merge_arrays(*(getattr(part, name) for part in chain)) for name in ("params", "stats"))
    return models.ModelPart(_Sequence(tuple(part.apply for part in chain)), params, stats)


def _show(tree):
    """A batch, its first axis as B."""
    shown = []
    for name, leaf in named_leaves(tree):
        shape, dtype = np.shape(leaf), getattr(leaf, "dtype", type(leaf).__name__)
        axes = ", ".join(["B", *map(str, shape[1:])]) if shape else ""
        shown.append(f"{name + ': ' if name else ''}{dtype}[{axes}]")
    return ", ".join(shown) or str(jax.tree.structure(tree))


def _what_it_takes(cfg, summary, chain, at):
    """A function that returns shapes and dtypes of a batch that goes into `chain[at]`."""

    @functools.cache
    def takes():
        x = jax.eval_shape(build.make_preprocess(cfg, summary), summary.inputs.batch(2))
        for part in chain[:at]:
            if isinstance(part.apply, models.RemoteApply):
                x = TreeSpec(*part.apply.outputs).batch(2)
            else:
                apply = functools.partial(part.apply, train=False)
                x, _ = jax.eval_shape(apply, part.params, part.stats, x)
        return x

    return takes


def check_complete(trained: TrainedPart, name: str) -> None:
    """Raises ValueError where a part says of no run how it is used, or its model is not here; `name` names it."""
    if trained.config is None:
        raise ValueError(
            f"{name} must be a part of msjax train or msjax serve, got one of a run from Python, without a config"
        )
    if trained.apply is None:
        raise ValueError(f"{name} is of a model of one's own: give `preset`, on the command line --config")


def served_run_id(run: str, generation: int) -> str:
    """Returns the `run_id` of the parts of a served run: its name, and the generation in which it ended.

    Where all went back from an end, and others took part the next time, the parts that were kept before are of another
    network.
    """
    return f"{run}-{generation:x}"


def run_name(run_id: str) -> str:
    """Returns the name of the run alone, of a `run_id`."""
    return run_id.partition("-")[0]


def check_run_ids(first: str, second: str, where: tuple[str, str]) -> None:
    """Raises ValueError where two parts are not of one run, or of two ends of it; `where` says where each is."""
    twice = run_name(first) == run_name(second)
    one_is_earlier = twice and run_name(first) in (first, second)  # of a version that did not tell the end
    if first != second and not one_is_earlier:
        why = ". The run ended more than once: take two of one end, or resume it to another" if twice else ""
        raise ValueError(f"the parts must be of one run, got {first!r} {where[0]} and {second!r} {where[1]}{why}")


def part_run_id(path: str | os.PathLike) -> str:
    """Returns the name of the run that trained the part in a file; empty where it has none or is no part's."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("run", "")
    except (OSError, safetensors.SafetensorError):
        return ""


def _by_name(params, stats):
    """Pairs of name and leaf."""
    return named_leaves({"params": params, "stats": stats})


def _unscoped(arrays, part, fits):
    """Arrays without the name of their part, which earlier versions put before those of U-shaped networks."""
    without = {name.replace(f"/{part}/", "/", 1): array for name, array in arrays.items()}
    return without if without.keys() == fits != arrays.keys() else arrays


def _fill(params, stats, arrays, path):
    """`params` and `stats`, whose leaves are shapes and dtypes, with the arrays of their names."""
    names = _by_name(params, stats)
    # As JAX has them: of doubles, which NumPy makes by default, those of float32.
    arrays = {n: array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False) for n, array in arrays.items()}
    expected = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in names}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if expected != found:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise ValueError(f"{path} must hold the arrays of its model, but these differ: {', '.join(wrong[:5])}")
    structure = jax.tree.structure({"params": params, "stats": stats})
    tree = jax.tree.unflatten(structure, [arrays[name] for name, _ in names])
    return tree["params"], tree["stats"]

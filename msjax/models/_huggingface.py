"""Weights of decoders in a folder as Hugging Face's hub has them: config.json, and safetensors files in one or more."""

import functools
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree

from msjax.models._decoder_config import DecoderConfig
from msjax.models._model import Model
from msjax.models._part import ModelPart
from msjax.models._split import Apply, base, check_state, untied, whole_shapes, with_adapters_merged

SHARD_BYTES = 5_000_000_000
"""The most that a file holds when weights are written, as by the package transformers."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float32}  # JAX has no doubles
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_NAMED = 3  # names of each kind in a message


def decoder_config(model: Model) -> DecoderConfig:
    """The config of one of `decoder`'s models; the output layer is tied as the model has it."""
    return dict(model.blocks[0].options)["config"]


def is_decoder(folder: str | os.PathLike) -> bool:
    """Whether a folder is meant to be one of Hugging Face's: weights in that layout, or a model's config.json."""
    folder = pathlib.Path(folder).expanduser()
    if any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return True
    try:
        return "model_type" in json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def end_tokens(folder: str | os.PathLike) -> tuple[int, ...]:
    """The tokens that end a text, as generation_config.json or config.json of a folder say them; empty for none.

    Models that were tuned for chats have several, and some only in their generation_config.json.

    Raises:
      ValueError: a file is no JSON, or what it says are no tokens.
    """
    for name in ("generation_config.json", "config.json"):
        file = pathlib.Path(folder).expanduser() / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} must be JSON that can be read: {error}") from None
        found = found if isinstance(found, list) else [] if found is None else [found]
        if any(type(token) is not int or token < 0 for token in found):
            raise ValueError(f"eos_token_id must be a token or a list of tokens in {file}, got {found}")
        if found:
            return tuple(found)
    return ()


def load_decoder(folder: str | os.PathLike, model: Model, dtype: Any = None) -> ModelPart:
    """Reads the weights of a decoder: `model` without a cut and adapters.

    Args:
      folder: has model.safetensors, or model.safetensors.index.json and the files that it names.
      dtype: of the arrays; by default each has that of its tensor, so that bfloat16 stays.

    Raises:
      ValueError: a file is missing or no safetensors file, tensors are missing or unknown, or have other shapes or
        dtypes than the model.
      OSError: a file cannot be read.
    """
    return jax.tree.map(jnp.asarray, open_decoder(folder, model, dtype))


def open_decoder(folder: str | os.PathLike, model: Model, dtype: Any = None) -> ModelPart:
    """Returns what `load_decoder` does with `Tensor`s in place of arrays, of which nothing is read yet.

    `split` reads those of each part when it makes it, one after the other, so that a party which keeps one part has
    room for that alone.
    """
    folder = pathlib.Path(folder).expanduser()
    model = base(model)
    names = _names(model)
    files = _files(folder)
    # A tied output layer is in some files beside the embedding; older ones have what follows from config.json.
    strangers = [name for name in files if name.endswith("rotary_emb.inv_freq")]
    strangers += ["lm_head.weight"] if "lm_head.weight" not in names else []
    found = {name: file for name, file in files.items() if name not in strangers}
    _check(folder, names, model, found)
    tensors = {tuple(path): Tensor(found[name], name, transposed, dtype) for name, (path, transposed) in names.items()}
    return ModelPart(Apply(model.blocks), unflatten_dict(tensors), {})


class Tensor:
    """A tensor of a file that is mapped into memory; `np.asarray` and `jnp.asarray` read it.

    Attributes:
      shape, dtype: of the array as the model has it: dense layers are transposed.
    """

    def __init__(self, file: "_File", name: str, transposed: bool, dtype: Any = None):
        self._file, self._name, self._transposed = file, name, transposed
        shape = file.shape(name)
        self.shape = shape[::-1] if transposed else shape
        self.dtype = np.dtype(file.dtype(name) if dtype is None else dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        tensor = self._file.read(self._name)
        return (tensor.T if self._transposed else tensor).astype(self.dtype if dtype is None else dtype, copy=False)


class _File:
    """A safetensors file that is open."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} must be a safetensors file that can be read: {error}") from None
        self.names = tuple(self._file.keys())

    def shape(self, name):
        return tuple(self._file.get_slice(name).get_shape())

    def kind(self, name):
        return self._file.get_slice(name).get_dtype()

    def dtype(self, name):
        return _FLOATS[self.kind(name)]

    def read(self, name):
        return self._file.get_tensor(name)


def save_decoder(
    folder: str | os.PathLike,
    model: Model,
    params: PyTree,
    stats: PyTree = None,
    *,
    beside: str | os.PathLike | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a whole decoder so that the package transformers, and `load_decoder`, read it.

    Args:
      folder: is made, or empty; config.json comes last.
      params, stats: nested dicts of arrays, by block name first: those of the parts merged. Each keeps its dtype;
        adapters are added to the weights that they were trained beside. Where a cut has separated an output layer from
        the embedding that it was tied to, and one was trained, both are written, and config.json says that they are not
        tied.
      beside: a folder whose tokenizer and generation settings are copied.
      shard_bytes: the most that a file holds; a tensor that is larger has one to itself.

    Raises:
      ValueError: `folder` is not empty, or `params` are not those of the model.
      OSError: a file cannot be written.
    """
    params = with_adapters_merged(model, params, stats or {})
    model = base(model)
    head = params.get("head", {})
    if "lm_head" in head and decoder_config(model).tie_word_embeddings:
        table = np.asarray(params["embedding"]["embed_tokens"]["embedding"])
        if np.array_equal(np.asarray(head["lm_head"]["kernel"]).T, table):
            params = params | {"head": {name: tree for name, tree in head.items() if name != "lm_head"}}
        else:
            model = untied(model)
    check_state(model, params, {})
    folder = pathlib.Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {os.fspath(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {}
    for name, (path, transposed) in _names(model).items():
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)
        leaves[name] = (leaf, transposed)
    shards = _shards({name: leaf.nbytes for name, (leaf, _) in leaves.items()}, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name in names:
            leaf, transposed = leaves[name]
            array = np.asarray(leaf)
            arrays[name] = np.ascontiguousarray(array.T if transposed else array)
        # The header that PyTorch's libraries look for.
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(leaf.nbytes for leaf, _ in leaves.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name in _BESIDE if beside is not None else ():
        if (source := pathlib.Path(beside).expanduser() / name).is_file():
            shutil.copyfile(source, folder / name)
    tied = "lm_head.weight" not in leaves
    dtype = jnp.result_type(*(leaf.dtype for leaf, _ in leaves.values())).name
    config = decoder_config(model).to_json() | {"tie_word_embeddings": tied, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _names(model):
    """By the name in Hugging Face's files, the path of each array of the model, and whether it is transposed there."""
    found = {}
    for keys, _ in jax.tree.leaves_with_path(whole_shapes(model).params):
        block, *modules, leaf = path = tuple(key.key for key in keys)
        if block.startswith("decoder"):
            modules = ["model", "layers", str(int(block.removeprefix("decoder")) - 1), *modules]
        elif modules != ["lm_head"]:
            modules = ["model", *modules]
        found[".".join([*modules, "bias" if leaf == "bias" else "weight"])] = path, leaf == "kernel"
    return found


def open_files(path: pathlib.Path) -> dict[str, "_File"]:
    """Returns by a tensor's name the file that it is in: of a folder as `load_decoder` takes it, or of one file.

    Raises:
      ValueError: a file is missing or no safetensors file.
    """
    if path.is_dir():
        return _files(path)
    file = _File(path)
    return dict.fromkeys(file.names, file)


def _files(folder):
    """By a tensor's name, the file that it is in."""
    if not folder.is_dir():
        raise ValueError(f"weights must be a folder with config.json and {WEIGHTS}, got {os.fspath(folder)!r}")
    if (folder / WEIGHTS).exists():
        file = _File(folder / WEIGHTS)
        return dict.fromkeys(file.names, file)
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} must have {WEIGHTS} or {INDEX}, and has neither")
    try:
        weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} must be JSON with a weight_map: {type(error).__name__}: {error}") from None
    for shard in shards:
        if not isinstance(shard, str) or shard != os.path.basename(shard):
            raise ValueError(f"{folder / INDEX} must name files of its folder, got {shard!r}")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder} must have all files that {INDEX} names; {shard} is missing")
    opened = {shard: _File(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in opened[shard].names:
            raise ValueError(f"{folder / shard} must have {name}, as {INDEX} says, and has not")
    return {name: opened[shard] for name, shard in weight_map.items()}


def _check(folder, names, model, found):
    """Raises ValueError where names, shapes or dtypes are not those of the model."""
    shapes = whole_shapes(model).params
    others, kinds = [], []
    for name, (path, transposed) in names.items():
        if name in found:
            shape = functools.reduce(lambda tree, key: tree[key], path, shapes).shape
            shape = shape[::-1] if transposed else shape
            if found[name].shape(name) != shape:
                others.append(f"{name} is {found[name].shape(name)} rather than {shape}")
            if found[name].kind(name) not in _FLOATS:
                kinds.append(f"{name} is {found[name].kind(name)}")
    problems = {
        "missing": [name for name in names if name not in found],
        "unknown": [name for name in found if name not in names],
        "other shapes": others,
        "dtypes that are not floating point": kinds,
    }
    if wrong := [f"{problem}: {some(found_names)}" for problem, found_names in problems.items() if found_names]:
        raise ValueError(f"{folder} must hold the weights of its config.json's decoder; {'; '.join(wrong)}")


def some(names):
    """The first few of them."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shards(nbytes, most):
    """Names in groups, one after the other, of at most so many bytes."""
    groups, size = [[]], 0
    for name, count in nbytes.items():
        if groups[-1] and size + count > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups

"""Weights in PyTorch's names and layouts, read from safetensors files and written to them."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree

from msjax.models._build import RESNETS
from msjax.models._decoder import DECODER
from msjax.models._huggingface import load_decoder, save_decoder, some
from msjax.models._model import Model
from msjax.models._split import Apply, ModelPart, check_state, last_block, whole_shapes

PYTORCH = ("vgg19", *RESNETS, DECODER)
"""The models that have names in PyTorch."""
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def load_weights(path: str | os.PathLike, model: Model, *, new_head: bool = False, seed: int = 0) -> ModelPart:
    """Reads weights in PyTorch's names from a safetensors file: `model` without a cut, with these weights.

        model = models.build("resnet20", input_shape=(32, 32, 3), num_classes=10, shortcut="zero_padding")
        weights = models.load_weights("resnet20.safetensors", model)
        client, server = models.split(model, "medium", weights=weights)

    The names, of which a file must have all and no others:

    - vgg19: torchvision's vgg19_bn (`features.0.weight`, `classifier.0.weight`), or timm's, which calls the dense
      layers `pre_logits.fc1`, `pre_logits.fc2` and `head.fc` and stores the first two as convolutions.
    - resnet18, resnet34: torchvision's, which are timm's (`layer2.0.downsample.0.weight`, `fc.weight`).
    - resnet20, resnet32, resnet56, resnet110: those of akamaster/pytorch_resnet_cifar10 (`linear.weight`). Its option A
      is `build(..., shortcut="zero_padding")`; option B has `layer2.0.shortcut.0.weight`.

    - decoder: those of Hugging Face, in a folder with config.json, and model.safetensors or the files that
      model.safetensors.index.json names; see `load_decoder`, which what follows does not hold for: arrays keep their
      dtype.

    All ResNets take `shortcut` for `downsample`, `linear` for `fc`, and the other way round. The prefixes `module.`,
    `_orig_mod.` and `model.` are dropped where all names have them, and `num_batches_tracked` is ignored.

    Convolutions go from (out, in, height, width) to (height, width, in, out) and dense layers from (out, in) to
    (in, out). The inputs of vgg19's first dense layer go from the order (channel, row, column) to (row, column,
    channel). Tensors of float16, bfloat16 and float64 become float32. Running variances are taken as they are, since
    tests use them alike here and in PyTorch. They differ in how training estimates them: PyTorch's is the unbiased
    variance, of which flax's, the biased one, is (n - 1)/n, n being the pixels of a batch; see `running_variance`.

    With `new_head` the last layer is drawn from `seed`, as `whole` draws it, and what the file has of it is passed
    over: for other classes than the network was trained on.

    The file does not say what inputs are normalised by, nor the activation. The plain first block of
    `build(..., first_block="paper")` takes the residual one's weights, but computes something else with them.

    Raises:
      ValueError: the model has no names in PyTorch, the file is not a safetensors file, or its names, shapes or dtypes
        are not those of the model.
      OSError: the file cannot be read.
    """
    if model.name == DECODER:
        if new_head:
            raise ValueError("new_head must be False for a decoder, got True")
        return load_decoder(path, model)
    entries = _entries(model)
    found = _rename(_read(path), model)
    drawn = last_block(model, seed) if new_head else None
    if drawn is not None:
        of_head = _of_head(entries, model)
        entries, found = ({name: tree[name] for name in tree if name not in of_head} for tree in (entries, found))
    _check(found, entries, model, path)
    # Copies: a step may be given an array to write its result in.
    arrays = {tuple(e.path): jnp.array(e.from_torch(found[name]), jnp.float32) for name, e in entries.items()}
    state = unflatten_dict(arrays)
    params = state["params"] if drawn is None else state["params"] | drawn.params
    return ModelPart(Apply(model.blocks), params, state["stats"])


def save_weights(
    path: str | os.PathLike, model: Model, params: PyTree, stats: PyTree, *, beside: str | os.PathLike | None = None
) -> None:
    """Writes a whole model in PyTorch's names and layouts as a safetensors file, atomically.

        client, server = msjax.load_part("client.safetensors"), msjax.load_part("server.safetensors")
        models.save_weights("out.safetensors", model, client.params | server.params, client.stats | server.stats)

    `params` and `stats` are nested dicts of float32 arrays, by block name first: those of the parts merged. The names
    and the models that have some are those of `load_weights`, whose first names these are; it reads the same arrays
    back. PyTorch reads the file with `network.load_state_dict(safetensors.torch.load_file(path))`. Running variances
    are written as they are, biased if they were trained here. A decoder becomes a folder, with the tokenizer of the
    folder `beside`; see `save_decoder`.

    Raises:
      ValueError: the model has no names in PyTorch, or `params` or `stats` are not those of the model.
      OSError: the file cannot be written.
    """
    if model.name == DECODER:
        return save_decoder(path, model, params, stats, beside=beside)
    entries = _entries(model)
    check_state(model, params, stats)
    arrays = {}
    for name, entry in entries.items():
        leaf = {"params": params, "stats": stats}
        for key in entry.path:
            leaf = leaf[key]
        arrays[name] = np.ascontiguousarray(entry.to_torch(np.asarray(leaf, np.float32)))
    path = pathlib.Path(path)
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        # The header that PyTorch's libraries look for.
        temporary.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Entry(NamedTuple):
    """Where a tensor of PyTorch is here, and its layout."""

    path: tuple[str, ...]  # into {"params": ..., "stats": ...}
    shape: tuple[int, ...]  # here
    grid: tuple[int, int] | None = None  # rows and columns of the map that a dense layer sees flattened

    @property
    def torch_shape(self):
        """The shape of the tensor in PyTorch."""
        if len(self.shape) == 4:
            return (*self.shape[:1:-1], *self.shape[:2])
        return self.shape[::-1]

    def from_torch(self, tensor):
        if tensor.ndim == 4:
            return tensor.transpose(2, 3, 1, 0)
        if self.grid:
            tensor = tensor.reshape(len(tensor), -1, *self.grid).transpose(0, 2, 3, 1).reshape(len(tensor), -1)
        return tensor.T

    def to_torch(self, array):
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        tensor = array.T
        if self.grid:
            tensor = tensor.reshape(len(tensor), *self.grid, -1).transpose(0, 3, 1, 2).reshape(len(tensor), -1)
        return tensor


def _entries(model):
    """By PyTorch's name, the entry of each array of the model."""
    if model.name == "vgg19":
        modules, flattened = _vgg_modules(model), "classifier.0.weight"
    elif model.name in RESNETS:
        modules, flattened = _resnet_modules(model), None
    else:
        raise ValueError(f"model must be one that has names in PyTorch, {', '.join(PYTORCH)}, got {model.name!r}")
    grid = tuple(side // 32 for side in model.input_shape[:2])
    shapes = whole_shapes(model)
    leaves = jax.tree.leaves_with_path({"params": shapes.params, "stats": shapes.stats})
    places = {block.name: place for place, block in enumerate(model.blocks)}
    entries = {}
    for keys, leaf in sorted(leaves, key=lambda pair: places[pair[0][1].key]):
        path = tuple(key.key for key in keys)
        name = f"{modules[path[1:-1]]}.{_LEAVES[path[-1]]}"
        entries[name] = _Entry(path, leaf.shape, grid if name == flattened else None)
    return entries


def _of_head(entries, model):
    """The names of the last layer's arrays."""
    return {name for name, entry in entries.items() if entry.path[1] == model.blocks[-1].name}


def _vgg_modules(model):
    """From our modules' paths to torchvision's names, which count activations, pools and dropout too."""
    modules, place = {}, 0
    *convs, dense17, dense18, head = model.blocks
    for block in convs:
        modules[block.name, "conv", "conv"] = f"features.{place}"
        modules[block.name, "conv", "norm"] = f"features.{place + 1}"
        place += 4 if dict(block.options)["pool"] else 3
    for block, at in ((dense17, 0), (dense18, 3), (head, 6)):
        modules[block.name, "dense"] = f"classifier.{at}"
    return modules


def _resnet_modules(model):
    """From our modules' paths to torchvision's names, or for the networks for CIFAR those of akamaster."""
    stem, *blocks, head = model.blocks
    shortcut, dense = ("downsample", "fc") if model.name in ("resnet18", "resnet34") else ("shortcut", "linear")
    modules = {(stem.name, "conv", "conv"): "conv1", (stem.name, "conv", "norm"): "bn1", (head.name, "dense"): dense}
    for block in blocks:
        stage, number = block.name.removeprefix("stage").split("_block")
        layer = f"layer{stage}.{int(number) - 1}"
        for i in (1, 2):
            modules[block.name, f"conv{i}", "conv"] = f"{layer}.conv{i}"
            modules[block.name, f"conv{i}", "norm"] = f"{layer}.bn{i}"
        modules[block.name, "shortcut", "conv"] = f"{layer}.{shortcut}.0"
        modules[block.name, "shortcut", "norm"] = f"{layer}.{shortcut}.1"
    return modules


_VGG_ALIASES = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
_IMAGENET_ALIASES = {"shortcut": "downsample", "linear": "fc"}
_CIFAR_ALIASES = {"downsample": "shortcut", "fc": "linear"}


def _read(path):
    """All tensors of a safetensors file by name."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None


def _rename(tensors: Mapping[str, np.ndarray], model: Model) -> dict[str, Any]:
    """The tensors by the names of `_entries`, without wrappers' prefixes and counters; strangers keep their names."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    while tensors and (prefix := next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), None)):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if model.name == "vgg19":
        aliases = _VGG_ALIASES
    else:
        aliases = _IMAGENET_ALIASES if model.name in ("resnet18", "resnet34") else _CIFAR_ALIASES
    found = {}
    for name, tensor in tensors.items():
        own = f".{name}"
        for theirs, ours in aliases.items():
            own = own.replace(f".{theirs}.", f".{ours}.")
        own = own[1:]
        if own != name and own in tensors:  # both: then one of them is too many, and `_check` says so
            own = name
        if own.startswith("classifier.") and tensor.ndim == 4:
            tensor = tensor.reshape(len(tensor), -1)
        found[own] = tensor
    return found


def _check(found, entries, model, path):
    """Raises ValueError where names, shapes or dtypes are not those of the model."""
    missing = [name for name in entries if name not in found]
    both = [name for name in entries if name in found]
    others = [name for name in both if found[name].shape != entries[name].torch_shape]
    shapes = [f"{name} is {found[name].shape} rather than {entries[name].torch_shape}" for name in others]
    dtypes = [f"{name} is {found[name].dtype}" for name in both if found[name].dtype.name not in _FLOATS]
    kinds = {
        "missing": missing,
        "unexpected": [name for name in found if name not in entries],
        "other shapes": shapes,
        "dtypes that are not floating point": dtypes,
    }
    wrong = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    if not wrong:
        return
    hint = ""
    if missing and all(".shortcut." in name or ".downsample." in name for name in missing):
        hint = '; a network without projections is build(..., shortcut="zero_padding")'
    if others and {*others} <= _of_head(entries, model):
        hint = "; for other classes, new_head (model.new_head) draws the last layer anew"
    first = next(name for name, entry in entries.items() if len(entry.shape) == 4)
    if first in others and (taken := found[first].shape[1:2]) != entries[first].torch_shape[1:2]:
        wanted = entries[first].torch_shape[1]
        hint = f"; it takes images of {taken[0]} channels, and the data's have {wanted} (of a folder, data.channels)"
    raise ValueError(f"{path} must hold the weights of {model.name} in PyTorch's names; {'; '.join(wrong)}{hint}")

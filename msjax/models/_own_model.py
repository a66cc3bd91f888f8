"""A user's model as the parts that are trained: what is taken, and what is said where a part does not fit."""

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

from msjax.checks import quoted
from msjax.keys import make_key
from msjax.models._modules import MODE_NAMES, PLAIN_CALLS, LinenBehindCut, NnxBehindCut, NotAPart, as_part
from msjax.models._part import PARTS, ModelPart, RemoteApply, RemotePart, constants_of

log = logging.getLogger("msjax")


def as_parts(model: Any, inputs: Any, *, cut: int | None = None, seed: int = 0) -> tuple[ModelPart, ...]:
    """Returns the parts of a user's model: client and server, and, U-shaped, tail.

    Args:
      model: two or three parts, each as `as_part` takes it; or, with `cut`, one sequential model: `nnx.Sequential`,
        `linen.Sequential`, or a list of modules and functions.
      inputs: arrays of a batch as the first part takes them, or their shapes and dtypes.
      cut: how many layers of a sequential model the client has.
      seed: of the parameters of Linen modules, which have none of their own yet.

    Raises:
      TypeError: `model` is none of these.
      ValueError: there are not two or three parts, two of them share weights, or `cut` leaves a party without a layer.
    """
    if cut is not None:
        model = cut_sequential(model, cut)
    if isinstance(model, ModelPart) or not isinstance(model, Sequence):
        raise TypeError(
            "model must be a tuple of client and server part (and tail), or a sequential model with `cut`, "
            f"got {type(model).__name__}"
        )
    if len(model) not in (2, 3):
        raise ValueError(f"model must have two parts, client and server, or three with a tail, got {len(model)}")
    _check_not_shared(model)
    parts, x = [], jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    for place, (name, module) in enumerate(zip(("client", "server", "tail"), model, strict=False)):
        key = jax.random.fold_in(make_key(seed), place)
        if isinstance(module, RemotePart):
            batch_size = jax.tree.leaves(x)[0].shape[0]
            leaves, structure = jax.tree.flatten(module.outputs)
            outputs = tuple(jax.ShapeDtypeStruct(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves)
            parts.append(ModelPart(RemoteApply((structure, outputs)), {}, {}))
            batch = [jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype) for leaf in outputs]
            x = jax.tree.unflatten(structure, batch)
            continue
        try:
            part = as_part(module, x, key=key, name=name)
            _check_arrays(name, part)
            x = jax.eval_shape(functools.partial(_outputs, part.apply), part.params, part.stats, x)
        except NotAPart:
            raise
        except Exception as error:
            raise ValueError(_why_it_failed(name, x, error)) from error
        parts.append(part)
    return tuple(_scoped(parts) if len(parts) == 3 else parts)


def _scoped(parts):
    """Client and tail with their arrays under names, as one party keeps them together.

    Where some stay as they are, for which they are looked up by their own names, parts of models that msjax has cut
    keep those: they differ.
    """
    frozen = any(constants_of(part.apply) for part in parts[::2])
    client, server, tail = (
        part
        if name == "server" or isinstance(part.apply, RemoteApply) or (frozen and _is_cut_by_msjax(part.apply))
        else part.scoped(name)
        for name, part in zip(PARTS, parts, strict=True)
    )
    return client, server, tail


def _is_cut_by_msjax(apply):
    return getattr(apply, "draws_by_place", False) or bool(constants_of(apply))


def _why_it_failed(name, x, error):
    """What to say of a part that raised an error for a batch of such inputs."""
    detail = quoted(error)
    if isinstance(error, flax.errors.InvalidRngError):
        return (
            f"{name} must draw random numbers in training alone: give its __call__ the argument train or "
            f"deterministic and pass it on; it raised {detail}"
        )
    lacks = None
    if re.search("argument|paramet", detail, re.I):
        lacks = next((word for word in MODE_NAMES if re.search(rf"\b{word}\b", detail)), None)
    if isinstance(error, flax.errors.ModifyScopeVariableError):
        lacks = "use_running_average"  # of a batch normalisation that always trains
    if lacks is not None:
        return (
            f"{name} must be told whether it trains: give the __call__ of a module the argument "
            f"{' or '.join(dict.fromkeys(['train', lacks]))} and pass it on to its layers; it raised {detail}"
        )
    shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(x))
    return f"{name} must take {shapes}, but raised {detail}"


def _check_not_shared(model):
    """Raises ValueError where two parts share weights: each would train a copy, and they would no longer be equal."""
    owners: dict[int, int] = {}
    for place, module in enumerate(model):
        for where, weights in _weights_of(module):
            if owners.setdefault(id(weights), place) != place:
                raise ValueError(f"model must have weights of its own in each part, got {where} in two of them")
    within = [list(_linen_modules(module)) for module in model]
    ids = [{id(one) for one in modules} for modules in within]
    for place, modules in enumerate(within):  # the outermost that others have, too; it may have no weights
        if shared := next((one for one in modules if any(id(one) in other for other in ids[:place])), None):
            said = (
                "two parts of the model share one %s; if it has weights, they are not shared: each part trains its own"
            )
            log.warning(said, type(shared).__name__)


def _weights_of(module):
    """(Name, object) of what makes two parts share weights if both have it: not vectors, which may be one constant."""
    if isinstance(module, nnx.Module):
        for path, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Param):
                yield repr("/".join(map(str, path))), node
    elif isinstance(module, linen.Module):
        layers = module.layers if isinstance(module, linen.Sequential) else ()
        yield from ((f"one {type(one).__name__}", one) for one in (module, *layers) if isinstance(one, linen.Module))
    elif isinstance(module, tuple) and len(module) > 1:
        for path, leaf in jax.tree_util.tree_leaves_with_path(module[1]):
            if getattr(leaf, "ndim", 0) > 1:
                yield repr(jax.tree_util.keystr(path, simple=True, separator="/")), leaf


def _linen_modules(module):
    """A Linen module and those in its fields; none of what is no such module."""
    if not isinstance(module, linen.Module) or isinstance(module, linen.Dropout):
        return
    yield module
    fields = [getattr(module, field.name, None) for field in dataclasses.fields(module) if field.name != "parent"]
    for one in jax.tree.leaves(fields, is_leaf=lambda leaf: isinstance(leaf, linen.Module)):
        yield from _linen_modules(one)


def _check_arrays(name, part):
    """Raises NotAPart for what a part has beside arrays of numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path((part.params, part.stats)):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
            where = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            got = type(leaf).__name__ if dtype is None else dtype
            raise NotAPart(f"{name} must have arrays of numbers, got {got} at {where!r}")


def _outputs(apply, params, stats, x):
    return apply(params, stats, x, train=False, key=None)[0]


def cut_sequential(model: Any, cut: int) -> tuple[Any, Any]:
    """Returns client and server part of a sequential model, cut behind its first `cut` layers.

    Raises:
      TypeError: the model is no `nnx.Sequential`, `linen.Sequential` or list of layers.
      ValueError: `cut` leaves a party without a layer.
    """
    # What has layers and a `__call__` of its own may do more than to call one after the other.
    sequential = isinstance(model, nnx.Sequential | linen.Sequential) and type(model).__call__ in PLAIN_CALLS
    layers = model if isinstance(model, list | tuple) else model.layers if sequential else None
    if layers is None or not all(callable(layer) for layer in layers):
        raise TypeError(
            "with cut, model must be a list of layers, or an nnx.Sequential or linen.Sequential with the __call__ of "
            f"these, got {type(model).__name__}"
        )
    layers = list(layers)
    if isinstance(cut, bool) or not isinstance(cut, int) or not 1 <= cut < len(layers):
        raise ValueError(f"cut must be in 1..{len(layers) - 1}, the number of layers on the client, got {cut!r}")
    is_linen = isinstance(model, linen.Module) or any(isinstance(layer, linen.Module) for layer in layers)
    if is_linen:
        return linen.Sequential(tuple(layers[:cut])), LinenBehindCut(tuple(layers[cut:]))
    return nnx.Sequential(*layers[:cut]), NnxBehindCut(*layers[cut:])

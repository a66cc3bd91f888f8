"""From a module of Flax NNX or Linen, or a plain function, to a part of a model: a pure function and its arrays."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import unflatten_dict

from msjax.keys import make_key
from msjax.models._part import ModelPart

MODE_NAMES = {
    "train": True,
    "training": True,
    "is_train": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Arguments of `__call__` by which modules are told that they train, and what they are then."""


class NotAPart(TypeError):
    """What was given is no part of a model."""


def as_part(
    module: Any, x: Any = None, *, key: jax.Array | None = None, name: str = "module", x_name: str = "x"
) -> ModelPart:
    """Returns a user's part of a model as a pure function and its arrays.

    Args:
      module: one of

        - an `nnx.Module`, called as `module(x)`: its parameters are its `nnx.Param`s; `module.train()` and
          `module.eval()` are called before, and arguments such as `train` or `deterministic` given if it has them;
        - a `linen.Module`, called as `module(x)` likewise; in training dropout draws from the stream "dropout", and
          what draws from a stream of another name from "params"; with weights that are there already, a pair
          (module, variables) with all its collections, as `module.init` returns them;
        - a pair (apply, params) or triple (apply, params, stats) with `apply(params, stats, x, train, key)`, which
          returns outputs and new stats; without `stats`, `apply(params, x)`, which returns outputs, and is given
          `train`, `key` and the like if it has them;
        - a `ModelPart`, or a `TrainedPart` of `load_part`.

        In a preset of a network's party also a `RemotePart`, for a part that another party has.
      x: arrays of a batch, or their shapes and dtypes; needed for a Linen module, whose parameters follow from them.
      key: of the parameters of a Linen module.
      name, x_name: what errors call `module` and `x`.

    Raises:
      TypeError: `module` is none of these, or has fields that cannot be hashed.
      ValueError: `x` is None for a Linen module, or the variables given with one are not all that it has.
    """
    try:
        return _part(module, x, key, x_name)
    except NotAPart as error:
        raise NotAPart(f"{name} {error}") from None


def _part(module, x, key, x_name):
    if isinstance(module, ModelPart):
        return module._replace(params=_narrow(module.params), stats=_narrow(module.stats))
    if isinstance(module, nnx.Module):
        return _nnx_part(module)
    if isinstance(module, linen.Module):
        return _linen_part(module, x, key, x_name)
    if all(hasattr(module, name) for name in ModelPart._fields):  # a part that was trained
        if module.apply is None:
            raise NotAPart("must be a part with its function, got one that was read without its model")
        if getattr(module, "tail", None) is not None:
            raise NotAPart("must be one part, got a client's with its tail, which has two")
        return ModelPart(module.apply, module.params, module.stats)
    if isinstance(module, tuple) and len(module) in (2, 3) and callable(module[0]):
        function, params, *stats = module
        if isinstance(function, linen.Module):
            return _linen_part(function, x, key, x_name, (params, *stats))
        if getattr(function, "__func__", None) is linen.Module.apply:
            return _linen_part(function.__self__, x, key, x_name, (params, *stats))
        arrays = map(_narrow, (params, stats[0] if stats else {}))
        return ModelPart(FunctionApply(function, bool(stats)), *arrays)
    raise NotAPart(
        "must be an nnx.Module, a linen.Module, a ModelPart, or (apply, params) or (apply, params, stats), "
        f"got {type(module).__name__}"
    )


def _parameters(function):
    """The arguments that a function has by name; none where Python cannot tell."""
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of functions written in C
        return {}


@functools.lru_cache(maxsize=256)
def _mode_arguments(function: Callable) -> tuple[tuple[str, bool], ...]:
    """Which arguments tell a module that it trains, and what each is in training."""
    names = _parameters(function)
    return tuple((name, value) for name, value in MODE_NAMES.items() if name in names)


def _arguments(function, train, key):
    found = {name: value if train else not value for name, value in _mode_arguments(function)}
    if "key" in _parameters(function):
        found["key"] = key
    return found


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FunctionApply:
    """A user's function as a part's."""

    function: Callable
    has_stats: bool

    def __call__(self, params, stats, x, *, train, key=None):
        if self.has_stats:
            found = self.function(params, stats, x, train=train, key=key)
            if not (isinstance(found, tuple) and len(found) == 2):
                raise TypeError(f"apply with stats must return outputs and new stats, got {type(found).__name__}")
            return found
        return self.function(params, x, **_arguments(self.function, train, key)), stats


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NnxApply:
    """An NNX module's call as a part's: the module is put together anew in every call."""

    module: type[nnx.Module]
    graphdef: nnx.GraphDef
    random: tuple[tuple[tuple[Any, ...], bool, tuple[int, ...]], ...]
    """Path, whether it is a key, and shape of each state of a random stream."""

    def __call__(self, params, stats, x, *, train, key=None):
        if train and self.random and key is None:
            raise ValueError("key must be given when train is True, as the module draws random numbers; got None")
        random = self._random_states(make_key(0) if key is None else key)
        # A copy, so that writing the statistics under vjp or vmap touches nothing outside this call; and JAX's arrays,
        # as Flax writes into NumPy's.
        module = nnx.merge(self.graphdef, params, random, jax.tree.map(jnp.asarray, stats), copy=True)
        (module.train if train else module.eval)()
        y = module(x, **_arguments(self.module.__call__, train, key))
        if not train:
            return y, stats
        *_, new_stats = nnx.state(module, nnx.Param, nnx.RngState, nnx.Intermediate, ...)
        return y, nnx.to_pure_dict(new_stats)

    def _random_states(self, key):
        found = {}
        for n, (path, is_key, shape) in enumerate(self.random):
            value = jnp.zeros(shape, jnp.uint32)
            if is_key:
                value = jax.random.fold_in(key, n)
                value = jax.random.split(value, shape) if shape else value
            found[path] = value
        return unflatten_dict(found)


def _spread(call, x):
    """Calls a layer as a Sequential does: with what a layer returned before it, of which tuples are arguments."""
    return call(*x) if isinstance(x, tuple) else call(**x) if isinstance(x, dict) else call(x)


class NnxBehindCut(nnx.Sequential):
    """The layers behind a cut, the first of which is given what crosses it as within an `nnx.Sequential`."""

    def __call__(self, x):
        """Returns what the last layer does."""
        return _spread(super().__call__, x)


class LinenBehindCut(linen.Sequential):
    """The same of a `linen.Sequential`."""

    @linen.compact
    def __call__(self, x):
        """Returns what the last layer does."""
        return _spread(super().__call__, x)


PLAIN_CALLS = (nnx.Sequential.__call__, linen.Sequential.__call__)
_PASS_NOTHING_ON = (*PLAIN_CALLS, NnxBehindCut.__call__, LinenBehindCut.__call__)


def _check_told(module):
    """Raises NotAPart for layers that have to be told that they train, in a Sequential, which passes nothing on.

    Flax's own have None for it, and know by themselves or refuse. Others would act for ever as in a test.
    """
    if type(module).__call__ not in _PASS_NOTHING_ON:
        return
    for layer in module.layers:
        is_module = isinstance(layer, nnx.Module | linen.Module)
        if is_module:
            _check_told(layer)
        given = layer.keywords if isinstance(layer, functools.partial) else {}
        for name, argument in _parameters(type(layer).__call__ if is_module else layer).items():
            if name in MODE_NAMES and name not in given and isinstance(argument.default, bool):
                raise NotAPart(
                    f"must be told whether it trains: a Sequential does not pass {name} on to its "
                    f"{type(layer).__name__}, so give a module whose __call__ has the argument and passes it on"
                )


def _nnx_part(module):
    if jax.tree.leaves(nnx.state(module, nnx.Intermediate)):  # of an earlier call; they are no state
        module = nnx.clone(module)
        nnx.pop(module, nnx.Intermediate)
    _check_told(module)
    graphdef, params, random, stats = nnx.split(module, nnx.Param, nnx.RngState, ...)
    found = []
    for path, variable in nnx.to_flat_state(random):
        value = variable[...] if hasattr(variable, "__getitem__") else variable
        found.append((tuple(path), jnp.issubdtype(value.dtype, jax.dtypes.prng_key), tuple(value.shape)))
    apply = NnxApply(type(module), graphdef, tuple(found))
    try:
        hash(apply)  # raises now rather than in the middle of a trace
    except TypeError as error:
        raise NotAPart(
            f"must have attributes that can be hashed, tuples rather than lists, or nnx.data: "
            f"{type(module).__name__} has not: {error}"
        ) from None
    return ModelPart(apply, *map(_narrow, (nnx.to_pure_dict(params), nnx.to_pure_dict(stats))))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LinenApply:
    """A Linen module's call as a part's; `stats` has its collections but "params"."""

    module: linen.Module

    def __call__(self, params, stats, x, *, train, key=None):
        options = _arguments(type(self.module).__call__, train, key)
        variables = {"params": params, **stats}
        rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)} if train and key is not None else None
        if train and stats:
            y, new_stats = self.module.apply(variables, x, mutable=list(stats), rngs=rngs, **options)
            return y, dict(new_stats)
        return self.module.apply(variables, x, rngs=rngs, **options), stats


def _variables(given):
    """Linen's collections, of one dict of all, or of parameters and a dict of the others."""
    first, *rest = given
    collections = dict(first) if not rest else {"params": first, **rest[0]}
    return {name: _narrow(flax.core.unfreeze(collection)) for name, collection in collections.items()}


def _narrow(tree):
    """NumPy's arrays in the dtypes that JAX makes of them, where they are: on the host."""

    def narrow(leaf):
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        return np.asarray(leaf).astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)

    return jax.tree.map(narrow, tree)


def _linen_part(module, x, key, x_name, given=None):
    if isinstance(module, linen.Sequential):
        module = module.clone(layers=tuple(module.layers))
    _check_told(module)
    try:
        hash(module)
    except TypeError as error:
        raise NotAPart(
            f"must have fields that can be hashed, tuples rather than lists; {type(module).__name__} has not: {error}"
        ) from None
    if x is None:
        raise ValueError(f"{x_name} must be given for a linen.Module, whose parameters follow from it, got None")
    options = _arguments(type(module).__call__, False, None)
    key = make_key(0) if key is None else key

    def init(key, x):
        return module.init({"params": key, "dropout": jax.random.fold_in(key, 1)}, x, **options)

    x = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
    if given is None:
        variables = dict(jax.jit(init)(key, x))
    else:
        expected, variables = jax.eval_shape(init, key, x), _variables(given)
        shapes = [jax.tree.map(jnp.shape, dict(tree)) for tree in (expected, variables)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"variables must be all that {type(module).__name__} has, {shapes[0]}, got {shapes[1]}")
    params = variables.pop("params", {})
    return ModelPart(LinenApply(module), params, variables)

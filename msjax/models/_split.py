"""The cut: from a model to a client part and a server part, each a pure function and its state."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree, Shaped

from msjax.keys import make_key
from msjax.models._layers import ACTIVATIONS
from msjax.models._lora import combine, merge, partition, thaw
from msjax.models._model import Block, Model, graphdef, separated, shapes
from msjax.models._part import PARTS, ModelPart, shapes_of


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Apply:
    """Consecutive blocks of a model as one pure function; hashable and equal by value, so that `jit` need not retrace.

    `first` is the place of `blocks[0]` in the model: random numbers depend on a block's place, not on the cut.
    `activation`, if the cut came before it, is that of the block before, which is applied first.
    """

    blocks: tuple[Block, ...]
    first: int = 0
    activation: str | None = None

    draws_by_place = True

    @property
    def needs_key(self) -> bool:
        """Whether training draws random numbers (dropout)."""
        return any(block.needs_key for block in self.blocks)

    @property
    def constants(self) -> frozenset[str]:
        """The names of those `stats` that never change: of frozen blocks. They are not among the `new_stats`."""
        return frozenset(block.name for block in self.blocks if block.frozen)

    def __call__(
        self,
        params: PyTree,
        stats: PyTree,
        x: Shaped[Array, "n ..."],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "n ..."], PyTree]:
        """`(y, new_stats)`: the blocks' output for a batch and their batch statistics, without those of `constants`.

        With `train`, batch normalisation uses the batch and returns updated statistics, and dropout uses `key`;
        without, it uses `stats` and returns them as they are. Under `vmap` over clients `new_stats` get a leading axis,
        to be averaged by the caller.

        Raises ValueError where `train` needs a key and none is given.
        """
        if train and key is None and self.needs_key:
            names = ", ".join(block.name for block in self.blocks if block.needs_key)
            raise ValueError(f"key must be given when train is True, for the dropout in {names}; got None")
        new_stats = {}
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x)
        for place, block in enumerate(self.blocks, self.first):
            run = functools.partial(_run, block, train)
            states = [tree[block.name] for tree in (params, stats) if block.name in tree]
            table = block_table(block, params, stats)
            block_key = jax.random.fold_in(key, place) if train and block.needs_key else None
            x, found = (jax.checkpoint(run) if block.remat and train else run)(states, x, block_key, table)
            if block.name in stats and not block.frozen:
                new_stats[block.name] = found
        return x, new_stats


def _run(block, train, states, x, key, table):
    """One block's output and its batch statistics."""
    module = merge_module(block, states)
    options = {} if table is None else {"table": table}
    y = module(x, train=train, key=key, **options)
    return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def merge_module(block: Block, states: list[PyTree]) -> nnx.Module:
    """A block's module with its arrays: `states` are its params and, where it has some, its stats."""
    # A copy, so that writing the statistics under vjp or vmap touches nothing outside this call.
    states = [*states[:-1], thaw(states[-1])] if block.frozen else states
    return nnx.merge(graphdef(block), *states, copy=True)


def block_table(block: Block, params: PyTree, stats: PyTree) -> Array | None:
    """The weights of another block that this one has, where it has some."""
    if block.tie is None or block.tie.separate:
        return None
    return thaw(_at(stats, block.tie.other)) if block.frozen else _at(params, block.tie.other)


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


class Cut(NamedTuple):
    """A place to cut: after `layer`, the end of `block`; `shape` and `dtype` are those of one sample's feature map."""

    layer: int
    name: str | None
    block: str
    shape: tuple[int, ...]
    dtype: Any


def split(
    model: Model,
    cut: int | str,
    *,
    tail_cut: int | str | None = None,
    cut_before_activation: bool = False,
    seed: int = 0,
    weights: ModelPart | None = None,
    own: Collection[str] = PARTS,
) -> tuple[ModelPart, ...]:
    """The client part, up to and including layer `cut`, and the server part, with parameters drawn from `seed`.

    `cut` is a layer number, or "shallow", "medium" or "deep". A block's parameters depend on the seed and the block,
    never on the cut, and `server` after `client` computes what `whole` does. With `tail_cut`, of the same kind or
    "last" for the cut before the last block, there is a third part, the tail: what lies behind layer `tail_cut`.

    With `cut_before_activation` the server applies the activation that the client's last block ends with: features are
    then those before it, with both signs. A max-pool behind a monotone activation is still the client's.

    `weights`, the model without a cut as `load_weights` or `whole` gives it, is divided among the parts instead of
    parameters drawn from `seed`.

    Of a model with adapters, `weights` are those of `base(model)`, and the adapters are drawn from `seed`.

    `own` are the parts, of "client", "server" and "tail", whose arrays are made. The others have shapes and dtypes in
    their place, and none of their weights is read.

    Layers that share weights have their own in the parts, which start equal; see `untied`.

    Raises ValueError for a cut that is not a block boundary, naming those that are, a `tail_cut` not behind `cut`, a
    block at the cut that ends with no activation, or `weights` of another model.
    """
    if weights is not None:
        check_state(base(model), weights.params, weights.stats)

    places = cut_places(model, cut, tail_cut)
    model = untied(model)
    client, server, *tail = (
        _part(model, *place, seed, weights) if name in own else _part_shapes(model, *place, weights)
        for name, place in zip(PARTS, itertools.pairwise(places), strict=False)
    )
    if cut_before_activation:
        *blocks, last = client.apply.blocks
        client = client._replace(apply=dataclasses.replace(client.apply, blocks=(*blocks, last.without_activation())))
        activation = dict(last.options)["activation"]
        server = server._replace(apply=dataclasses.replace(server.apply, activation=activation))
    return client, server, *tail


def untied(model: Model) -> Model:
    """The model in which no two layers share weights: the one that the parts of `split` make up together."""
    return dataclasses.replace(model, blocks=tuple(block.untied() for block in model.blocks))


def base(model: Model) -> Model:
    """The model without adapters."""
    return dataclasses.replace(model, blocks=tuple(block.base() for block in model.blocks))


def with_adapters_merged(model: Model, params: PyTree, stats: PyTree) -> PyTree:
    """The `params` of `base(model)`: each adapter added to the weights that it was trained beside.

    `params` and `stats` are those of the whole model, or of parts of it.
    """
    found = {}
    for block in model.blocks:
        if not block.frozen:
            found |= {block.name: params[block.name]} if block.name in params else {}
        elif block.name in stats:
            weights, lora = thaw(stats[block.name]), dict(block.options).get("lora")
            found[block.name] = merge(params[block.name], weights, lora) if block.name in params else weights
    return found


def cut_places(model: Model, cut: int | str, tail_cut: int | str | None = None) -> list[int]:
    """Where the parts that `split` makes begin among the blocks, and where the last one ends; see there."""

    def end(layer):
        return 1 + next(i for i, block in enumerate(model.blocks) if block.layer == layer)

    places = [0, end(resolve_cut(model, cut)), len(model.blocks)]
    if tail_cut is not None:
        layer = model.blocks[-2].layer if tail_cut == "last" else resolve_cut(model, tail_cut, "tail_cut")
        if layer <= resolve_cut(model, cut):
            raise ValueError(f"tail_cut must be behind cut {cut!r}, got {tail_cut!r}")
        places.insert(2, end(layer))
    return places


def whole(model: Model, *, seed: int = 0) -> ModelPart:
    """The model without a cut, with the parameters that `split` draws from the same seed."""
    return _part(model, 0, len(model.blocks), seed)


def resolve_cut(model: Model, cut: int | str, field: str = "cut") -> int:
    """The layer number of a cut given by number or name; raises ValueError, of this field, where there is none."""
    named = dict(model.named_cuts)
    layer = named.get(cut, cut)
    valid = [block.layer for block in model.blocks[:-1]]
    if layer not in valid:
        names = ", ".join(f"{name} = {at}" for name, at in named.items())
        numbers = ", ".join(map(str, valid))
        raise ValueError(f"{field} must be one of {numbers} or {names} for {model.name}, got {cut!r}{model.note}")
    return layer


def list_cuts(model: Model) -> list[Cut]:
    """Every cut with the feature map's shape per sample, found from shapes alone."""
    names = {layer: name for name, layer in model.named_cuts}
    h = jax.ShapeDtypeStruct((1, *model.input_shape), model.input_dtype)
    cuts = []
    for block in model.blocks[:-1]:
        h = jax.eval_shape(lambda x, block=block: block.create(jax.random.key(0))(x, train=False, key=None), h)
        cuts.append(Cut(block.layer, names.get(block.layer), block.name, h.shape[1:], h.dtype))
    return cuts


def count_params(model: Model) -> int:
    """The number of trained parameters, found from shapes alone; batch statistics do not count."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(whole_shapes(model).params))


@functools.cache
def whole_shapes(model: Model) -> ModelPart:
    """`whole` with shapes and dtypes in place of arrays."""
    params, stats = {}, {}
    for block in model.blocks:
        for tree, found in zip((params, stats), shapes(block), strict=True):
            if found:
                tree[block.name] = found
    return ModelPart(Apply(model.blocks), params, stats)


def check_state(model: Model, params: PyTree, stats: PyTree) -> None:
    """Raises ValueError where these are not the arrays of the whole model, by name and shape."""
    whole_model = whole_shapes(model)
    found, expected = (
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in (
            jax.tree.leaves_with_path({"params": params, "stats": stats}),
            jax.tree.leaves_with_path({"params": whole_model.params, "stats": whole_model.stats}),
        )
    )
    if found != expected:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        some = "; ".join(f"{name} is {found.get(name)} rather than {expected.get(name)}" for name in wrong[:3])
        raise ValueError(f"weights must be the arrays of the whole {model.name}, but {some}")


def last_block(model: Model, seed: int) -> ModelPart:
    """The last block alone, with the parameters that `whole` draws for it."""
    return _part(model, len(model.blocks) - 1, len(model.blocks), seed)


def _part(model, start, end, seed, weights=None):
    """Blocks start:end with their initial state, or with that of `weights`."""

    def draw(place):
        return model.blocks[place].create(_key(seed, place))

    params, stats = {}, {}
    for place, block in enumerate(model.blocks[start:end], start):
        if weights is None:
            module = draw(place)
            found = [nnx.to_pure_dict(nnx.state(module, kind)) for kind in (nnx.Param, nnx.BatchStat)]
        else:
            # Copies: the parts' arrays may be given away to a step, the whole's are the caller's.
            trees = (tree.get(block.name, {}) for tree in (weights.params, weights.stats))
            found = [jax.tree.map(jnp.array, tree) for tree in trees]
            if block.frozen:
                drawn = _adapters(dataclasses.replace(block, name="", layer=0), _key(seed, place))
                found[0] = combine(found[0], drawn)
        if block.tie and block.tie.separate:
            name, *path = block.tie.other
            at = [b.name for b in model.blocks].index(name)
            other = nnx.to_pure_dict(nnx.state(draw(at), nnx.Param)) if weights is None else weights.params[name]
            *parents, last = block.tie.own
            tree = found[0]
            for parent in parents:
                tree = tree.setdefault(parent, {})
            tree[last] = jnp.array(_at(other, path)).T
        for tree, state in zip((params, stats), separated(block, *found), strict=True):
            if state:
                tree[block.name] = state
    return ModelPart(Apply(model.blocks[start:end], start), params, stats)


def _part_shapes(model, start, end, weights=None):
    """What `_part` returns, with shapes and dtypes in place of arrays."""
    if weights is None:
        return jax.eval_shape(lambda: _part(model, start, end, 0))
    arrays = shapes_of((weights.params, weights.stats))
    return jax.eval_shape(lambda arrays: _part(model, start, end, 0, ModelPart(None, *arrays)), arrays)


def _key(seed, place):
    """The key of a block's parameters."""
    return jax.random.fold_in(make_key(seed), place)


@functools.partial(jax.jit, static_argnums=0)  # so that the weights beside them are not drawn as well
def _adapters(block, key):
    return partition(nnx.to_pure_dict(nnx.state(block.create(key), nnx.Param)))[0]

"""What a model is: a frozen, hashable list of blocks, without arrays."""

import dataclasses
import functools
import inspect
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from msjax.models._layers import keep_unbiased_variance, make_dirac
from msjax.models._lora import freeze, partition


class Tie(NamedTuple):
    """A layer's weights that are, transposed, an array of another block, such as an output layer's the embedding's.

    `own` is the array's path in the block's own parameters, `other` in those of the whole model. Where the two are
    `separate` it is there, and starts as the other; otherwise the block's module takes the other as `table`.
    """

    own: tuple[str, ...]
    other: tuple[str, ...]
    separate: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """One uncuttable piece of a network, as a description: equal blocks compute the same function.

    `name` is its key in the params and stats dicts. `layer` is the number of the layer it ends with, by which one cuts
    after it. `module(**options, rngs=rngs)` must give an `nnx.Module` that is called as
    `module(x, train=bool, key=key)`, holds only `nnx.Param` and `nnx.BatchStat`, and uses `key` only if it has an
    option `dropout_rate` above 0.
    """

    name: str
    layer: int
    module: type[nnx.Module]
    options: tuple[tuple[str, Hashable], ...] = ()
    dirac: bool = False
    """Whether its 3×3 convolutions start as identities, see `make_dirac`."""
    unbiased: bool = False
    """Whether it keeps the unbiased running variance, see `ConvNorm`."""
    tie: Tie | None = None
    """Weights that it shares with another block; its module then has an option `tied`."""
    remat: bool = False
    """Whether training computes it a second time for the gradient, rather than keep what is in it."""
    frozen: bool = False
    """Whether its adapters alone are trained, if it has some; all other weights are in the stats, see `freeze`."""

    @classmethod
    def of(cls, name: str, layer: int, module: type[nnx.Module], **options: Hashable) -> "Block":
        """The block with these options as keywords."""
        return cls(name, layer, module, tuple(options.items()))

    @property
    def needs_key(self) -> bool:
        """Whether training draws random numbers here."""
        return dict(self.options).get("dropout_rate", 0) > 0

    def without_activation(self) -> "Block":
        """The block without the activation that it ends with.

        Raises ValueError where it ends with none, or with something that does not commute with it.
        """
        options = dict(self.options)
        if "activate" not in inspect.signature(self.module.__init__).parameters:
            raise ValueError(f"cut_before_activation must be at a block that ends with one, got {self.name}")
        commutes = options["activation"] in ("relu", "leaky_relu", "tanh") or not options.get("pool")
        if not commutes or options.get("dropout_rate"):
            raise ValueError(f"cut_before_activation must not be before a pool or dropout, got {self.name}")
        return dataclasses.replace(self, options=(*self.options, ("activate", False)))

    def untied(self) -> "Block":
        """The block with weights of its own where it has another's."""
        if self.tie is None:
            return self
        options = tuple((name, False if name == "tied" else value) for name, value in self.options)
        return dataclasses.replace(self, options=options, tie=self.tie._replace(separate=True))

    def base(self) -> "Block":
        """The block without adapters, all of whose weights are trained."""
        options = tuple((name, value) for name, value in self.options if name != "lora")
        if self.frozen:  # the dropout is that of the adapters
            options = tuple((name, value) for name, value in options if name != "dropout_rate")
        return dataclasses.replace(self, options=options, frozen=False)

    def create(self, key) -> nnx.Module:
        """The module with parameters drawn from `key`."""
        module = self.module(**dict(self.options), rngs=nnx.Rngs(key))
        if self.dirac:
            make_dirac(module)
        if self.unbiased:
            keep_unbiased_variance(module)
        return module


_DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))


def compute_dtype(dtype: Any) -> Any:
    """`dtype` as a numpy dtype, if it is one of the two allowed; raises TypeError otherwise."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in _DTYPES:
        raise TypeError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    return found


def graphdef(block: Block) -> nnx.GraphDef:
    """The module's static description, found once for all blocks that differ in name and place alone."""
    return _found_once(dataclasses.replace(block, name="", layer=0))[0]


def shapes(block: Block) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes and dtypes of the module's parameters and batch statistics, found once likewise."""
    return _found_once(dataclasses.replace(block, name="", layer=0))[1:]


@functools.cache
def _found_once(block):
    made = nnx.eval_shape(lambda: block.create(jax.random.key(0)))
    states = [nnx.to_pure_dict(nnx.state(made, kind)) for kind in (nnx.Param, nnx.BatchStat)]
    return nnx.graphdef(made), *jax.eval_shape(functools.partial(separated, block), *states)


def separated(block: Block, params: dict[str, Any], stats: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a block trains, and what it does not: where it is frozen, all of `params` but the adapters."""
    if not block.frozen:
        return params, stats
    adapters, others = partition(params)
    return adapters, freeze(others, dict(block.options)["dtype"])


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as blocks in the order of computation, from (n, *input_shape) to float32 logits (n, num_classes).

    `named_cuts` are pairs of name and layer number; `note` is added to the message for a number that is no boundary.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    dtype: Any
    blocks: tuple[Block, ...]
    named_cuts: tuple[tuple[str, int], ...]
    note: str = ""
    takes_tokens: bool = False
    """Whether the inputs are int32 tokens, not numbers of `dtype`."""

    @property
    def input_dtype(self) -> Any:
        return jnp.dtype("int32") if self.takes_tokens else self.dtype

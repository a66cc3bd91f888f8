"""Keys and values that a decoder's blocks keep of the tokens so far, so that the next one costs the work of one.

    cache = models.make_cache(part, batch_size=1, capacity=128)
    y, cache = models.extend_cached(part, tokens, cache, lengths, fresh=True)     # the prompts
    y, cache = models.extend_cached(part, token, cache, ones)                      # one token more, as often as wanted

Texts of different lengths are padded behind their ends. Token i of a text is at position i whatever the others are, a
token attends to its own and earlier positions alone, and what is put behind a text's end takes the place of what it was
padded with before anything attends to it: so a text's numbers are those that it has by itself.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, PyTree, Shaped

from msjax.models._decoder import DecoderBlock, Embedding, LanguageHead, causal_attention
from msjax.models._decoder_config import DecoderConfig
from msjax.models._model import Block
from msjax.models._part import ModelPart
from msjax.models._split import Apply, block_table, merge_module


class Cache(NamedTuple):
    """What a part keeps of its texts' tokens; of fixed size, a pytree.

    Attributes:
      keys, values: of each block by its name, (n, capacity, num_key_value_heads, head_dim) in the blocks' dtype.
      lengths: int32 (n,), how many tokens each text has.
    """

    keys: dict[str, Array]
    values: dict[str, Array]
    lengths: Int32[Array, " n"]


def decoder_blocks(part: ModelPart) -> tuple[Block, ...]:
    """The blocks of a decoder, or of a part of one.

    Raises:
      ValueError: the part is not of a decoder.
    """
    blocks = getattr(part.apply, "blocks", ())
    if not blocks or any(block.module not in (Embedding, DecoderBlock, LanguageHead) for block in blocks):
        raise ValueError(
            "part must be of a decoder, as models.split, models.whole or, of a trained run, msjax.pair.model_parts "
            "makes it, got another one"
        )
    return blocks


def part_config(part: ModelPart) -> DecoderConfig:
    """What the decoder is that a part is of."""
    return dict(decoder_blocks(part)[0].options)["config"]


def attends(part: ModelPart) -> bool:
    """Whether a part has blocks with attention, which need all tokens of a text and not the last alone."""
    return any(block.module is DecoderBlock for block in decoder_blocks(part))


def cache_shapes(part: ModelPart, batch_size: int, capacity: int) -> Cache:
    """`make_cache` with shapes and dtypes in place of arrays."""
    config = part_config(part)
    shape = (batch_size, capacity, config.num_key_value_heads, config.head_dim)
    found = {
        block.name: jax.ShapeDtypeStruct(shape, dict(block.options)["dtype"])
        for block in decoder_blocks(part)
        if block.module is DecoderBlock
    }
    return Cache(found, dict(found), jax.ShapeDtypeStruct((batch_size,), jnp.int32))


def cache_bytes(part: ModelPart, batch_size: int, capacity: int) -> int:
    """Bytes of such a cache, from shapes alone."""
    leaves = jax.tree.leaves(cache_shapes(part, batch_size, capacity))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def make_cache(part: ModelPart, batch_size: int, capacity: int) -> Cache:
    """An empty cache for so many texts of at most `capacity` tokens.

    Raises:
      ValueError: the part is not of a decoder.
    """
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache_shapes(part, batch_size, capacity))


def extend_cached(
    part: ModelPart,
    x: Shaped[Array, "n length ..."],
    cache: Cache,
    lengths: Int32[Array, " n"],
    *,
    fresh: bool = False,
    last: bool = True,
) -> tuple[Shaped[Array, "n ..."], Cache]:
    """What a part computes of the next tokens of its texts, and the cache with these in it; compiled.

    One program is compiled for each length of `x` and capacity of the cache. The cache that is given is used up: its
    memory becomes that of the new one.

    Args:
      x: int32 tokens (n, length), or features (n, length, c) of them; behind each text's `lengths` anything.
      lengths: how many of these are of each text, 1..length. With those before them they must fit the capacity, which
        is not checked: what does not is dropped.
      fresh: whether the cache is empty. Tokens attend to each other alone then, which is cheaper.
      last: whether to return what belongs to each text's last token alone, (n, 1, …), in place of all (n, length, …).
        What comes behind the part's last attention is then computed of these tokens alone.

    Raises:
      ValueError: the part is not of a decoder, or `x` is longer than the capacity.
    """
    decoder_blocks(part)
    return _extend(part.apply, part.params, part.stats, x, cache, lengths, fresh, last)


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=4)
def _extend(apply, params, stats, x, cache, lengths, fresh, last):
    length, rows = x.shape[1], jnp.arange(x.shape[0])
    capacity = min((leaf.shape[1] for leaf in cache.keys.values()), default=length)
    if length > capacity:
        raise ValueError(f"x must have at most {capacity} tokens, as the cache has room for, got {length}")
    steps = jnp.arange(length, dtype=jnp.int32)
    positions = steps if fresh else cache.lengths[:, None] + steps
    keys, values = dict(cache.keys), dict(cache.values)
    final = max((i for i, block in enumerate(apply.blocks) if block.module is DecoderBlock), default=-1)
    for i, block in enumerate(apply.blocks):
        if last and i == final + 1:
            x = _last(x, lengths, rows)
        module = _module(apply, block, params, stats)
        if block.module is DecoderBlock:
            kept = keys[block.name], values[block.name]
            x, keys[block.name], values[block.name] = _run_block(module, x, positions, *kept, fresh)
        else:
            table = block_table(block, params, stats)
            x = module(x, train=False, **({} if table is None else {"table": table}))
    if last and final == len(apply.blocks) - 1:
        x = _last(x, lengths, rows)
    return x, Cache(keys, values, cache.lengths + lengths)


def _last(x, lengths, rows):
    return x[rows, lengths - 1][:, None]


def _module(apply: Apply, block: Block, params: PyTree, stats: PyTree) -> Any:
    return merge_module(block, [tree[block.name] for tree in (params, stats) if block.name in tree])


def _run_block(block, x, positions, keys, values, fresh):
    """A decoder's block as in training, whose attention also sees what is kept."""
    attention, rows = block.self_attn, jnp.arange(x.shape[0])[:, None]
    q, k, v = attention.queries_keys_values(block.input_layernorm(x), positions, (None, None, None))
    keys, values = (kept.at[rows, positions].set(new, mode="drop") for kept, new in ((keys, k), (values, v)))
    if fresh:
        h = causal_attention(q, k, v)
    else:
        seen = jnp.arange(keys.shape[1]) <= positions[:, None, :, None]
        h = jax.nn.dot_product_attention(q, keys, values, mask=seen)
    x = x + attention.o_proj(h.reshape(*x.shape[:2], -1))
    return x + block.mlp(block.post_attention_layernorm(x)), keys, values

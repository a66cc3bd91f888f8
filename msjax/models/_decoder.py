"""Decoders: Llama 2 and 3, Qwen 2.5 and 3 (arXiv 2307.09288, 2407.21783, 2412.15115, 2505.09388)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from msjax.checks import is_integer
from msjax.models._decoder_config import DecoderConfig
from msjax.models._layers import embedded
from msjax.models._lora import LoRA, Projection
from msjax.models._model import Block, Model, Tie, compute_dtype
from msjax.models._rope import frequencies, rotate

DECODER = "decoder"
"""The name of all models of this file."""
_INIT = nnx.initializers.normal(0.02)


class RMSNorm(nnx.Module):
    """Divides by the root mean square of the last axis, in float32, and scales: (…, c) -> (…, c) of `dtype`."""

    def __init__(self, features, *, epsilon, dtype):
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))

    def __call__(self, x):
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.epsilon)
        return (h * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class Attention(nnx.Module):
    """Causal self-attention in which groups of heads share keys and values: (n, length, c) -> (n, length, c).

    Positions are rotations of queries and keys; the softmax is computed in float32. Grouped queries: arXiv 2305.13245.
    """

    def __init__(self, config, *, lora, dtype, rngs):
        heads, shared, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = dim
        self.frequencies = tuple(frequencies(dim, config.rope_theta, config.rope_scaling).tolist())
        layer = functools.partial(_projection, lora, dtype=dtype, rngs=rngs)
        self.q_proj = layer("q_proj", config.hidden_size, heads * dim, use_bias=config.qkv_bias)
        self.k_proj = layer("k_proj", config.hidden_size, shared * dim, use_bias=config.qkv_bias)
        self.v_proj = layer("v_proj", config.hidden_size, shared * dim, use_bias=config.qkv_bias)
        self.o_proj = layer("o_proj", heads * dim, config.hidden_size, use_bias=config.output_bias)
        norms = [RMSNorm(dim, epsilon=config.rms_norm_eps, dtype=dtype) if config.qk_norm else None for _ in range(2)]
        self.q_norm, self.k_norm = norms

    def __call__(self, x, key=None):
        keys = _split(key, 4)
        q, k, v = self.queries_keys_values(x, jnp.arange(x.shape[1]), keys[:3])
        h = causal_attention(q, k, v)
        return self.o_proj(h.reshape(*x.shape[:2], -1), keys[3])

    def queries_keys_values(self, x, positions, keys):
        """(n, length, heads, d) each, of tokens at these positions, (length,) or (n, length)."""
        layers = zip((self.q_proj, self.k_proj, self.v_proj), keys, strict=True)
        q, k, v = (layer(x, key).reshape(*x.shape[:2], -1, self.head_dim) for layer, key in layers)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turns = jnp.asarray(self.frequencies, jnp.float32)
        return rotate(q, positions, turns), rotate(k, positions, turns), v


def causal_attention(q, k, v):
    """(n, length, heads, d), and keys and values of as many heads or fewer, -> (n, length, heads, d).

    Queries go in at most eight blocks, each with the keys up to its end. Of long texts that leaves out nearly half of
    what one call would compute and mask, and the scores of a block stay in a CPU's cache.
    """
    length = q.shape[1]
    size = max(32, -(-length // 8))
    found = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        mask = jnp.arange(stop) <= jnp.arange(start, stop)[:, None]
        found.append(jax.nn.dot_product_attention(q[:, start:stop], k[:, :stop], v[:, :stop], mask=mask[None, None]))
    return jnp.concatenate(found, axis=1)


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202): a dense layer gated by the SiLU of another, and one back."""

    def __init__(self, config, *, lora, dtype, rngs):
        layer = functools.partial(_projection, lora, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = layer("gate_proj", config.hidden_size, config.intermediate_size)
        self.up_proj = layer("up_proj", config.hidden_size, config.intermediate_size)
        self.down_proj = layer("down_proj", config.intermediate_size, config.hidden_size)

    def __call__(self, x, key=None):
        keys = _split(key, 3)
        return self.down_proj(jax.nn.silu(self.gate_proj(x, keys[0])) * self.up_proj(x, keys[1]), keys[2])


def _projection(lora, name, in_features, out_features, **options):
    """A dense layer, with an adapter where it is one of `lora`'s targets."""
    adapter = lora if lora is not None and name in lora.targets else None
    return Projection(in_features, out_features, lora=adapter, **options)


def _split(key, count):
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


class Embedding(nnx.Module):
    """From tokens to features: int32 (n, length) -> (n, length, c)."""

    def __init__(self, config, *, dtype, rngs):
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=_INIT, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, *, train, key=None):
        return embedded(self.embed_tokens, x)


class DecoderBlock(nnx.Module):
    """Attention, then the feed-forward network: each behind a normalisation, beside a skip connection."""

    def __init__(self, config, *, lora=None, dropout_rate=0.0, dtype, rngs):
        norm = {"epsilon": config.rms_norm_eps, "dtype": dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = Attention(config, lora=lora, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mlp = FeedForward(config, lora=lora, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        keys = _split(key, 2)
        x = x + self.self_attn(self.input_layernorm(x), keys[0])
        return x + self.mlp(self.post_attention_layernorm(x), keys[1])


class LanguageHead(nnx.Module):
    """Normalisation and the output layer: (n, length, c) -> float32 logits (n, length, vocabulary).

    Where the output layer is tied to the embedding, it has no weights of its own and takes the embedding's, `table`
    (vocabulary, c).
    """

    def __init__(self, config, *, tied, dtype, rngs):
        self.dtype = dtype
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        options = {"use_bias": False, "kernel_init": _INIT, "rngs": rngs}
        self.lm_head = None if tied else nnx.Linear(config.hidden_size, config.vocab_size, **options)

    def __call__(self, x, *, train, key=None, table=None):
        kernel = table.T if self.lm_head is None else self.lm_head.kernel[...]
        return jnp.matmul(self.norm(x), kernel.astype(self.dtype), preferred_element_type=jnp.float32)


def decoder(
    config: DecoderConfig, *, length: int, dtype=jnp.float32, remat: bool = False, lora: LoRA | None = None
) -> Model:
    """The decoder that `config` describes, for texts of `length` tokens, as a description without arrays.

    Inputs are int32 tokens (n, length), outputs float32 logits (n, length, vocab_size) of each next token. Layer 0 is
    the embedding, layers 1 to `num_hidden_layers` the blocks: behind cut k the client has the embedding and k blocks.
    The last layer, normalisation and output layer, is behind the tail cut "last". What is cut is the skip connections'
    sum, (n, length, hidden_size), of both signs.

    No mask crosses the cut: attention looks back only, so blocks of text that are packed full need none, and what a
    text is padded with at its end changes nothing in front of it (give its labels the number that `tasks.next_token`
    ignores).

    Where the output layer is tied to the embedding, a cut separates the two. `split` then makes it a layer of its own,
    which starts with the embedding's weights, and each party trains its own, also in U-shaped runs: the gradient of the
    one would otherwise have to cross the network with every step. `whole` keeps them tied.

    Args:
      dtype: of what is computed and cut, float32 or bfloat16; normalisations, rotations and the softmax are computed in
        float32, and parameters are float32 unless weights of another dtype are put in.
      remat: whether a training step computes each block a second time rather than keep what is in it for the gradient.
      lora: adapters of the blocks. They alone are trained then, float32: a part's `params` are its adapters, and all
        other weights, in `dtype`, are in its `stats`, as bits; see `freeze` for why. `weights` for `split` are those of
        `base(model)`, the model without adapters, as they are read from a folder; `with_adapters_merged` gives such
        again.

    Raises:
      TypeError: `dtype` is neither.
      ValueError: `length` is not in 1..max_position_embeddings.
    """
    if not is_integer(length) or not 1 <= length <= config.max_position_embeddings:
        raise ValueError(
            f"length must be in 1..{config.max_position_embeddings} (max_position_embeddings), got {length!r}"
        )
    options = {"config": config, "dtype": compute_dtype(dtype)}
    count = config.num_hidden_layers
    blocks = [Block.of("embedding", 0, Embedding, **options)]
    adapters = {} if lora is None else {"lora": lora, "dropout_rate": lora.dropout}
    blocks += [Block.of(f"decoder{i}", i, DecoderBlock, **options, **adapters) for i in range(1, count + 1)]
    head = Block.of("head", count + 1, LanguageHead, tied=config.tie_word_embeddings, **options)
    if config.tie_word_embeddings:
        head = dataclasses.replace(head, tie=Tie(("lm_head", "kernel"), ("embedding", "embed_tokens", "embedding")))
    blocks = [dataclasses.replace(block, remat=remat, frozen=lora is not None) for block in (*blocks, head)]
    named_cuts = tuple((name, count * quarters // 4) for name, quarters in (("shallow", 1), ("medium", 2), ("deep", 3)))
    return Model(DECODER, (length,), config.vocab_size, options["dtype"], tuple(blocks), named_cuts, takes_tokens=True)

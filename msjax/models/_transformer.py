"""A small transformer encoder that classifies texts (Vaswani et al., arXiv 1706.03762, with arXiv 2002.04745)."""

import jax
import jax.numpy as jnp
from flax import nnx

from msjax.models._layers import ACTIVATIONS, Head, embedded
from msjax.models._model import Block

_INIT = nnx.initializers.normal(0.02)  # BERT's (arXiv 1810.04805)


class Embedding(nnx.Module):
    """Token and position embeddings, and dropout: int32 (n, length) -> (n, length, features)."""

    def __init__(self, vocabulary, length, features, *, dropout_rate, dtype, rngs):
        self.tokens = nnx.Embed(vocabulary, features, embedding_init=_INIT, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(_INIT(rngs.params(), (length, features), jnp.float32))
        self.dropout = nnx.Dropout(dropout_rate)
        self.dtype = dtype

    def __call__(self, x, *, train, key=None):
        h = embedded(self.tokens, x) + self.positions[...].astype(self.dtype)
        return self.dropout(h, deterministic=not train, rngs=key)


class EncoderBlock(nnx.Module):
    """Self-attention, then two dense layers: each behind layer normalisation, before dropout, beside a skip."""

    def __init__(self, features, *, heads, dropout_rate, activation, dtype, rngs):
        options = {"dtype": dtype, "kernel_init": _INIT, "rngs": rngs}
        self.activation = activation
        self.norm1 = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, **options)
        self.norm2 = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.dense1 = nnx.Linear(features, 4 * features, **options)
        self.dense2 = nnx.Linear(4 * features, features, **options)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(self, x, *, train, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        x = x + self.dropout(self.attention(self.norm1(x)), deterministic=not train, rngs=keys[0])
        h = self.dense2(ACTIVATIONS[self.activation](self.dense1(self.norm2(x))))
        return x + self.dropout(h, deterministic=not train, rngs=keys[1])


class TokenHead(nnx.Module):
    """Layer normalisation, the mean over the tokens, and a dense layer: (n, length, c) -> float32 (n, classes)."""

    def __init__(self, in_features, num_classes, *, dtype, rngs):
        self.norm = nnx.LayerNorm(in_features, dtype=dtype, rngs=rngs)
        self.head = Head(in_features, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        return self.head(self.norm(x).mean(1), train=train)


def transformer(input_shape, num_classes, *, scale, vocabulary, activation, dtype):
    """Embedding and position (layer 1), four blocks of 128 features (2 to 5), and the mean over tokens.

    Dropout is 0.2 behind the embedding, 0.1 in the blocks.
    The skip connections' sum is cut, so features have both signs and no normalisation. Padding is a token like others,
    which the network learns to look past, since a server behind a codec cannot tell it apart.
    """
    (length,) = input_shape
    features = max(1, scale(128) // 4) * 4  # for four heads
    shape = {"vocabulary": vocabulary, "length": length, "features": features}
    blocks = [Block.of("embedding", 1, Embedding, **shape, dropout_rate=0.2, dtype=dtype)]
    options = {"features": features, "heads": 4, "dropout_rate": 0.1, "activation": activation, "dtype": dtype}
    blocks += [Block.of(f"encoder{layer}", layer, EncoderBlock, **options) for layer in (2, 3, 4, 5)]
    blocks.append(Block.of("head", 6, TokenHead, in_features=features, num_classes=num_classes, dtype=dtype))
    return tuple(blocks), (("shallow", 2), ("medium", 3), ("deep", 4)), ""

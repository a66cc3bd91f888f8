"""The layers all models share: convolutions and dense layers in the compute dtype, batch normalisation in float32."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx

from msjax.models._conv import conv_general_dilated

ACTIVATIONS = MappingProxyType(
    {
        "relu": jax.nn.relu,
        "leaky_relu": jax.nn.leaky_relu,  # slope 0.01
        "gelu": jax.nn.gelu,  # the tanh approximation
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)


def activation(name):
    """One of `ACTIVATIONS`, or "identity" where the cut comes before it."""
    return (lambda x: x) if name == "identity" else ACTIVATIONS[name]


# torchvision's initialisation. The paper's program keeps PyTorch's default, whose variance is 6 times smaller where
# in = out; behind batch normalisation the scale does not change the forward pass, only the first steps' effective rate.
_CONV_INIT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch: U(±1/√fan_in)


def max_pool(x, window, padding=0):
    """Maximum over `window`×`window` in steps of 2, of (n, h, w, c); an incomplete last window is dropped.

    Slices rather than `reduce_window`, whose gradient (select-and-scatter) took 139 ms where this takes 9 ms on a CPU
    ((250, 32, 32, 16), window 2). Where values tie, the gradient is shared; after a ReLU it then meets a zero slope.
    """
    for axis in (1, 2):
        if padding:
            pads = [(padding, padding, 0) if a == axis else (0, 0, 0) for a in range(4)]
            x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), pads)
        last = x.shape[axis] - window + 1
        slices = [jax.lax.slice_in_dim(x, i, last + i, 2, axis) for i in range(window)]
        x = slices[0]
        for other in slices[1:]:
            x = jnp.maximum(x, other)
    return x


class ConvNorm(nnx.Module):
    """Convolution, max-pool where `pool` is 2 or 3, batch normalisation: (n, h, w, c) -> (n, h', w', f), in `dtype`.

    As in PyTorch: padding kernel // 2 on every side, also where stride is 2; momentum 0.1, eps 1e-5. The running
    variance is flax's, biased; after `keep_unbiased_variance` it is PyTorch's, of which each batch's share is n/(n - 1)
    times as much, n being the pixels of one client's batch.
    """

    def __init__(self, in_features, features, *, kernel=3, stride=1, use_bias=False, pool=0, dtype, rngs):
        self.dtype, self.pool, self.unbiased = dtype, pool, False
        self.conv = nnx.Conv(
            in_features,
            features,
            (kernel, kernel),
            stride,
            padding=kernel // 2,
            use_bias=use_bias,
            dtype=dtype,
            kernel_init=_CONV_INIT,
            conv_general_dilated=conv_general_dilated,
            rngs=rngs,
        )
        # float32 whatever the compute dtype: bfloat16 running statistics would stop moving.
        self.norm = nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x, *, train):
        h = self.conv(x)
        h = max_pool(h, self.pool, padding=(self.pool - 1) // 2) if self.pool else h
        before = self.norm.var[...]
        out = self.norm(h, use_running_average=not train).astype(self.dtype)
        if train and self.unbiased:
            after, n = self.norm.var[...], h.size // h.shape[-1]
            self.norm.var[...] = after + (after - self.norm.momentum * before) / max(n - 1, 1)
        return out


class ConvBlock(nnx.Module):
    """Convolution, batch normalisation, activation and, where `pool` is 2 or 3, max-pool in steps of 2."""

    def __init__(
        self, in_features, features, *, kernel=3, stride=1, use_bias, pool=0, activation, activate=True, dtype, rngs
    ):
        self.activation, self.pool = activation if activate else "identity", pool
        self.conv = ConvNorm(
            in_features, features, kernel=kernel, stride=stride, use_bias=use_bias, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, *, train, key=None):
        h = activation(self.activation)(self.conv(x, train=train))
        return max_pool(h, self.pool, padding=(self.pool - 1) // 2) if self.pool else h


def make_dirac(module):
    """Lets the first min(in, out) outputs of each 3×3 convolution start as those inputs; the others keep their draw.

    Source: Zagoruyko and Komodakis, arXiv 1706.00388, which keeps the identity beside the weights; as the weights'
    initial value alone: Jordan, arXiv 2404.00498.
    """
    for _, conv in nnx.iter_graph(module):
        if isinstance(conv, nnx.Conv) and conv.kernel_size == (3, 3):
            kernel = conv.kernel[...]
            n = jnp.arange(min(kernel.shape[2:]))
            conv.kernel[...] = kernel.at[..., n].set(0).at[1, 1, n, n].set(1)


def keep_unbiased_variance(module):
    """Lets batch normalisation keep the running variance as PyTorch does."""
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, ConvNorm):
            layer.unbiased = True


def embedded(embedding, tokens):
    """Features of integer tokens (n, length); NaN of what is no token, also of negative ones, which JAX counts back."""
    return embedding(jnp.where(tokens < 0, embedding.num_embeddings, tokens))


class DenseBlock(nnx.Module):
    """Flatten, dense layer, activation, dropout: (n, ...) -> (n, features)."""

    def __init__(self, in_features, features, *, dropout_rate=0.0, activation, activate=True, dtype, rngs):
        self.activation = activation if activate else "identity"
        self.dense = nnx.Linear(in_features, features, dtype=dtype, kernel_init=_DENSE_INIT, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(self, x, *, train, key=None):
        h = activation(self.activation)(self.dense(x.reshape(x.shape[0], -1)))
        return self.dropout(h, deterministic=not train, rngs=key)


class Head(nnx.Module):
    """Mean or maximum over the pixels, if any are left, and a dense layer: (n, [h, w,] c) -> float32 (n, classes).

    The logits are multiplied by `scale`.
    """

    def __init__(self, in_features, num_classes, *, pool="mean", scale=1.0, dtype, rngs):
        self.pool, self.scale = pool, scale
        self.dense = nnx.Linear(in_features, num_classes, dtype=dtype, kernel_init=_DENSE_INIT, rngs=rngs)

    def __call__(self, x, *, train, key=None):
        if x.ndim == 4:
            x = x.mean((1, 2)) if self.pool == "mean" else x.max((1, 2))
        return self.dense(x).astype(jnp.float32) * self.scale

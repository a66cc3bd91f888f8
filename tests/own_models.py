"""Models of a user's own, as a stranger writes them: no class of msjax in them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from msjax import data


class Encoder(nnx.Module):
    """Half of a small U-Net: features for the server, a skip connection, and a mask of the pixels that are dark."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        skip = jax.nn.relu(self.norm(self.conv1(x)))
        h = self.dropout(jax.nn.relu(self.conv2(skip)))
        return {"h": h, "skips": [skip], "dark": x[..., 0] < 0}


class Decoder(nnx.Module):
    """The other half: logits of two classes for each pixel."""

    def __init__(self, rngs):
        self.up = nnx.ConvTranspose(6, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.out = nnx.Conv(8, 2, (3, 3), rngs=rngs)

    def __call__(self, features):
        x = jnp.concatenate([jax.nn.relu(self.up(features["h"])), features["skips"][0]], axis=-1)
        return self.out(jnp.where(features["dark"][..., None], 0.0, x))


class LinenBody(linen.Module):
    """A part with batch normalisation and dropout, told by an argument that it trains."""

    features: int

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Dense(self.features, use_bias=False)(x)))
        return linen.Dropout(0.1, deterministic=not train)(x)


class LinenHead(linen.Module):
    """One number a sample."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(x)


def affine(params, x):
    """A part as a plain function."""
    return x @ params["w"] + params["b"]


def counting(params, stats, x, train, key):
    """A part as a plain function with statistics, one of them an integer."""
    if train:
        stats = {"steps": stats["steps"] + 1, "mean": 0.9 * stats["mean"] + 0.1 * x.mean()}
    return affine(params, x - stats["mean"]), stats


def squares(n, seed=0):
    """Images with a bright square, and the mask of its pixels."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0, 0.3, (n, 8, 8, 1)).astype(np.float32), np.zeros((n, 8, 8), np.int32)
    for image, mask in zip(x, y, strict=True):
        r, c = rng.integers(0, 5, 2)
        image[r : r + 3, c : c + 3] += 1
        mask[r : r + 3, c : c + 3] = 1
    return x, y


def numbers(n, seed=0):
    """A table of four columns, and a number that follows from them."""
    x = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    return x, (x[:, 0] - 2 * x[:, 1]).astype(np.float32)


def as_set(make, n=40, test=16):
    """A data set of these."""
    train, test = make(n), make(test, seed=1)
    return data.Dataset(make.__name__, data.Arrays(*train), data.Arrays(*test), None, None, None)


@dataclasses.dataclass(frozen=True)
class Dense:
    """Initial arrays of `affine`."""

    inputs: int
    outputs: int

    def __call__(self, seed=0):
        rng = np.random.default_rng(seed)
        w = rng.normal(0, self.inputs**-0.5, (self.inputs, self.outputs)).astype(np.float32)
        return {"w": jnp.asarray(w), "b": jnp.zeros(self.outputs)}

"""A U-Net cut in two: its skip connections cross the cut, each by a codec of its own.

    python examples/unet_segmentation.py       # images with bright discs, made here; about a minute

The client returns a dict of arrays. What it names "skip" keeps 5 % of its values; the rest goes by MS.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import msjax


class Encoder(nnx.Module):
    """The way down, at the client: features, and a skip connection of twice their size."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, rngs=rngs)

    def __call__(self, x):
        skip = jax.nn.relu(self.norm1(self.conv1(x)))
        return {"h": jax.nn.relu(self.norm2(self.conv2(skip))), "skip": skip}


class Decoder(nnx.Module):
    """The way up, at the server: a class for each pixel."""

    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(32, 16, (2, 2), strides=(2, 2), rngs=rngs)
        self.out = nnx.Conv(32, classes, (3, 3), rngs=rngs)

    def __call__(self, features):
        up = jax.nn.relu(self.up(jax.nn.relu(self.conv(features["h"]))))
        return self.out(jnp.concatenate([up, features["skip"]], axis=-1))


def discs(count, seed, size=32):
    """Noisy images with a bright disc in each, and the mask of its pixels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    center, radius = rng.uniform(8, size - 8, (2, count, 1, 1)), rng.uniform(3, 8, (count, 1, 1))
    masks = (rows - center[0]) ** 2 + (columns - center[1]) ** 2 < radius**2
    images = masks + rng.normal(0, 0.7, masks.shape)
    return images[..., None].astype(np.float32), masks.astype(np.int32)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args(arguments)
    result = msjax.train(
        (Encoder(nnx.Rngs(0)), Decoder(2, nnx.Rngs(1))),
        msjax.data.from_arrays(discs(options.images, 0), discs(100, 1)),
        task=msjax.tasks.segmentation(num_classes=2),
        codec={"skip": msjax.compress.TopK(0.95), "": msjax.compress.MaskEncoded()},
        clients=4,
        batch_size=10,
        epochs=options.epochs,
        optimizer=optax.adam(3e-3),
    )
    print(f"mean IoU on test images: {result.test['mean_iou_percent']:.1f} %")
    print(f"{result.traffic.uplink_feature_bytes / 1e6:.2f} MB of features sent")
    return result


if __name__ == "__main__":
    main()

"""A CNN of your own on images of your own, from an .npz file: two NNX modules and one call.

    python examples/cnn_npz.py                 # 8×8 digits, written to an .npz first; a minute
    python examples/cnn_npz.py my_images.npz   # with the arrays x_train, y_train, x_test, y_test

Ten simulated clients train the network through the cut, with MS at the cut and without, and the bytes are counted.
"""

import argparse
import pathlib
import tempfile

import jax
import numpy as np
import optax
from flax import nnx

import msjax


class Client(nnx.Module):
    """The first layers: what each client has."""

    def __init__(self, channels, rngs):
        self.conv1 = nnx.Conv(channels, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.conv2(jax.nn.relu(self.norm(self.conv1(x)))))


class Server(nnx.Module):
    """The rest of the network."""

    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.out = nnx.Linear(32, classes, rngs=rngs)

    def __call__(self, h):
        return self.out(jax.nn.relu(self.conv(h)).mean((1, 2)))


def write_digits(path):
    """The digits that come with msjax as an .npz file, for those who have none."""
    digits = msjax.data.load("digits")
    train, test = (
        {f"x_{split}": inputs, f"y_{split}": labels}
        for split, inputs, labels in (
            ("train", digits.train_inputs, digits.train_labels),
            ("test", digits.test_inputs, digits.test_labels),
        )
    )
    np.savez(path, **train, **test)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", nargs="?", help="a file of images and labels")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = msjax.data.from_npz(options.npz or write_digits(pathlib.Path(folder) / "digits.npz"))
    results = {}
    for name, codec in {"none": msjax.compress.Identity(), "MS": msjax.compress.MaskEncoded()}.items():
        parts = Client(data.input_like.shape[-1], nnx.Rngs(0)), Server(data.num_classes, nnx.Rngs(1))
        result = msjax.train(
            parts, data, codec=codec, clients=10, batch_size=20, epochs=options.epochs, optimizer=optax.adam(5e-3)
        )
        results[name] = result
        features = result.traffic.uplink_feature_bytes / 1e6
        print(f"{name}: {result.test['top1_percent']:.1f} % on test images, {features:.2f} MB of features sent")
    return results


if __name__ == "__main__":
    main()

"""An MLP in Flax Linen that predicts a number from the columns of a CSV file.

    python examples/regression_csv.py                                # scikit-learn's diabetes, written to a CSV first
    python examples/regression_csv.py my_table.csv --label price     # any table with a header

Two clients, such as two hospitals with rows of the same columns. Needs pandas, and scikit-learn for its diabetes:
pip install 'msjax[tables]' scikit-learn
"""

import argparse
import pathlib
import tempfile

import optax
from flax import linen

import msjax


class Client(linen.Module):
    """Two dense layers with batch normalisation and dropout."""

    features: int = 64

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(self.features, use_bias=False)(x)
        x = linen.silu(linen.BatchNorm(use_running_average=not train)(x))
        return linen.Dropout(0.1, deterministic=not train)(linen.silu(linen.Dense(self.features)(x)))


class Server(linen.Module):
    """Two more, and one number."""

    features: int = 32

    @linen.compact
    def __call__(self, h):
        return linen.Dense(1)(linen.silu(linen.Dense(self.features)(h)))


def write_diabetes(path):
    """scikit-learn's diabetes as a CSV file, its label in units of a hundred."""
    from sklearn.datasets import load_diabetes

    frame = load_diabetes(as_frame=True, scaled=False).frame
    frame["target"] /= 100
    frame.to_csv(path, index=False)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="?", help="a table with a header")
    parser.add_argument("--label", default="target", help="the column to predict")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        table = options.csv or write_diabetes(pathlib.Path(folder) / "diabetes.csv")
        data = msjax.data.from_csv(table, label=options.label)
    result = msjax.train(
        (Client(), Server()),
        data,
        task="regression",
        # The features have signs, so MS sends those, too.
        codec=msjax.compress.MaskEncoded(bits=3, signed=True),
        clients=2,
        batch_size=32,
        epochs=options.epochs,
        optimizer=optax.adamw(3e-3),
    )
    print(f"root mean squared error on test rows: {result.test['rmse']:.3f}; mean error {result.test['mae']:.3f}")
    print(f"{result.traffic.uplink_feature_bytes / 1e3:.0f} kB of features sent")
    return result


if __name__ == "__main__":
    main()

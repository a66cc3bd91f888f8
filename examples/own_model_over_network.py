"""A preset: a model, data and task of your own, trained over a network. Each party has its own copy of such a file.

    msjax serve --config examples/own_model_over_network.py --name own            # in one terminal
    msjax client --client-id 0 --config examples/own_model_over_network.py &      # in another
    msjax client --client-id 1 --config examples/own_model_over_network.py

    msjax train --config examples/own_model_over_network.py                       # or all of it in one program

Code never crosses the network: server and clients compare shapes, task and codecs when they meet, and are told what
differs. A server that must not have the client's code returns (RemotePart(features), Server(…)) from `make_model`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msjax import compress, config, data, tasks


class Client(nnx.Module):
    """Two dense layers over a sensor's readings."""

    def __init__(self, inputs, rngs):
        self.dense1, self.dense2 = nnx.Linear(inputs, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.dense2(jax.nn.relu(self.dense1(x))))


class Server(nnx.Module):
    """Two more, and one number."""

    def __init__(self, rngs):
        self.dense, self.out = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, h):
        return self.out(jax.nn.relu(self.dense(h)))[..., 0]


def make_model(summary, seed):
    """The parts; `summary` says what the data are, and `seed` is the run's."""
    rngs = nnx.Rngs(seed)
    return Client(summary.input_shape[-1], rngs), Server(rngs)


def make_data():
    """Here: readings that are made. A client reads its own, for example by data.from_csv; give it --own-data then."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(640, 8)).astype(np.float32)
    y = np.sin(x[:, 0]) + x[:, 1] * x[:, 2]
    return data.from_arrays((x[:512], y[:512]), (x[512:], y[512:]))


def huber(outputs, labels):
    """A loss of one's own: a value for each sample."""
    error = jnp.abs(outputs - labels)
    return jnp.where(error < 1, error**2 / 2, error - 0.5)


def make_task(summary):
    """The loss, and a metric that is averaged over samples."""
    return tasks.custom(huber, {"mae": lambda outputs, labels: jnp.abs(outputs - labels)}, name="huber")


def get_config():
    """What both the server and the clients read; the server's options count, of a client its model, data and task."""
    return config.Config(
        model=config.ModelConfig(name=":make_model"),
        data=config.DataConfig(name=":make_data"),
        task=config.TaskConfig(name=":make_task"),
        optim=config.OptimConfig(kind="adamw", learning_rate=3e-3, weight_decay=0.0),
        codec=compress.MaskEncoded(),
        grad_codec=compress.EntropyMask(bits=2.0, signed=True, rounding="stochastic"),
        clients=2,
        batch_size=32,
        epochs=10,
    )

"""The study of gradient noise: its two variances, against what they are by definition."""

import jax
import numpy as np
import pytest

from experiments import gradient_noise
from msjax import models

from .setups import dataset


def test_noise_is_that_of_the_mean_of_clients_and_grows_with_the_error(monkeypatch):
    monkeypatch.setattr(gradient_noise, "ERRORS", (0.5, 2.0))
    monkeypatch.setattr(gradient_noise, "DRAWS", 2)
    monkeypatch.setattr(gradient_noise, "CLIENTS", 4)
    images, labels = dataset().train.fetch(np.arange(32))
    x = jax.numpy.asarray(images, np.float32) / 255
    model = models.build("convnet", input_shape=x.shape[1:], num_classes=10, width=0.25)
    rows = gradient_noise.measure(models.split(model, "medium"), x, labels)
    assert [row["made"] for row in rows] == pytest.approx([0.5, 2.0], rel=0.1)
    assert rows[1]["added"] == pytest.approx(4 * rows[0]["added"], rel=0.3) and rows[0]["bits"] > rows[1]["bits"]
    assert all(row["share"] == pytest.approx(row["added"] / row["own"]) for row in rows)
    # The own noise is that of the mean of four gradients, each of which differs as four images do.
    whole = models.whole(model)

    def loss(params, x, y):
        logits, _ = whole.apply(params, whole.stats, x, train=True, key=jax.random.key(0))
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    client = models.split(model, "medium")[0].params
    gradients = []
    for at in range(0, 32, 8):
        found = jax.grad(loss)(whole.params, x[at : at + 8], labels[at : at + 8])
        gradients.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves({n: found[n] for n in client})]))
    mean = np.mean(gradients, 0)
    own = np.var(gradients, 0, ddof=1).sum() / 4 / np.sum(mean**2)
    assert all(row["own"] == pytest.approx(own, rel=1e-3) for row in rows)

"""Every byte is counted: Traffic against the payloads that are really made."""

import jax
import numpy as np
import pytest

from msjax import compress, config, metrics, step, train

from .test_step import BATCH, CLIENTS, make


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("codec", [compress.Identity(), compress.MaskEncoded(), compress.Uniform()], ids=str)
def test_step_traffic_is_what_the_parties_send(codec):
    grad_codec = compress.StochasticUniform(bits=4)
    setup, state, x, y, keys = make(codec, grad_codec)
    features = step.features_like(setup, state.client, x[0])
    traffic = metrics.step_traffic(codec, grad_codec, features, state.client, clients=CLIENTS)
    payload, pending = step.client_forward(setup, state.client, x[0], keys[0])
    stacked = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], CLIENTS, 0), payload)
    _, replies, _ = step.server_step(setup, state.server, stacked, y, keys, features)
    update = step.client_backward(setup, pending, jax.tree.map(lambda leaf: leaf[0], replies), features)
    assert traffic.uplink_feature_bytes == CLIENTS * nbytes(payload)
    assert traffic.downlink_gradient_bytes == nbytes(replies)
    assert traffic.uplink_synchronization_bytes == CLIENTS * nbytes(update)
    assert traffic.uplink_label_bytes == nbytes(y)
    assert traffic.uplink_bytes == CLIENTS * (nbytes(payload) + nbytes(update)) + nbytes(y)
    one = metrics.step_traffic(codec, grad_codec, features, state.client, clients=1)
    assert one.uplink_synchronization_bytes == one.downlink_synchronization_bytes == 0
    assert (traffic + traffic).uplink_bytes == (traffic * 2).uplink_bytes == 2 * traffic.uplink_bytes


def test_papers_accounting_of_an_epoch():
    """Uplink feature maps, training and test samples: 60,000 × 65,536 bytes for VGG19's shallow cut, 3.662 · 2^30."""
    cfg = config.Config(codec=compress.Identity(), clients=1, batch_size=BATCH, epochs=1)
    job = train.prepare(cfg)
    traffic = train.epoch_traffic(cfg, job, train.Evaluator(cfg, job))
    samples = len(job.train.labels) + len(job.test.labels)
    per_sample = np.prod(job.features.shape[1:]) * 4
    assert traffic.paper_bytes == samples * per_sample
    assert traffic.uplink_feature_bytes == len(job.train.labels) * per_sample
    assert pytest.approx(3.662, abs=5e-4) == 60_000 * 64 * 16 * 16 * 4 / 2**30

"""Every byte is counted: Traffic against the payloads that are really made."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import compress, config, feed, metrics, step, train

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


@pytest.mark.parametrize("samples", [256, 300, 40])
def test_an_epochs_bytes_are_those_of_its_steps(samples):
    """With a smaller last step, whose k is rounded down by itself."""
    codec = compress.MaskEncoded()
    _, state, *_ = make(codec, compress.Identity())
    like = jax.ShapeDtypeStruct((BATCH, 4, 4, 16), np.float32)
    options = {"clients": 3, "samples_per_client": samples, "batch_size": 64}
    found = metrics.epoch_traffic(codec, compress.Identity(), like, state.client, **options)
    calls = feed.epoch_calls(np.arange(3 * samples).reshape(3, samples), 64, 10)
    payload = 0
    for call in calls:
        for step_ in call:
            payload += sum(nbytes(codec.encode(jnp.zeros((len(client), 4, 4, 16)))) for client in step_)
    assert found.uplink_feature_bytes == payload
    assert found.uplink_label_bytes == 3 * samples * 4
    assert found.downlink_gradient_bytes == 3 * samples * 4 * 4 * 16 * 4


@pytest.mark.parametrize("compressed", [True, False])
def test_papers_accounting_of_an_epoch(compressed):
    """Uplink feature maps, training and test samples: 60,000 × 65,536 bytes for VGG19's shallow cut, 3.662 · 2^30."""
    codec = compress.MaskEncoded()
    cfg = config.Config(codec=codec, clients=1, batch_size=BATCH, epochs=1, eval_compressed=compressed)
    job = train.prepare(cfg)
    per_sample = math.prod(job.features.shape[1:]) * 4
    tested = train.Evaluator(cfg, job).feature_bytes()
    if compressed:
        assert tested == 60 * codec.payload_bytes(job.features) and job.test.count == 60 * BATCH
    else:
        assert tested == job.test.count * per_sample
    assert 3.6615 < 60_000 * 64 * 16 * 16 * 4 / 2**30 < 3.6625

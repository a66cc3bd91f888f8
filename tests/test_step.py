"""Three ways of computing a step agree: fused, as the parties take it, and spread over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from msjax import compress, data, models, tasks, wire
from msjax.split import fused, step
from msjax.split.make_spec import init_part, make_spec
from msjax.split.metrics import zero_sums
from msjax.split.modes import Parallel
from msjax.split.payloads import Codecs
from msjax.split.schedule import Schedule
from msjax.split.spec import Preprocess
from msjax.split.state import TrainState, client_keys
from msjax.split.trees import TreeSpec
from msjax.training import batching, devices, program

from .helpers import assert_close
from .setups import tolerance

CLIENTS, BATCH = 8, 6
OPTIMIZER = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
CODECS = [
    (compress.Identity(), compress.Identity()),
    (compress.RandK(ratio=0.5, granularity="sample"), compress.RandK(ratio=0.5)),
    (compress.MaskEncoded(ratio=0.9, granularity="sample"), compress.StochasticUniform(bits=8)),
    (compress.RandTopK(ratio=0.8), compress.MaskEncoded(ratio=0.9, bits=4, signed=True)),
]
KEPT = [
    (compress.RandK(ratio=0.5, granularity="sample"), compress.RandK(ratio=0.5, granularity="sample")),
    (compress.TopK(ratio=0.8), compress.StochasticUniform(bits=8)),
]
"""Where gradients are sent only of what was kept."""


def make(codec, grad_codec, name="convnet", shape=(8, 8, 1), dtype=jnp.float32, **options):
    """A run with momentum and weight decay, its first state, and a batch of each client."""
    model = models.build(name, input_shape=shape, num_classes=10, width=0.25, dtype=dtype)
    parts = models.split(model, "medium", seed=3)
    spec = make_spec(
        parts,
        inputs=TreeSpec.of(jax.ShapeDtypeStruct(shape, dtype)),
        labels=TreeSpec.of(jax.ShapeDtypeStruct((), jnp.int32)),
        schedule=Schedule(Parallel(), CLIENTS, 4 * BATCH, 0, BATCH, 1),
        **{
            "task": tasks.classification(),
            "optimizer": OPTIMIZER,
            "codec": Codecs(codec),
            "grad_codec": Codecs(grad_codec),
            "test_codec": Codecs(compress.Identity()),
            "update_codec": compress.Identity(),
            "preprocess": Preprocess(),
            **options,
        },
    )
    client, server = (init_part(spec.optimizer, part) for part in parts)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(CLIENTS, BATCH, *shape)), dtype)
    y = jnp.asarray(rng.integers(0, 10, (CLIENTS, BATCH)), jnp.int32)
    keys = client_keys(jax.random.key(5), jnp.int32(0), jnp.arange(CLIENTS))
    return spec, TrainState(client, server, jnp.int32(0)), x, y, keys


def party_step(spec, state, x, y, keys):
    """The step as it goes over a network: one client after the other, then the server, then the clients again."""
    batch_size = x.shape[1]
    forward = jax.jit(functools.partial(step.client_forward, spec))
    sent = [forward(state.client, x[k], keys[k]) for k in range(len(x))]
    payloads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[payload for payload, _ in sent])
    serve = jax.jit(functools.partial(step.server_step, spec, batch_size=batch_size))
    server, replies, metrics = serve(state.server, payloads, y, keys)
    backward = jax.jit(functools.partial(step.client_backward, spec, batch_size=batch_size))
    updates = [
        backward(pending, jax.tree.map(lambda leaf, k=k: leaf[k], replies)) for k, (_, pending) in enumerate(sent)
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *updates)
    return TrainState(step.update_part(spec, state.client, mean), server, state.step + 1), metrics


fused_step = jax.jit(fused.fused_step, static_argnums=0)


@pytest.mark.parametrize(
    ("codec", "grad_codec", "kept_only"),
    [
        pytest.param(*pair, pair in KEPT, marks=[] if pair in (CODECS[2], KEPT[0]) else [pytest.mark.slow])
        for pair in CODECS + KEPT
    ],
    ids=str,
)
def test_fused_step_equals_the_parties_steps(codec, grad_codec, kept_only):
    spec, state, x, y, keys = make(codec, grad_codec, grad_kept_only=kept_only)
    after, fused_metrics = fused_step(spec, state, x, y, keys)
    parties, parties_metrics = party_step(spec, state, x, y, keys)
    assert_close(after, parties, tolerance(codec, grad_codec))
    assert_close(fused_metrics, parties_metrics, 1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.client.params, after.client.params)
    assert all(m > 0 for m in jax.tree.leaves(moved)), "the step must move every parameter of the client"


def test_kept_gradients_without_samples_need_a_codec_without_samples():
    by_sample = compress.StochasticUniform(bits=8, granularity="sample")
    message = 'grad_codec must have granularity="tensor" where grad_kept_only leaves one vector of a batch'
    with pytest.raises(ValueError, match=message):
        make(compress.TopK(ratio=0.8), by_sample, grad_kept_only=True)
    make(compress.TopK(ratio=0.8, granularity="sample"), by_sample, grad_kept_only=True)
    for granularity in ("channel", "token"):  # of what is left, these are others than of the features
        with pytest.raises(ValueError, match=r'"sample" or "token" if codec has the same, where grad_kept_only'):
            other = compress.StochasticUniform(bits=8, granularity=granularity)
            make(compress.TopK(ratio=0.8, granularity="sample"), other, grad_kept_only=True)
    make(compress.MaskEncoded(), by_sample, grad_kept_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grad_codec", "kept_only"),
    [
        (compress.Identity(), False),
        (compress.EntropyMask(bits=1.5, signed=True, rounding="stochastic"), False),
        (compress.EntropyMask(error=0.3, levels=7, signed=True, rounding="stochastic"), True),
    ],
    ids=["plain gradient", "coded gradient", "coded gradient of what was kept"],
)
def test_bytes_of_entropy_coded_messages(grad_codec, kept_only):
    """The fused step knows about how long the messages are that the parties would send."""
    codec = compress.EntropyMask(error=0.05)
    spec, state, x, y, keys = make(codec, grad_codec, grad_kept_only=kept_only)
    x = jnp.concatenate([x] * 8, axis=1) + 0.1 * jax.random.normal(jax.random.key(2), (CLIENTS, 8 * BATCH, 8, 8, 1))
    y = jnp.concatenate([y] * 8, axis=1)
    metrics = fused_step(spec, state, x, y, keys)[1]
    (features,) = spec.features.batch_leaves(8 * BATCH)
    forward = jax.jit(lambda x, key: step.client_forward(spec, state.client, x, key)[0])
    payloads = [forward(x[k], keys[k]) for k in range(CLIENTS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *payloads)
    backward = jax.jit(lambda p: step.server_step(spec, state.server, p, y, keys, batch_size=8 * BATCH)[1])
    replies = backward(stacked)
    replies = [jax.tree.map(lambda leaf, k=k: leaf[k], replies) for k in range(CLIENTS)]
    up = sum(len(wire.encode(payload, codec, features)) for (payload,) in payloads)
    down = sum(len(wire.encode(reply, grad_codec, features)) for (reply,) in replies)
    assert float(metrics.uplink_bytes) == pytest.approx(up, rel=0.02)
    assert float(metrics.downlink_bytes) == pytest.approx(down, rel=0.02)


IMAGES = Preprocess("crop_flip", (0.5,), (0.25,), "float32")


def program_inputs(spec, augment="crop_flip"):
    """Images and labels on the device, and a run that takes them."""
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (64, 8, 8, 1)), jnp.uint8)
    spec = dataclasses.replace(spec, preprocess=dataclasses.replace(IMAGES, augment=augment))
    return spec, images, jnp.arange(64, dtype=jnp.int32) % 10


EVERYONE = np.arange(CLIENTS, dtype=np.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "grad_codec"), CODECS[1:3], ids=str)
def test_shard_map_equals_vmap(codec, grad_codec):
    spec, state, *_ = make(codec, grad_codec)
    spec, images, labels = program_inputs(spec)
    order = np.random.default_rng(2).permutation(64)[: 2 * CLIENTS * 4].reshape(2, CLIENTS, 4).astype(np.int32)
    mesh = devices.make_mesh(CLIENTS)
    assert mesh is not None and mesh.size == 8
    results = []
    for m in (None, mesh if codec == CODECS[1][0] else Mesh(np.array(jax.devices()[:2]), (devices.AXIS,))):
        copy = jax.tree.map(jnp.array, state)
        sums = devices.replicate(zero_sums(spec), m)
        held = order.transpose(1, 0, 2).reshape(CLIENTS, -1)
        *arrays, place = batching.resident_of_clients(data.Arrays(images, labels), m, held)
        own = order if place is None else place[order]
        results.append(program.train_steps(spec, m, copy, sums, *arrays, own, EVERYONE, jax.random.key(9))[:2])
    assert_close(results[0], results[1], tolerance(codec, grad_codec))
    assert int(results[0][1].samples) == 2 * CLIENTS * 4


@pytest.mark.slow
def test_streamed_batches_give_the_same_step_as_resident_ones():
    spec, state, *_ = make(*CODECS[2])
    spec, images, labels = program_inputs(spec, "flip")
    order = np.arange(64, dtype=np.int32).reshape(1, CLIENTS, 8)
    key = jax.random.key(9)
    for mesh in (None, devices.make_mesh(CLIENTS)):
        results = []
        *arrays, place = batching.resident_of_clients(data.Arrays(images, labels), mesh, order[0])
        own = order if place is None else place[order]
        for batch in ((*arrays, own), (images[order[0]], labels[order[0]], None)):
            copy, sums = jax.tree.map(jnp.array, state), devices.replicate(zero_sums(spec), mesh)
            results.append(program.train_steps(spec, mesh, copy, sums, *batch, EVERYONE, key)[:2])
        assert_close(*results, 1e-6)


def test_train_does_not_recompile_and_donates_its_state():
    spec, state, *_ = make(*CODECS[2])
    spec, images, labels = program_inputs(spec, "none")
    order = np.zeros((1, CLIENTS, 4), np.int32)
    first = state.client.params["conv1"]["conv"]["conv"]["kernel"]
    sums = zero_sums(spec)
    before = program.train_steps._cache_size()
    for _ in range(3):
        same = dataclasses.replace(spec)  # another object: a static argument is compared by value
        args = (images, labels, order, EVERYONE, jax.random.key(0))
        state, sums, _ = program.train_steps(same, None, state, sums, *args)
    assert program.train_steps._cache_size() == before + 1
    assert first.is_deleted()
    assert int(state.step) == 3


def test_bfloat16_features_are_sent_in_sixteen_bits():
    spec, state, x, y, keys = make(compress.MaskEncoded(), compress.Identity(), dtype=jnp.bfloat16)
    assert spec.features.leaves[0].dtype == jnp.bfloat16
    state, metrics = fused_step(spec, state, x, y, keys)
    assert metrics.loss.dtype == jnp.float32 and np.isfinite(float(metrics.loss))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.client.params)} == {"float32"}


def test_test_loss_is_never_smoothed():
    plain, smoothed = (losses(label_smoothing) for label_smoothing in (0.0, 0.3))
    assert plain[1] == smoothed[1] and plain[0] != smoothed[0]


def losses(label_smoothing):
    """(training loss, test loss) of the same first step."""
    task = tasks.classification(label_smoothing=label_smoothing)
    spec, state, x, y, keys = make(compress.Identity(), compress.Identity(), task=task)
    _, metrics = fused_step(spec, state, x, y, keys)
    return float(metrics.loss), float(fused.evaluate(spec, state, x[:1], y[:1], keys[:1]).loss[0])


def test_client_keys_depend_on_step_and_client_alone():
    key = jax.random.key(0)
    together = jax.random.key_data(client_keys(key, jnp.int32(4), jnp.arange(6)))
    alone = jax.random.key_data(client_keys(key, jnp.int32(4), jnp.array([5])))
    np.testing.assert_array_equal(together[5:], alone)
    assert len({tuple(row) for row in together.tolist()}) == 6

"""Three ways of computing a step agree: fused, as the parties take it, and spread over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from msjax import compress, models, simulate, step, wire

from .helpers import assert_close

CLIENTS, BATCH = 8, 6
CODECS = [
    (compress.Identity(), compress.Identity()),
    (compress.RandK(ratio=0.5, granularity="sample"), compress.RandK(ratio=0.5)),
    (compress.MaskEncoded(ratio=0.9, granularity="sample"), compress.StochasticUniform(bits=8)),
    (compress.RandTopK(ratio=0.8), compress.MaskEncoded(ratio=0.9, bits=4, signed=True)),
]


def make(codec, grad_codec, name="convnet", shape=(8, 8, 1)):
    """A setup with momentum and weight decay, its first state, and a batch of each client."""
    model = models.build(name, input_shape=shape, num_classes=10, width=0.25)
    client, server = models.split(model, "medium", seed=3)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    setup = step.Setup(client.apply, server.apply, codec, grad_codec, optimizer)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(CLIENTS, BATCH, *shape)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, (CLIENTS, BATCH)), jnp.int32)
    keys = simulate.client_keys(jax.random.key(5), jnp.int32(0), jnp.arange(CLIENTS))
    return setup, step.init_state(setup, client, server), x, y, keys


def party_step(setup, state, x, y, keys):
    """The step as it goes over a network: one client after the other, then the server, then the clients again."""
    features = step.features_like(setup, state.client, x[0])
    forward = jax.jit(functools.partial(step.client_forward, setup))
    sent = [forward(state.client, x[k], keys[k]) for k in range(len(x))]
    payloads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[payload for payload, _ in sent])
    serve = jax.jit(functools.partial(step.server_step, setup, features=features))
    server, replies, info = serve(state.server, payloads, y, keys)
    backward = jax.jit(functools.partial(step.client_backward, setup, features=features))
    updates = [
        backward(pending, jax.tree.map(lambda leaf, k=k: leaf[k], replies)) for k, (_, pending) in enumerate(sent)
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *updates)
    return step.TrainState(step.client_update(setup, state.client, mean), server, state.step + 1), info


def tolerance(*codecs):
    """How far apart two sums of different order may lead.

    A value that lies on the edge between two codes may get either; which values do, differs from machine to machine,
    and one alone moves a small gradient by some percent. Only codecs without such edges show small mistakes.
    """
    return 1e-5 if all(isinstance(codec, compress.Identity | compress.RandK) for codec in codecs) else 0.1


@pytest.mark.parametrize(("codec", "grad_codec"), CODECS, ids=str)
def test_fused_step_equals_the_parties_steps(codec, grad_codec):
    setup, state, x, y, keys = make(codec, grad_codec)
    fused, fused_info = jax.jit(functools.partial(step.fused_step, setup))(state, x, y, keys)
    parties, parties_info = party_step(setup, state, x, y, keys)
    assert_close(fused, parties, tolerance(codec, grad_codec))
    assert_close(fused_info, parties_info, 1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.client.params, fused.client.params)
    assert all(m > 0 for m in jax.tree.leaves(moved)), "the step must move every parameter of the client"


@pytest.mark.parametrize(
    "grad_codec",
    [compress.Identity(), compress.EntropyMask(bits=1.5, signed=True, rounding="stochastic")],
    ids=["plain gradient", "coded gradient"],
)
def test_bytes_of_entropy_coded_messages(grad_codec):
    """The fused step knows about how long the messages are that the parties would send."""
    codec = compress.EntropyMask(error=0.05)
    setup, state, x, y, keys = make(codec, grad_codec)
    x = jnp.concatenate([x] * 8, axis=1) + 0.1 * jax.random.normal(jax.random.key(2), (CLIENTS, 8 * BATCH, 8, 8, 1))
    y = jnp.concatenate([y] * 8, axis=1)
    info = jax.jit(functools.partial(step.fused_step, setup))(state, x, y, keys)[1]
    features = step.features_like(setup, state.client, x[0])
    forward = jax.jit(lambda x, key: step.client_forward(setup, state.client, x, key)[0])
    payloads = [forward(x[k], keys[k]) for k in range(CLIENTS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *payloads)
    backward = jax.jit(lambda payloads: step.server_step(setup, state.server, payloads, y, keys, features)[1])
    replies = backward(stacked)
    replies = [jax.tree.map(lambda leaf, k=k: leaf[k], replies) for k in range(CLIENTS)]
    up = sum(len(wire.encode(payload, codec, features)) for payload in payloads)
    down = sum(len(wire.encode(reply, grad_codec, features)) for reply in replies)
    assert float(info.uplink_bytes) == pytest.approx(up, rel=0.02)
    assert float(info.downlink_bytes) == pytest.approx(down, rel=0.02)


@pytest.mark.parametrize(("codec", "grad_codec"), CODECS[1:3], ids=str)
def test_shard_map_equals_vmap(codec, grad_codec):
    setup, state, *_ = make(codec, grad_codec)
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (64, 8, 8, 1)), jnp.uint8)
    labels = jnp.arange(64, dtype=jnp.int32) % 10
    order = np.random.default_rng(2).permutation(64)[: 2 * CLIENTS * 4].reshape(2, CLIENTS, 4).astype(np.int32)
    preprocess = simulate.Preprocess("crop_flip", (0.5,), (0.25,), "float32")
    mesh = simulate.make_mesh(CLIENTS)
    assert mesh is not None and mesh.size == 8
    results = []
    for m in (None, mesh if codec == CODECS[1][0] else Mesh(np.array(jax.devices()[:2]), (simulate.AXIS,))):
        train = simulate.make_train(setup, preprocess, clients=CLIENTS, mesh=m)
        copy = jax.tree.map(jnp.array, state)
        results.append(train(copy, simulate.zero_sums(), images, labels, order, jax.random.key(9)))
    assert_close(results[0], results[1], tolerance(codec, grad_codec))
    assert int(results[0][1].samples) == 2 * CLIENTS * 4


def test_streamed_batches_give_the_same_step_as_resident_ones():
    setup, state, *_ = make(*CODECS[2])
    images = jnp.asarray(np.random.default_rng(1).integers(0, 256, (64, 8, 8, 1)), jnp.uint8)
    labels = jnp.arange(64, dtype=jnp.int32) % 10
    order = np.arange(64, dtype=np.int32).reshape(1, CLIENTS, 8)
    preprocess = simulate.Preprocess("flip", (0.5,), (0.25,), "float32")
    key = jax.random.key(9)
    for mesh in (None, simulate.make_mesh(CLIENTS)):
        train = simulate.make_train(setup, preprocess, clients=CLIENTS, mesh=mesh)
        copies = [jax.tree.map(jnp.array, state) for _ in range(2)]
        resident = train(copies[0], simulate.zero_sums(), images, labels, order, key)
        streamed = train(copies[1], simulate.zero_sums(), images[order[0]], labels[order[0]], None, key)
        assert_close(resident, streamed, 1e-6)


def test_train_does_not_recompile_and_donates_its_state():
    setup, state, *_ = make(*CODECS[2])
    images = jnp.zeros((64, 8, 8, 1), jnp.uint8)
    labels = jnp.zeros(64, jnp.int32)
    order = np.zeros((1, CLIENTS, 4), np.int32)
    train = simulate.make_train(setup, simulate.Preprocess("none", (0.5,), (0.25,), "float32"), clients=CLIENTS)
    first = state.client.params["conv1"]["conv"]["conv"]["kernel"]
    sums = simulate.zero_sums()
    for _ in range(3):
        state, sums = train(state, sums, images, labels, order, jax.random.key(0))
    assert train._cache_size() == 1
    assert first.is_deleted()
    assert int(state.step) == 3


def test_bfloat16_features_are_sent_in_sixteen_bits():
    model = models.build("convnet", input_shape=(8, 8, 1), num_classes=10, width=0.25, dtype=jnp.bfloat16)
    client, server = models.split(model, "medium")
    setup = step.Setup(client.apply, server.apply, compress.MaskEncoded(), compress.Identity(), optax.sgd(0.1))
    state = step.init_state(setup, client, server)
    x = jnp.ones((CLIENTS, BATCH, 8, 8, 1), jnp.bfloat16)
    y = jnp.zeros((CLIENTS, BATCH), jnp.int32)
    keys = jax.random.split(jax.random.key(0), CLIENTS)
    features = step.features_like(setup, state.client, x[0])
    assert features.dtype == jnp.bfloat16
    state, info = jax.jit(functools.partial(step.fused_step, setup))(state, x, y, keys)
    assert info.loss.dtype == jnp.float32 and np.isfinite(float(info.loss))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.client.params)} == {"float32"}


def test_count_correct_ranks_ties_by_class_and_rejects_nan():
    logits = jnp.array([[1.0, 3, 2, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [jnp.nan] * 7])
    top1, top5 = step.count_correct(logits, jnp.array([1, 1, 5, 0]))
    # Row 0 is right; row 1 comes second of two equals; row 2 comes sixth of seven equals; row 3 counts as wrong.
    assert (int(top1), int(top5)) == (1, 2)


def test_label_smoothing_is_cross_entropy_against_the_smoothed_target():
    logits, y = jax.random.normal(jax.random.key(0), (5, 4)), jnp.array([0, 3, 1, 1, 2])
    target = 0.8 * np.eye(4)[y] + 0.2 / 4
    expected = -(target * np.log(jax.nn.softmax(logits))).sum(1).mean()
    np.testing.assert_allclose(step.cross_entropy(logits, y, 0.2), expected, rtol=1e-6)
    np.testing.assert_allclose(
        step.cross_entropy(logits, y), -np.log(jax.nn.softmax(logits))[np.arange(5), y].mean(), rtol=1e-6
    )


def test_test_loss_is_never_smoothed():
    plain, smoothed = (setup_and_loss(label_smoothing) for label_smoothing in (0.0, 0.3))
    assert plain[1] == smoothed[1] and plain[0] != smoothed[0]


def setup_and_loss(label_smoothing):
    """(training loss, test loss) of the same first step."""
    model = models.build("convnet", input_shape=(8, 8, 1), num_classes=10)
    client, server = models.split(model, "medium")
    codec = compress.Identity()
    setup = step.Setup(client.apply, server.apply, codec, codec, optax.sgd(0.0), label_smoothing)
    state = step.init_state(setup, client, server)
    x, y = jax.random.normal(jax.random.key(0), (1, 6, 8, 8, 1)), jnp.arange(6)[None]
    keys = simulate.client_keys(jax.random.key(1), jnp.int32(0), jnp.arange(1))
    _, info = step.fused_step(setup, state, x, y, keys)
    return float(info.loss), float(step.evaluate(setup, state, x[0], y[0], keys[0], codec=None).loss)


def test_client_keys_depend_on_step_and_client_alone():
    key = jax.random.key(0)
    together = jax.random.key_data(simulate.client_keys(key, jnp.int32(4), jnp.arange(6)))
    alone = jax.random.key_data(simulate.client_keys(key, jnp.int32(4), jnp.array([5])))
    np.testing.assert_array_equal(together[5:], alone)
    assert len({tuple(row) for row in together.tolist()}) == 6

"""A U-shaped step on parts of 64 values each, every cut of one shape: what each party draws, and whom it counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msjax import compress, data, models, tasks
from msjax.distributed.messages import encode
from msjax.split import fused, step
from msjax.split.make_spec import init_part, make_spec
from msjax.split.modes import Parallel
from msjax.split.payloads import Codecs
from msjax.split.schedule import Schedule
from msjax.split.signs import warn_of_lost_signs
from msjax.split.spec import Preprocess
from msjax.split.state import TrainState, client_keys
from msjax.split.trees import TreeSpec, mean

from .helpers import assert_close

CLIENTS, BATCH, WIDTH = 3, 2, 64
HALF = Codecs(compress.RandK(ratio=0.5, granularity="sample"))
ALL = Codecs(compress.Identity())


@dataclasses.dataclass(frozen=True)
class Mix:
    """No output, and no gradient, is zero where only some of the inputs are; one statistic, and noise in training."""

    name: str

    def __call__(self, params, stats, h, *, train, key):
        h = (h + h.mean(-1, keepdims=True) + 0.1) * params[self.name]
        if train:
            h = h * (1 + 0.1 * jax.random.uniform(key, (WIDTH,)))
            stats = {self.name: stats[self.name] * 0.5 + h.mean()}
        return h, stats


@dataclasses.dataclass(frozen=True)
class Under:
    """A part whose output, or input, is under a name."""

    part: Mix
    output: str | None = None
    input: str | None = None

    def __call__(self, params, stats, h, *, train, key):
        h, stats = self.part(params, stats, h if self.input is None else h[self.input], train=train, key=key)
        return h if self.output is None else {self.output: h}, stats


def make(codecs=HALF, *, u_shaped=True, label_smoothing=0.0, grad_kept_only=False, grad_codecs=None, first=None):
    """A run, its first state, and a batch of each client; the features of the first cut are called `first`."""
    names = ("client", "server", "tail")[: 3 if u_shaped else 2]
    parts = tuple(models.ModelPart(Mix(n), {n: jnp.linspace(1.0, 2.0, WIDTH)}, {n: jnp.zeros(())}) for n in names)
    if first is not None:
        applies = (Under(parts[0].apply, output=first), Under(parts[1].apply, input=first))
        parts = (*(part._replace(apply=apply) for part, apply in zip(parts, applies, strict=False)), *parts[2:])
    spec = make_spec(
        parts,
        inputs=TreeSpec.of(jax.ShapeDtypeStruct((WIDTH,), np.float32)),
        labels=TreeSpec.of(jax.ShapeDtypeStruct((), np.int32)),
        schedule=Schedule(Parallel(), CLIENTS, BATCH, 0, BATCH, 1, u_shaped=u_shaped),
        task=tasks.classification(label_smoothing=label_smoothing),
        optimizer=optax.sgd(0.1),
        codec=codecs,
        grad_codec=ALL if grad_kept_only else grad_codecs or codecs,
        grad_kept_only=grad_kept_only,
        test_codec=ALL,
        update_codec=compress.Identity(),
        preprocess=Preprocess(),
    )
    client, server = init_part(spec.optimizer, parts[0], *parts[2:]), init_part(spec.optimizer, parts[1])
    x = jax.random.uniform(jax.random.key(1), (CLIENTS, BATCH, WIDTH))
    y = jnp.arange(CLIENTS * BATCH, dtype=jnp.int32).reshape(CLIENTS, BATCH)
    keys = client_keys(jax.random.key(2), jnp.int32(0), jnp.arange(CLIENTS))
    return spec, TrainState(client, server, jnp.int32(0)), x, y, keys


@functools.partial(jax.jit, static_argnums=0)
def party_step(spec, state, x, y, keys, present=(True,) * CLIENTS):
    """The step as the parties take it: (state after it, mean loss, each of its messages decoded)."""
    state, loss, messages = party_messages(spec, state, x, y, keys, present)
    pairs = zip(message_payloads(spec), messages, strict=True)
    return state, loss, [jax.tree.leaves(jax.vmap(payload.decode)(message))[0] for payload, message in pairs]


@functools.partial(jax.jit, static_argnums=0)
def party_messages(spec, state, x, y, keys, present=(True,) * CLIENTS):
    """As `party_step`, but with the messages as they are sent."""
    size = {"batch_size": BATCH}
    forward = jax.vmap(lambda x, key: step.client_forward(spec, state.client, x, key))
    tail = jax.vmap(lambda payload, y, key: step.client_tail(spec, state.client, payload, y, key, **size))
    backward = jax.vmap(lambda pending, reply, tail: step.client_backward(spec, pending, reply, tail, **size))
    features, pending = forward(x, keys)
    outputs, kept = step.server_forward(spec, state.server, features, keys, **size)
    gradients, update, metrics = tail(outputs, y, keys)
    server, replies = step.server_backward(spec, state.server, kept, gradients, keys, jnp.array(present), **size)
    client = step.update_part(spec, state.client, mean(backward(pending, replies, update)))
    messages = (features, outputs, gradients, replies)
    return TrainState(client, server, state.step + 1), metrics.loss.mean(), messages


def message_payloads(spec):
    """What each message of `party_step` is."""
    makers = (spec.feature_payload, spec.tail_feature_payload, spec.tail_gradient_payload, spec.gradient_payload)
    return [make(BATCH) for make in makers]


@functools.partial(jax.jit, static_argnums=0)
def server_loss(spec, state, x, y, keys):
    """That of a step in which the labels are the server's."""
    features, _ = jax.vmap(lambda x, key: step.client_forward(spec, state.client, x, key))(x, keys)
    return step.server_step(spec, state.server, features, y, keys, batch_size=BATCH)[2].loss


fused_step = jax.jit(fused.fused_step, static_argnums=0)


def test_the_parties_take_the_fused_step_and_every_message_draws_its_own_positions():
    """As from one client to the next, so from cut to cut and from features to their gradients."""
    run = make()
    after, loss, messages = party_step(*run)
    expected, metrics = fused_step(*run)
    assert_close(after, expected, 1e-5)
    assert all(after.client.stats.values()) and all(after.server.stats.values())  # which were zero
    assert float(loss) == pytest.approx(float(metrics.loss), rel=1e-5)
    kept = [tuple(np.flatnonzero(of_client)) for message in messages for of_client in np.asarray(message)]
    assert {len(positions) for positions in kept} == {BATCH * WIDTH // 2}
    assert len(set(kept)) == len(kept) == 4 * CLIENTS


def test_what_a_codec_loses_at_the_second_cut_is_told(caplog):
    spec, state, x, y, _ = make(Codecs(compress.MaskEncoded(0.5)), grad_codecs=ALL)
    train = data.Arrays(np.asarray(x).reshape(-1, WIDTH), np.asarray(y).reshape(-1))
    below = state.server._replace(params={"server": -state.server.params["server"]})
    for server in (None, state.server):
        warn_of_lost_signs(spec, state.client, train, server=server)
    assert not caplog.records
    warn_of_lost_signs(spec, state.client, train, server=below)
    assert "100 % of the energy of the features at the second cut: give it signed=True" in caplog.text


def test_messages_of_both_cuts_are_counted_where_one_has_a_coder():
    """What goes to the tail and back is not compressed there, and counts all the same."""
    codecs = Codecs.of({"": compress.Identity(), "a": compress.EntropyMask(bits=2.0)})
    spec, state, x, y, keys = make(codecs, grad_codecs=ALL, first="a")
    assert spec.codec.entropy_coded and not spec.tail_codec.entropy_coded
    _, metrics = fused_step(spec, state, x, y, keys)
    sent = [0, 0]
    *_, messages = party_messages(spec, state, x, y, keys)
    for n, (stacked, payload) in enumerate(zip(messages, message_payloads(spec), strict=True)):
        for client in range(CLIENTS):
            one = jax.tree.map(lambda leaf, client=client: leaf[client], stacked)
            sent[n in (1, 3)] += sum(map(len, encode(one, payload, None)))
    assert [metrics.uplink_bytes, metrics.downlink_bytes] == pytest.approx(sent, rel=0.1)
    raw = CLIENTS * BATCH * WIDTH * 4
    assert sent[1] > 2 * raw and raw < sent[0] < 2 * raw


def test_gradients_only_of_what_was_kept():
    """Up and down, each is as long as what was kept, and stands for the derivative of `RandK`."""
    run = make(grad_kept_only=True)
    after, _, (features, outputs, *gradients) = party_step(*run)
    assert_close(after, fused_step(*run)[0], 1e-5)
    for kept, sent in zip((outputs, features), gradients, strict=True):
        assert sent.shape == (CLIENTS, BATCH, WIDTH // 2) and kept.shape == (CLIENTS, BATCH, WIDTH)
    whole, _, messages = party_step(*make())
    assert messages[3].shape == messages[0].shape
    assert not np.allclose(whole.client.params["client"], after.client.params["client"], rtol=1e-4)


def test_the_servers_gradient_is_the_mean_of_those_that_are_present():
    spec, state, x, y, keys = make(ALL)
    two, _, (*_, replies) = party_step(spec, state, x, y, keys, (True, False, True))
    grads = []
    for k in (0, 2):
        alone, *_ = party_step(spec, state, x, y, keys, np.arange(CLIENTS) == k)
        grads.append(np.subtract(state.server.params["server"], alone.server.params["server"]))
    found = np.subtract(state.server.params["server"], two.server.params["server"])
    assert_close(found, np.mean(grads, axis=0), 1e-4)
    # Each is told its own gradient, whoever else is there.
    everyone, _, (*_, whole) = party_step(spec, state, x, y, keys)
    assert_close(replies[::2], whole[::2], 1e-5)
    assert not replies[1].any() and whole[1].any()
    assert_close(two.server.stats, everyone.server.stats, 1e-5)


@pytest.mark.parametrize("u_shaped", [False, True])
def test_the_parties_smooth_labels_in_training(u_shaped):
    """Where the labels are the server's, and where they are the client's."""

    def losses(label_smoothing):
        run = make(ALL, u_shaped=u_shaped, label_smoothing=label_smoothing)
        found = float(party_step(*run)[1] if u_shaped else server_loss(*run))
        assert found == pytest.approx(float(fused_step(*run)[1].loss), rel=1e-5)
        return found

    assert abs(losses(0.3) - losses(0.0)) > 0.01

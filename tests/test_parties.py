"""The parties apart compute what the fused program computes, in every mode; and the script that they follow."""

import copy
import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from msjax import assemble, compress, config, parties, protocol, runs, train
from msjax.protocol import Phase

from .helpers import assert_close

SMALL = config.Config(
    model=config.ModelConfig(name="convnet", width=0.25),
    optim=config.OptimConfig(learning_rate=0.05, warmup_epochs=0.5),
    codec=compress.MaskEncoded(ratio=0.9),
    clients=4,
    batch_size=10,
    epochs=2,
)
SMOOTH = dataclasses.replace(SMALL, codec=compress.RandK(ratio=0.5), grad_codec=compress.RandK(ratio=0.5))
"""Random, and without edges between codes, on which machines differ (`test_step.tolerance`)."""
COUNT, TEST_COUNT = 100, 42  # of a client 25: batches of 10, 10 and 5; and 10 or 11


def dataset(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: (rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8), rng.integers(0, 10, n).astype(np.int32))  # noqa: E731
    return *draw(COUNT), *draw(TEST_COUNT)


def make_parties(cfg, **options):
    """A server and all clients, each with its share of the data alone."""
    images, labels, test_inputs, test_labels = dataset()
    pools, samples = assemble.share_out(cfg, lambda: labels, COUNT)
    info = assemble.SetInfo((8, 8, 1), 10, (0.5,), (0.25,))
    parts = assemble.assemble(cfg, info, samples=samples, test_samples=TEST_COUNT)
    shapes, programs = parts.shapes(), parts.programs(cfg.seed, **options)
    clients = [
        parties.Client(
            number,
            parts.plan,
            shapes,
            programs,
            parts.client,
            parties.ClientData(images[pool], labels[pool], test_inputs, test_labels),
            cfg.seed,
        )
        for number, pool in enumerate(pools)
    ]
    return parts.plan, parties.Server(parts.plan, shapes, programs, parts.server), clients


MODES = [
    config.ModeConfig(),
    config.ModeConfig(head_cut="last"),
    config.ModeConfig(kind="splitfed", average_steps=2),
    config.ModeConfig(kind="sequential"),
    config.ModeConfig(kind="sequential", turn_steps=2, head_cut="4"),
]


class Finished(NamedTuple):
    """The parties of `SMOOTH` in a mode, at the end of the run."""

    plan: protocol.Plan
    server: parties.Server
    clients: list[parties.Client]
    exchanges: list[protocol.Exchange]
    first_epoch: tuple
    """What the server had counted after it, in training and in test."""
    before: tuple
    """The parameters of the server and of the first client before the run."""


@functools.cache
def finished(mode):
    plan, server, clients = make_parties(dataclasses.replace(SMOOTH, mode=mode))
    before = jax.tree.map(np.asarray, (server.state.params, clients[0].state.params))
    exchanges = []
    for exchange in parties.run(plan, server, clients):
        exchanges.append(exchange)
        if exchange.step == plan.epoch_steps - 1:
            first_epoch = server.train, server.test
    return Finished(plan, server, clients, exchanges, first_epoch, before)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parties_train(mode):
    plan, server, clients, exchanges, _, before = finished(mode)
    assert exchanges == list(plan.exchanges())
    after = (server.state.params, clients[-1].state.params)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert all(m > 0 for m in jax.tree.leaves(moved))
    assert server.train.samples == SMALL.epochs * COUNT
    assert server.test.samples == SMALL.epochs * TEST_COUNT
    if mode.kind != "sequential":
        for client in clients[1:]:
            for a, b in zip(jax.tree.leaves(clients[0].state[:2]), jax.tree.leaves(client.state[:2]), strict=True):
                np.testing.assert_array_equal(a, b)


def test_clients_that_encode_with_numpy():
    """U-shaped, where they encode features and gradients."""
    cfg = dataclasses.replace(
        SMALL, mode=MODES[1], grad_codec=compress.MaskEncoded(ratio=0.9, bits=3, signed=True), epochs=1
    )
    ends = []
    for numpy_encoder in (False, True):
        plan, server, clients = make_parties(cfg, numpy_encoder=numpy_encoder)
        first = next(plan.exchanges())
        sent = [client.send(first) for client in clients]
        assert all(isinstance(leaf, np.ndarray) == numpy_encoder for m in sent for leaf in m.payload)
        for client in clients:
            client.begin()
        for _ in parties.run(plan, server, clients):
            pass
        ends.append((server.state, server.train, server.test, [client.state for client in clients]))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    with pytest.raises(ValueError, match="codec must not be random to encode with NumPy, got RandK"):
        make_parties(dataclasses.replace(cfg, codec=compress.RandK()), numpy_encoder=True)


def test_a_gradient_that_does_not_come():
    """U-shaped: the server's step is that of the clients whose gradients have come, though all sent features."""
    plan, server, clients = make_parties(dataclasses.replace(SMOOTH, mode=MODES[1]))
    features, gradient = list(plan.step_exchanges(0))[:2]
    without = copy.copy(server)  # a server that the last client has sent nothing
    answers = server.handle(features, {c.number: c.send(features) for c in clients})
    without.handle(features, {c.number: c.send(features) for c in clients[:-1]})
    for client in clients:
        client.receive(features, answers[client.number])
    messages = {c.number: c.send(gradient) for c in clients[:-1]}
    found, expected = server.handle(gradient, messages), without.handle(gradient, messages)
    assert_close(server.state.params, without.state.params, 1e-5)
    assert_close([m.payload for m in found.values()], [m.payload for m in expected.values()], 1e-5)
    assert found.keys() == messages.keys()


def test_plan():
    plan = protocol.Plan(config.ModeConfig(kind="sequential", turn_steps=2), 2, 5, 0, 2, 1)
    steps = [(e.step, e.phase.name, e.clients[0]) for e in plan.exchanges()]
    assert [s for s in steps if s[1] == "FEATURES"] == [
        (0, "FEATURES", 0),
        (1, "FEATURES", 0),
        (2, "FEATURES", 1),
        (3, "FEATURES", 1),
        (4, "FEATURES", 0),
        (5, "FEATURES", 1),
    ]
    assert [plan.place(s)[1:3] for s in range(6)] == [(0, 2), (2, 4), (0, 2), (2, 4), (4, 5), (4, 5)]
    assert [s[0] for s in steps if s[1] == "TAKE"] == [0, 2, 4, 5]
    assert [s[0] for s in steps if s[1] == "GIVE"] == [1, 3, 4, 5]
    assert {e.phase for e in plan.exchanges()} == {Phase.TAKE, Phase.FEATURES, Phase.GIVE}
    keys = [e.key for e in plan.exchanges()]
    assert keys == sorted(set(keys))


@pytest.mark.parametrize(
    ("mode", "spread"),
    [(mode, mode.kind != "sequential") for mode in MODES] + [(MODES[0], False)],
    ids=str,
)
def test_parties_equal_the_program(mode, spread, monkeypatch, tmp_path):
    """`msjax train`, on one device and on several, against the parties, in every mode."""
    cfg = dataclasses.replace(SMOOTH, mode=mode, out=str(tmp_path))
    arrays = dataset()
    splits = (train.data.Arrays(*arrays[:2]), train.data.Arrays(*arrays[2:]))
    ds = train.data.Dataset("random", *splits, 10, np.float32([0.5]), np.float32([0.25]))
    monkeypatch.setattr(train.data, "load", lambda *args, **options: ds)
    if not spread:
        monkeypatch.setattr(train.simulate, "make_mesh", lambda clients: None)
    job = train.prepare(cfg)
    assert (job.mesh is not None) == spread
    folder = runs.RunFolder.create(cfg, "run")
    summary = train.train(cfg, folder, job=job, quiet=True)
    (state, _), _ = folder.restore((train.prepare(cfg).state, train.simulate.zero_sums(job.mesh)))
    folder.close()

    plan, server, clients, _, first_epoch, _ = finished(mode)
    assert int(state.step) == plan.total_steps
    client = jax.tree.map(lambda leaf: leaf[0], state.client) if plan.averages_halves else state.client
    assert_close(server.state, state.server, 1e-5)
    assert_close(clients[-1].state[:2], client[:2], 1e-5)
    for name, sums, before in (("train", server.train, first_epoch[0]), ("test", server.test, first_epoch[1])):
        last = train.simulate.Sums(*(a - b for a, b in zip(sums, before, strict=True)))
        assert last.means() == pytest.approx(summary[name], rel=1e-5), name

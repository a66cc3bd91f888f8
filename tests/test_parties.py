"""The parties apart compute what the fused program computes, in every mode; and the schedule that they follow."""

import copy
import dataclasses
import functools

import jax
import numpy as np
import pytest

from msjax import compress
from msjax.runs import RunFolder
from msjax.split import parties
from msjax.split.metrics import MetricSums
from msjax.split.modes import Sequential
from msjax.split.schedule import Phase, Schedule
from msjax.training import loop

from .helpers import assert_close
from .setups import MODES, SMALL, SMOOTH, UNEVEN, built, dataset, finished, load_program, make_parties


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parties_train(mode):
    server, clients, exchanges, _, before = finished(mode)
    assert exchanges == list(server.spec.schedule.exchanges())
    after = (server.state.params, clients[-1].state.params)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert all(m > 0 for m in jax.tree.leaves(moved))
    assert server.train.samples == SMALL.epochs * UNEVEN[0]
    assert server.test.samples == SMALL.epochs * UNEVEN[1]
    if mode.kind != "sequential":
        for client in clients[1:]:
            for a, b in zip(jax.tree.leaves(clients[0].state[:2]), jax.tree.leaves(client.state[:2]), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_statistics_that_would_stay_behind_are_refused():
    """Where a part goes from client to client; a counter of each client's own turns would be another."""
    for mode, refused in ((MODES[0], False), (MODES[3], True)):
        run = built(dataclasses.replace(SMALL, mode=mode), 30)
        counting = run.client._replace(stats={"steps": np.int32(0)})
        own = parties.ClientData(dataset().train, dataset().test)
        make = functools.partial(parties.Client, 0, run.spec, counting, own, 0)
        if not refused:
            make().close()
            continue
        with pytest.raises(ValueError, match=r"must be floats where parts are handed on, .* got int32 at 'steps'"):
            make()


def test_a_client_sends_the_labels_as_its_augmentation_left_them():
    client = make_parties(SMALL)[1][0]
    exchange = next(client.exchanges())
    labels = client.send(exchange).labels
    preprocess = dataclasses.replace(client.spec.preprocess, augment=lambda x, y, key: (x, 9 - y))
    client.spec = dataclasses.replace(client.spec, preprocess=preprocess)
    client.begin()
    np.testing.assert_array_equal(client.send(exchange).labels, 9 - labels)
    client.close()


def test_clients_that_encode_with_numpy():
    """U-shaped, where they encode features and gradients."""
    cfg = dataclasses.replace(
        SMALL,
        mode=MODES[1],
        grad_codec=compress.MaskEncoded(ratio=0.9, bits=3, signed=True),
        grad_kept_only=True,
        epochs=1,
    )
    ends = []
    for numpy_encoder in (False, True):
        server, clients = make_parties(cfg, numpy_encoder=numpy_encoder)
        first = next(server.spec.schedule.exchanges())
        sent = [client.send(first) for client in clients]
        assert all(isinstance(leaf, np.ndarray) == numpy_encoder for m in sent for leaf in jax.tree.leaves(m.payload))
        for client in clients:
            client.begin()
        for _ in parties.run(server, clients):
            pass
        ends.append((server.state, server.train, server.test, [client.state for client in clients]))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    with pytest.raises(ValueError, match="codec must not be random to encode with NumPy, got RandK"):
        make_parties(dataclasses.replace(cfg, codec=compress.RandK()), numpy_encoder=True)


@pytest.mark.slow
def test_a_gradient_that_does_not_come():
    """U-shaped: the server's step is that of the clients whose gradients have come, though all sent features."""
    server, clients = make_parties(dataclasses.replace(SMOOTH, mode=MODES[1]))
    features, gradient = list(server.spec.schedule.step_exchanges(0))[:2]
    without = copy.copy(server)  # a server that the last client has sent nothing
    answers = server.handle(features, {c.client_id: c.send(features) for c in clients})
    without.handle(features, {c.client_id: c.send(features) for c in clients[:-1]})
    for client in clients:
        client.receive(features, answers[client.client_id])
    messages = {c.client_id: c.send(gradient) for c in clients[:-1]}
    found, expected = server.handle(gradient, messages), without.handle(gradient, messages)
    # With the momenta: the rate of the first step is 0.
    assert_close((server.state.params, server.state.opt_state), (without.state.params, without.state.opt_state), 1e-5)
    assert_close([m.payload for m in found.values()], [m.payload for m in expected.values()], 1e-5)
    assert found.keys() == messages.keys()


def test_sequential_schedule():
    schedule = Schedule(Sequential(turn_steps=2), 2, 5, 0, 2, 1)
    steps = [(e.step, e.phase.name, e.clients[0]) for e in schedule.exchanges()]
    assert [s for s in steps if s[1] == "FEATURES"] == [
        (0, "FEATURES", 0),
        (1, "FEATURES", 0),
        (2, "FEATURES", 1),
        (3, "FEATURES", 1),
        (4, "FEATURES", 0),
        (5, "FEATURES", 1),
    ]
    positions = [schedule.position(s) for s in range(6)]
    assert [(p.start, p.stop) for p in positions] == [(0, 2), (2, 4), (0, 2), (2, 4), (4, 5), (4, 5)]
    assert [s[0] for s in steps if s[1] == "FETCH_PART"] == [0, 2, 4, 5]
    assert [s[0] for s in steps if s[1] == "RETURN_PART"] == [1, 3, 4, 5]
    assert {e.phase for e in schedule.exchanges()} == {Phase.FETCH_PART, Phase.FEATURES, Phase.RETURN_PART}
    places = [e.position for e in schedule.exchanges()]
    assert places == sorted(set(places))


@pytest.mark.parametrize(
    ("mode", "spread"),
    [
        (MODES[0], True),
        *(pytest.param(mode, mode.kind != "sequential", marks=pytest.mark.slow) for mode in MODES[1:]),
        pytest.param(MODES[0], False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parties_equal_the_program(mode, spread, monkeypatch, tmp_path):
    """`msjax train`, on one device and on several, against the parties, in every mode."""
    cfg = dataclasses.replace(SMOOTH, mode=mode, out=str(tmp_path))
    run = load_program(cfg, monkeypatch, spread=spread)
    folder = RunFolder.create(cfg, "run")
    finished_run = loop.train(run, folder, quiet=True)
    folder.close()

    server, clients, _, first_epoch, _ = finished(mode)
    state, last = finished_run.state, finished_run.history[-1]
    assert int(state.step) == server.spec.schedule.total_steps
    assert_close(server.state, state.server, 1e-5)
    assert_close(clients[-1].state[:2], state.client[:2], 1e-5)
    for name, sums, before in (("train", server.train, first_epoch[0]), ("test", server.test, first_epoch[1])):
        metrics = jax.tree.map(np.subtract, sums.sums, before.sums)
        within = MetricSums(sums.loss - before.loss, sums.samples - before.samples, metrics)
        assert within.means(server.spec.task) == pytest.approx(last[name], rel=1e-5), name

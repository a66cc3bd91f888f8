"""A share of the clients in each round: drawn alike by all, the same numbers in one program and over a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msjax
from msjax import compress, config
from msjax.distributed.membership import Stage
from msjax.split import parties
from msjax.split.modes import Sequential, SplitFed
from msjax.split.schedule import Phase, Schedule
from msjax.split.traffic import run_traffic
from msjax.training import loop

from .network import net
from .setups import SMALL, SMOOTH, UNEVEN, built, load_program, make_parties, tolerance

MODE = config.ModeConfig(kind="splitfed", average_steps=2, client_fraction=0.5)
PART = dataclasses.replace(SMOOTH, mode=MODE)
"""Two of four clients in a round; three steps an epoch, so that its second round has one step."""


def test_rounds_are_drawn_alike_and_fairly():
    mode = SplitFed(10, client_fraction=0.1, seed=3)
    schedule = Schedule(mode, 50, 1000, 0, 10, 20)
    rounds = [schedule.position(step).clients for step in range(0, schedule.total_steps, 10)]
    assert all(len(set(clients)) == 5 and list(clients) == sorted(clients) for clients in rounds)
    assert schedule.position(9).clients == rounds[0] and schedule.position(10).clients == rounds[1]
    other = dataclasses.replace(schedule, mode=dataclasses.replace(mode, seed=4))
    assert [other.position(step).clients for step in range(0, 100, 10)] != rounds[:10]
    # Each is in a tenth of 200 rounds, 20 ± 4.2 of them: five standard deviations.
    counts = np.bincount(np.concatenate(rounds), minlength=50)
    assert counts.sum() == 1000 and abs(counts - 20).max() < 5 * 4.25
    # In `msjax.train` from the run's seed, where the mode has none; without draws it is no part of the mode.
    assert SplitFed(10, client_fraction=0.1).seeded(3) == mode == mode.seeded(4)
    assert SplitFed(10).seeded(3) == SplitFed(10).seeded(4) == SplitFed(10, seed=0)
    assert dataclasses.replace(SplitFed(10), client_fraction=0.1).seeded(3) == mode
    # The numbers that these draws gave when they were first made: parties of unlike versions must agree.
    assert rounds[:2] == [(1, 2, 3, 14, 34), (6, 9, 18, 30, 33)]


def test_a_run_of_ones_own_draws_from_its_seed():
    parts = tuple((lambda p, x: x @ p["w"], {"w": jnp.eye(4)}) for _ in range(2))
    data, options = (np.ones((8, 4), np.float32), np.arange(8) % 4), {"clients": 4, "batch_size": 2, "epochs": 1}
    for seed, own, expected in ((3, None, 3), (3, 1, 1)):
        mode = SplitFed(2, client_fraction=0.5, seed=own)
        result = msjax.train(parts, data, mode=mode, seed=seed, **options)
        assert result.spec.schedule.mode == dataclasses.replace(mode, seed=expected)


def test_the_order_of_exchanges():
    schedule = built(PART, 25).spec.schedule
    first, second = (schedule.position(step).clients for step in (0, 2))
    phases = [(e.step, e.phase, e.clients) for e in schedule.exchanges() if e.step < 3 and e.phase != Phase.TEST]
    assert phases == [
        (0, Phase.FETCH_PART, first),
        (0, Phase.FEATURES, first),
        (1, Phase.FEATURES, first),
        (1, Phase.AVERAGE, first),
        (2, Phase.FETCH_PART, second),
        (2, Phase.FEATURES, second),
        (2, Phase.AVERAGE, second),
    ]
    assert schedule.test_clients_after(0) == second and schedule.test_clients == schedule.position(5).clients
    assert [step for step in range(7) if schedule.may_checkpoint(step, 1)] == [2, 3, 5, 6]
    schedule = dataclasses.replace(schedule, test_samples=0)
    sent = (e for e in schedule.exchanges() if e.phase == Phase.FEATURES)
    by_exchange = sum(len(e.clients) * schedule.batch_size_of(e) for e in sent)
    assert schedule.samples_before(schedule.total_steps) == by_exchange == 2 * schedule.samples * schedule.epochs
    # All clients: the run is what it was.
    whole = built(dataclasses.replace(PART, mode=dataclasses.replace(MODE, client_fraction=1.0)), 25).spec.schedule
    assert whole.mode == SplitFed(2, seed=0) and not any(e.phase == Phase.FETCH_PART for e in whole.exchanges())


NONE, HALF = compress.Identity(), compress.Cast()


@pytest.mark.slow
@pytest.mark.parametrize("update_codec", [NONE, HALF], ids=str)
def test_one_program_equals_the_parties(monkeypatch, update_codec):
    cfg = dataclasses.replace(PART, update_codec=update_codec)
    server, clients = make_parties(cfg, UNEVEN)
    for _ in parties.run(server, clients):
        pass
    run = load_program(cfg, monkeypatch, spread=False)
    result = loop.train(run, quiet=True)
    trained = clients[server.spec.schedule.test_clients[0]].state
    if update_codec == HALF:
        for leaf in jax.tree.leaves(trained.params):
            np.testing.assert_array_equal(leaf, update_codec.roundtrip(leaf))
    # Parties' sums are in another order; where that rounds another way, half precision shows 2⁻⁸ of it.
    most = tolerance(PART.codec) if update_codec != HALF else 2**-7
    for ours, theirs in ((result.state.client, trained), (result.state.server, server.state)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=most, atol=most)
    tested = np.mean([record["test"]["loss"] for record in result.history])
    assert tested == pytest.approx(server.test.means(server.spec.task)["loss"], rel=1e-4)
    assert server.train.samples == SMALL.epochs * 2 * 25 and result.traffic == run_traffic(server.spec, 2)


def assert_equal_to_parties(it):
    """The server, and those who have the trained part, end with the same bits as in one program without a network."""
    it.assert_equal_to_program(it.server.run.schedule.test_clients)


def test_half_precision_halves_the_bytes():
    half, whole = (run_traffic(built(dataclasses.replace(PART, update_codec=c), 25).spec, 2) for c in (HALF, NONE))
    assert 2 * half.uplink_synchronization_bytes == whole.uplink_synchronization_bytes > 0
    assert 2 * half.downlink_synchronization_bytes == whole.downlink_synchronization_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("update_codec", [NONE, HALF], ids=str)
def test_over_a_network_with_faults(tmp_path, update_codec):
    """A client and then the server die, and lose what they had since the last round began; two others lose nothing."""
    cfg = dataclasses.replace(SMALL, mode=MODE, update_codec=update_codec)
    with net(tmp_path, cfg) as it:
        it.start_clients()
        it.run_to(1)
        it.restart(it.server.run.exchange.clients[0])
        it.run_to(3)
        for client in set(range(4)) - set(it.server.run.exchange.clients):
            it.restart(client)
        it.run_to(4)
        assert it.counted("restarts") == 1
        it.kill_server()
        it.start_server()
        it.run()
        assert_equal_to_parties(it)
        assert it.counted("restarts") == 1 and it.epochs == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True])
def test_those_who_come_late_are_let_in(tmp_path, first):
    """Training begins with three of four clients; the fourth takes part from the first round that it is drawn for.

    That may be client 0, whose Ready message the server does not have then to compare others with.
    """

    def rounds(cfg):
        return [built(cfg, 30).spec.schedule.position(step).clients for step in (0, 2, 3, 5, 6, 8)]

    def late_ones(cfg):
        begins, *others = rounds(cfg)
        return [c for c in range(4) if c not in begins and any(c in clients for clients in others)]

    seeds = (dataclasses.replace(SMALL, mode=MODE, epochs=3, seed=seed) for seed in range(20))
    cfg, late = next((cfg, c) for cfg in seeds for c in late_ones(cfg) if (c == 0) == first)
    with net(tmp_path, cfg, stragglers="drop", start_clients=3) as it:
        for client in range(4):
            if client != late:
                it.start_client(client)
        it.loop.run(lambda: bool(it.order))
        assert it.server.membership.stage is Stage.COLLECTING and late not in it.server.membership.active
        it.start_client(late)
        it.run()
        assert_equal_to_parties(it)  # as it was there in time for its first round
        assert late in it.server.membership.active


def test_what_does_not_go_with_a_share():
    with pytest.raises(
        ValueError, match=r"mode.client_fraction must be 1.0 where mode.kind is not 'splitfed', got 0.5"
    ):
        config.Config(mode=config.ModeConfig(client_fraction=0.5))
    for value in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"mode\.client_fraction must be above 0 and at most 1, got"):
            config.Config(mode=config.ModeConfig(kind="splitfed", client_fraction=value))
        with pytest.raises(ValueError, match="client_fraction must be above 0 and at most 1, got"):
            SplitFed(client_fraction=value)
    with pytest.raises(ValueError, match=r"must be Identity\(\) or a Cast .* a client_fraction below 1, .* got TopK"):
        built(dataclasses.replace(PART, update_codec=compress.TopK(ratio=0.5)), 25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitFed(average_steps=2.5), r"average_steps must be an integer of at least 1, got 2\.5"),
        (lambda: SplitFed(average_steps=0), "average_steps must be an integer of at least 1, got 0"),
        (lambda: SplitFed(seed=-1), "seed must be an integer of at least 0, got -1"),
        (lambda: SplitFed(client_fraction="a"), "client_fraction must be above 0 and at most 1, got 'a'"),
        (lambda: Sequential(turn_steps=1.5), r"turn_steps must be an integer of at least 1, got 1\.5"),
    ],
)
def test_modes_take_the_numbers_that_they_need(unchecked, make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert repr(SplitFed(np.int64(5), np.float32(0.1))) == repr(SplitFed(5, 0.1))
    assert Sequential(np.int64(2)) == Sequential(2) and type(Sequential(np.int64(2)).turn_steps) is int


@pytest.mark.parametrize("kind, refused", [("sgd", False), ("adamw", True)])
def test_squares_of_gradients_do_not_travel_as_float16(kind, refused):
    optim = config.OptimConfig(kind=kind)
    cfg = dataclasses.replace(PART, optim=optim, update_codec=compress.Cast("float16"))
    assert built(dataclasses.replace(cfg, update_codec=compress.Cast()), 25)
    if refused:
        with pytest.raises(
            ValueError, match=r"update_codec must not be of float16 .* \(nu\): .* got Cast\(dtype='float16'"
        ):
            built(cfg, 25)
    else:
        assert built(cfg, 25)

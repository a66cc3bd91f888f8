"""Who takes part where a share of the clients does in each round: quorum, and those who come late."""

import dataclasses

import pytest

from msjax import config
from msjax.distributed import actions as do
from msjax.distributed.events import Entrance, ExchangeInfo
from msjax.distributed.membership import Policy, Stage
from msjax.distributed.server_run import _info
from msjax.split.schedule import Phase

from .membership_run import AVERAGE, FEATURES, TAKE, Run
from .setups import SMALL, built


def rounds_of(*drawn):
    """One step a round: each fetches the part, trains and averages."""
    found = []
    for step, clients in enumerate(drawn):
        drawn_for = {"rounds": True, "turn": clients}
        found.append(ExchangeInfo((step, TAKE), step, clients, Entrance.FREE, **drawn_for))
        found += [ExchangeInfo((step, phase), step, clients, **drawn_for) for phase in (FEATURES, AVERAGE)]
    return found


def run_of(*drawn, clients=4, **policy):
    run = Run(clients=clients, steps=len(drawn), **{"stragglers": "drop", **policy})
    run.exchanges = rounds_of(*drawn)
    return run


def of(said, kind):
    return [action for action in said if isinstance(action, kind)]


def test_only_those_of_the_round_are_waited_for():
    run = run_of((0, 1), (2, 3)).begin()
    run.send(2, 3, key=(1, TAKE))  # those of the next round ask early
    for _ in range(3):
        assert of(run.send(0, 1), do.Advance)[0].clients == (0, 1)
    assert run.state.exchange.key == (1, FEATURES) and run.state.active == (0, 1, 2, 3)


def test_a_round_needs_its_quorum():
    run = run_of((0, 1, 2), (1, 2, 3), min_clients=2).begin()
    run.send(0)
    said = run.wait(10.0)
    assert not of(said, do.Advance) and "step 0 waits for clients [1, 2]" in of(said, do.Warn)[0].text
    said = run.send(1)
    assert not of(said, do.Advance)
    assert of(run.wait(10.0), do.Advance)[0].clients == (0, 1) and run.state.active == (0, 1, 3)


def test_a_round_that_lacks_its_quorum_waits_for_those_who_come_back():
    run = run_of((0, 1), (1, 2), min_clients=2, start_clients=3)
    for client in (0, 1, 3):
        run.come(client)
    for _ in range(3):
        run.send(0, 1)
    assert run.state.exchange.key == (1, TAKE) and run.state.active == (0, 1, 3)
    run.send(1)
    said = run.wait(10.0)
    assert not of(said, do.Advance) and not of(said, do.CountStragglers)
    assert "step 1 waits for clients [2]" in of(said, do.Warn)[0].text
    assert of(run.come(2), do.StartClient)[-1].step == 1
    assert of(run.send(2), do.Advance)[0].clients == (1, 2)


def test_a_round_is_not_left_below_its_quorum_by_those_that_lost_their_memory():
    run = run_of((0, 1, 2), (1, 2, 3), min_clients=2).begin().go_to((0, AVERAGE))
    assert not of(run.crash(0), do.RestoreCheckpoint) and run.state.active == (1, 2, 3)
    said = run.crash(1)
    assert of(said, do.RestoreCheckpoint) and run.state.exchange.key == (0, TAKE)
    assert [start.client for start in of(said, do.StartClient)] == [0, 1, 2, 3]
    for _ in range(3):
        assert of(run.send(0, 1, 2), do.Advance)[0].clients == (0, 1, 2)


@pytest.mark.parametrize("stragglers", ["drop", "wait"])
def test_who_dies_before_it_is_handed_the_part_is_handed_it_again(stragglers):
    run = run_of((0, 1), (1, 2), min_clients=2, stragglers=stragglers).begin().go_to((1, TAKE))
    run.send(1)
    said = run.crash(1)
    assert not of(said, do.RestoreCheckpoint) and [(a.client, a.step) for a in of(said, do.StartClient)] == [(1, 1)]
    assert not of(run.send(2), do.Advance)  # it asks once more
    assert of(run.send(1), do.Advance)[0].clients == (1, 2)


@pytest.mark.parametrize("stragglers", ["drop", "wait"])
def test_nobody_goes_back_for_one_that_waits_for_its_round(stragglers):
    """It keeps nothing between rounds, also where it has asked early for the part of its next."""
    run = run_of((0, 3), (0, 1), (2, 3), stragglers=stragglers, min_clients=4).begin().go_to((1, FEATURES))
    run.send(3, key=(2, TAKE))
    for client, step in ((2, 0), (3, 1), (3, 1)):  # client 2 has not been in a round yet
        assert [(a.client, a.step) for a in of(run.crash(client), do.StartClient)] == [(client, step)]
    assert run.state.active == (0, 1, 2, 3)
    run.go_to((2, TAKE))
    assert [(a.client, a.step) for a in of(run.crash(3), do.StartClient)] == [(3, 2)]
    run.go_to((2, FEATURES))
    assert len(of(run.log, do.RestoreCheckpoint)) == 1
    assert of(run.crash(3), do.RestoreCheckpoint)  # now it had something


def test_whose_part_counts():
    fraction = config.ModeConfig(kind="splitfed", average_steps=2, client_fraction=0.5)
    for mode in (fraction, config.ModeConfig(kind="sequential"), config.ModeConfig()):
        schedule = built(dataclasses.replace(SMALL, mode=mode), 20).spec.schedule
        for exchange in schedule.exchanges():
            turn, last = _info(schedule, exchange).turn, _info(schedule, exchange, 3).turn
            if mode.kind == "parallel":
                assert turn is None and last is None
            else:
                assert set(exchange.clients) <= set(turn) < set(range(4)) and last == (*turn, 3)


def test_the_quorum_counts_in_all_exchanges_of_a_round_but_not_in_tests():
    mode = config.ModeConfig(kind="splitfed", average_steps=2, client_fraction=0.5, tail_cut="last")
    schedule = built(dataclasses.replace(SMALL, mode=mode), 20).spec.schedule
    rounds = {exchange.phase: _info(schedule, exchange).rounds for exchange in schedule.exchanges()}
    trains = [Phase.FETCH_PART, Phase.FEATURES, Phase.GRADIENT, Phase.AVERAGE]
    assert rounds == {phase: phase in trains for phase in [*trains, Phase.TEST, Phase.RESULT]}


@pytest.mark.parametrize("kind", ["parallel", "turns"])
def test_training_begins_with_as_many_as_are_asked_for(kind):
    run = Run(kind, clients=3, stragglers="drop", start_clients=2)
    assert do.Inform("client 0 is ready; training waits for 1 of clients [1, 2]") in run.come(0)
    (said,) = of(run.wait(10.0), do.Warn)
    assert said.text == (
        "training waits for 1 of clients [1, 2] to be ready: start those that do not run, or give policy.start_clients"
    )
    assert run.stage is Stage.GATHERING
    assert of(run.come(2), do.RestoreCheckpoint) and run.state.active == (0, 2)
    # The third comes later: where it is handed a part, or another's is brought for it.
    said = run.come(1)
    while not of(said, do.StartClient):
        here = [c for c in run.state.exchange.clients if c != 1]
        said = run.send(*here, part=True) if here else run.wait(0.0)
    assert of(said, do.StartClient)[0].client == 1 and 1 in run.state.active


def test_a_policy_that_cannot_work():
    with pytest.raises(ValueError, match="start_clients must be at least 1, or None, got 0"):
        Policy(start_clients=0)
    assert dataclasses.replace(Policy(), start_clients=3).start_clients == 3

"""Clients that are late, dropped and let in again, over lines in memory on a clock of their own."""

import dataclasses

import jax
import numpy as np
import pytest

from msjax.distributed import messages
from msjax.distributed.coordinator import Stopped
from msjax.distributed.server_program import record_of_test
from msjax.split.metrics import MetricSums
from msjax.split.payloads import payload_vector
from msjax.split.schedule import Phase
from msjax.split.traffic import exchange_traffic, run_traffic

from .network import net
from .setups import MODES, SMALL, built

pytestmark = pytest.mark.usefixtures("built_once")


@pytest.mark.slow
def test_straggler_stops_the_run(tmp_path):
    with net(tmp_path, SMALL, deadline_seconds=1.0, stragglers="stop") as it:
        it.silence(2, step=3)
        it.start_clients().run()
        assert isinstance(it.failures["server"], Stopped) and "[2]" in str(it.failures["server"])
        told = "the server stopped: clients [2] did not answer within 1.0 s, and policy.stragglers is stop"
        assert {str(it.failures[c]) for c in range(4)} == {told}


@pytest.mark.parametrize("policy", [{"stragglers": "wait"}, {"stragglers": "drop", "min_clients": 4}], ids=str)
def test_straggler_is_waited_for(tmp_path, policy, caplog):
    with net(tmp_path, SMALL, deadline_seconds=0.2, **policy) as it:
        it.delay(2, 1.0, step=2)
        it.start_clients().run()
        it.assert_equal_to_program()
        assert it.counted("stragglers") == 4
    why = ", as policy.min_clients is 4" if "min_clients" in policy else ""
    assert f"step 2 waits for clients [2]{why}" in caplog.messages


@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[0], MODES[2], MODES[3]], ids=str)
def test_dropped_straggler_comes_back(tmp_path, mode):
    """The others go on without it; when it is back it takes part again, with the others' part."""
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=4 if mode.kind == "sequential" else 5)
    turns = mode.kind == "sequential"
    with net(tmp_path, cfg, latency=0.5, checkpoint_steps=1000, deadline_seconds=2.0, stragglers="drop") as it:
        it.start_clients()
        it.run_to(2)
        it.kill(2)
        it.run_to(2 + (20 if turns else 6))
        it.start_client(2)
        if not turns:  # the first that is asked for its part dies of it, and comes back, too
            it.loop.run(lambda: it.server.membership.donor is not None)
            it.restart(it.server.membership.donor)
        it.run()
        assert not it.failures, it.failures
        assert it.epochs == list(range(1, cfg.epochs + 1)) and it.counted("restarts") == 0
        assert it.counted("stragglers") == 1
        if not turns:
            jax.tree.map(np.testing.assert_array_equal, *(it.finals[c].state[:2] for c in (0, 2)))


def with_nan(part, spec):
    """The bytes of a part whose numbers are NaN."""
    spoilt = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), messages.decode_part(part, spec))
    return messages.encode_part(spoilt, spec, None)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(lambda part, spec: part[:-1], "message"), (with_nan, "what a client sends must be finite, got nan")],
    ids=["cut", "NaN"],
)
def test_a_part_that_is_none_meets_its_sender_alone(tmp_path, spoil, says):
    """Who comes back gets that of another client. A part that nobody has asked for is no part."""
    asked = []

    def rule(direction, client, message):
        if direction == "up" and message.WhichOneof("kind") == "request":
            if message.request.part and not asked:
                asked.append(client)
                message.request.part = spoil(message.request.part, it.server.run.spec)
            elif client == 3 and client != it.server.membership.donor:
                message.request.part = b"unasked"
        return None

    with net(tmp_path, SMALL, latency=0.5, checkpoint_steps=1000, deadline_seconds=2.0, stragglers="drop") as it:
        it.disturb(rule)
        it.start_clients()
        it.run_to(1)
        it.kill(2)
        it.run_to(2)
        it.start_client(2)
        it.run()
        assert asked == [0] and says in str(it.failures.pop(0)) and not it.failures
        assert 2 in it.finals and it.counted("refused") == 1


def test_bytes_are_those_of_the_clients_that_took_part(tmp_path):
    """And not of those that were to: client 2 is away from step 2 on. What is done again is counted once."""
    with net(tmp_path, SMALL, deadline_seconds=2.0, stragglers="drop") as it:
        it.start_clients()
        it.silence(2, step=2)
        it.loop.run(lambda: it.loop.server is None)
        run = it.server.run
        exchanges = list(run.schedule.exchanges())
        without = [e._replace(clients=tuple(c for c in e.clients if c != 2 or e.step < 2)) for e in exchanges]
        assert run.traffic == exchange_traffic(run.spec, without)
        assert 0 < run.traffic.uplink_bytes < run_traffic(run.spec, SMALL.epochs).uplink_bytes
    with net(tmp_path, SMALL) as it:
        it.start_clients()
        it.run_to(3)
        it.kill_server()
        it.start_server()
        it.run()
        assert it.server.run.traffic == run_traffic(it.server.run.spec, SMALL.epochs)


def compiling(it):
    """A rule: what a process has not done before takes it 9 seconds."""
    said = {}  # of each process: between which phases and batches it has computed

    def rule(direction, client, message):
        if direction != "up" or message.WhichOneof("kind") != "request":
            return None
        position = message.request.position
        last, compiled = said.get((client, it.instances[client]), (None, set()))
        kind = position.phase, position.test_round, sum(map(len, message.request.labels))
        said[client, it.instances[client]] = kind, compiled | {(last, kind)}
        return None if (last, kind) in compiled else (9.0,)

    return rule


@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[2], marks=pytest.mark.slow)], ids=str)
def test_a_client_that_comes_back_is_not_dropped_for_compiling(tmp_path, mode):
    """What every process takes 9 seconds to compile, all at the start, this one later: the deadline is of 2 seconds."""
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=6)
    with net(tmp_path, cfg, checkpoint_steps=1000, deadline_seconds=2.0, stragglers="drop") as it:
        it.disturb(compiling(it))
        it.start_clients()
        it.run_to(4)
        it.kill(2)
        it.run_to(6)
        it.start_client(2)
        it.run()
        assert not it.failures, it.failures
        assert it.counted("stragglers") == 1 and it.server.membership.active == (0, 1, 2, 3)


@pytest.mark.parametrize("told", [True, False])
def test_a_server_that_is_started_again_knows_how_long_compiling_takes(tmp_path, told):
    """Its clients have compiled already, but for one that comes back: else that would be late each time."""
    cfg = dataclasses.replace(SMALL, epochs=6)
    with net(tmp_path, cfg, checkpoint_steps=4, deadline_seconds=2.0, stragglers="drop") as it:
        it.disturb(compiling(it))
        it.start_clients()
        it.run_to(5)
        learned = it.server.membership.first_seconds
        assert learned and it.stores["server"].latest() == 4
        it.kill_server()
        it.kill(2)
        it.start_server(first_seconds=learned if told else ())
        it.start_client(2)
        it.run()
        assert "server" not in it.failures
        assert (it.counted("stragglers") == 0) == told
        if told:
            it.assert_equal_to_program()


@pytest.mark.slow
def test_a_straggler_whose_line_is_open_is_dropped_once(tmp_path):
    """Nothing comes from it any more, so it is not let in again: each time would cost the others a deadline."""
    with net(tmp_path, SMALL, deadline_seconds=2.0, stragglers="drop") as it:
        it.silence(2, step=2)
        it.start_clients()
        it.loop.run(lambda: it.loop.server is None)
        assert it.counted("stragglers") == 1


@pytest.mark.slow
def test_dropped_client_comes_back_where_every_step_ends_with_a_test(tmp_path):
    """Its part comes with the features, not with what is tested before them."""
    cfg = dataclasses.replace(SMALL, batch_size=30, epochs=6)
    with net(tmp_path, cfg, latency=0.5, checkpoint_steps=1000, deadline_seconds=2.0, stragglers="drop") as it:
        it.delay(2, 5.0, step=1)
        it.start_clients().run()
        assert not it.failures, it.failures
        assert it.server.membership.active == (0, 1, 2, 3) and it.counted("stragglers") == 1


@pytest.mark.slow
def test_first_in_turn_is_dropped_before_it_gives_a_part(tmp_path):
    """The next then begins as the first would have, with the part that all draw from the seed."""
    cfg = dataclasses.replace(SMALL, mode=MODES[3])
    with net(tmp_path, cfg, deadline_seconds=5.0, stragglers="drop") as it:
        it.silence(0, step=1)
        it.start_clients()
        it.run_to(4)
        assert it.counted("stragglers") == 1 and it.server.membership.active == (1, 2, 3)
        assert {0, 1} <= {step for _, (step, *_) in it.order} and not it.failures
        # A checkpoint has the part that goes round, or there is none.
        assert all(part is not None for _, _, part, _ in it.saved["server"].values())
        it.loop.stop("enough")
        it.run()
        assert str(it.failures["server"]) == "enough"


@pytest.mark.slow
def test_dropped_from_its_turn(tmp_path):
    """It comes back for its next. After its last it hears of the end: the last client lacks the trained part then."""
    cfg = dataclasses.replace(SMALL, mode=MODES[3])
    with net(tmp_path, cfg, latency=0.1, checkpoint_steps=1000, deadline_seconds=3.0, stragglers="drop") as it:
        for client, step in ((0, 1), (1, 15), (3, 21)):
            it.delay(client, 4.0, step=step, phase=Phase.FEATURES)
        it.start_clients().run()
        assert str(it.failures.pop(3)).endswith("its part is not the trained one")
        assert not it.failures, it.failures
        assert it.counted("stragglers") == 3  # each once


@pytest.mark.slow
def test_dropped_between_features_and_gradient(tmp_path):
    """U-shaped, where the server waits for its gradient with the features of all."""
    cfg = dataclasses.replace(SMALL, mode=MODES[1])
    with net(tmp_path, cfg, latency=0.5, checkpoint_steps=1000, deadline_seconds=2.0, stragglers="drop") as it:
        it.delay(1, 5.0, step=2, phase=Phase.GRADIENT)
        it.start_clients().run()
        assert "server" not in it.failures
        assert it.counted("stragglers") == 1 and it.epochs == [1, 2]


@pytest.mark.slow
def test_a_client_that_was_let_in_after_the_checkpoint_survives_going_back_to_it(tmp_path):
    """It has no checkpoint of that step, and is let in again."""
    cfg = dataclasses.replace(SMALL, epochs=4)
    with net(
        tmp_path, cfg, latency=0.5, deadline_seconds=2.0, stragglers="drop", min_clients=3, checkpoint_steps=4
    ) as it:
        it.delay(2, 4.0, step=3)
        it.start_clients()
        it.run_to(5)
        assert len(it.server.membership.active) == 4
        assert it.stores["server"].latest() == 4 and 4 not in it.stores[2].steps()
        for client in (0, 1):
            it.restart(client)
        it.run()
        assert not it.failures, it.failures
        assert it.counted("restarts") == 1 and it.server.membership.active == (0, 1, 2, 3)


@pytest.mark.parametrize("lost", [None, "the first"])
def test_in_turns_the_client_that_trained_last_keeps_the_part(tmp_path, lost):
    """Though the last by number is away; nobody else says that it has the trained part.

    Also where what it is told of the end is lost the first time, so that it hears of it when all is over.
    """

    def lose(direction, client, message):
        ends = direction == "down" and client == 2 and message.WhichOneof("kind") == "finished"
        return () if ends and not message.finished.over else None

    cfg = dataclasses.replace(SMALL, mode=MODES[3], epochs=1)
    with net(tmp_path, cfg, deadline_seconds=2.0, stragglers="drop") as it:
        if lost:
            it.disturb(lose)
        it.start_clients()
        it.run_to(1)
        it.kill(3)
        it.loop.run(lambda: it.loop.server is None)
        it.run(2)
        assert [c for c in range(3) if it.finals[c].keeps_result] == [2]
        np.testing.assert_array_equal(payload_vector(it.finals[2].part()), it.server.run.party.part_in_transit)


@pytest.mark.parametrize("restarted", [False, True])
def test_in_turns_the_last_one_goes_on_with_what_it_handed_on_where_a_server_comes_again(tmp_path, restarted):
    """It keeps nothing of its own between turns, and the one behind it does not come back."""
    cfg = dataclasses.replace(SMALL, mode=MODES[3], epochs=1)
    policy = {"deadline_seconds": 2.0, "stragglers": "drop", "start_clients": 3}
    with net(tmp_path, cfg, checkpoint_steps=8, **policy) as it:
        it.start_clients()
        it.run_to(10)
        assert it.stores["server"].latest() == 9
        it.kill_server()
        it.kill(3)
        if restarted:
            it.restart(2)
        it.start_server()
        it.loop.run(lambda: it.loop.server is None)
        it.run(2)
        assert not it.failures, it.failures
        handed_on = it.server.run.party.part_in_transit
        assert [c for c in range(3) if it.finals[c].keeps_result] == [2]
        np.testing.assert_array_equal(payload_vector(it.finals[2].part()), handed_on)


def test_one_whose_turns_are_over_does_not_take_a_server_that_is_away_for_the_end(tmp_path):
    cfg = dataclasses.replace(SMALL, mode=MODES[3], epochs=1)
    with net(tmp_path, cfg) as it:
        it.start_clients()
        it.run_to(4)
        it.kill_server()
        it.run(0, 1)
        for client in (0, 1):
            assert "the server has been away, or turned this client away, for" in str(it.failures[client])


def test_who_was_dropped_in_the_last_test_still_keeps_the_part(tmp_path, caplog):
    late = []

    def rule(direction, client, message):
        if direction == "down" or client != 3 or message.WhichOneof("kind") != "request" or late:
            return None
        late.extend([True] if message.request.position.phase == Phase.TEST else [])
        return (4.0,) if late else None

    cfg = dataclasses.replace(SMALL, mode=MODES[3], epochs=1)
    with net(tmp_path, cfg, latency=0.1, deadline_seconds=3.0, stragglers="drop") as it:
        it.disturb(rule)
        it.start_clients().run()
        assert late and not it.failures and it.finals[3].keeps_result
    assert "goes on without clients [3]" in caplog.text and "nobody may have" not in caplog.text


def test_where_nobody_has_the_trained_part_the_server_says_so(tmp_path, caplog):
    cfg = dataclasses.replace(SMALL, mode=MODES[3], epochs=1)
    with net(tmp_path, cfg, deadline_seconds=2.0, stragglers="drop") as it:
        it.start_clients()
        it.run_to(1)
        it.kill(3)
        it.run_to(9)
        it.kill(2)
        it.loop.run(lambda: it.loop.server is None)
    assert "nobody may have the trained part: clients [2] had it, and went away" in caplog.text


def test_a_test_that_lacks_the_share_of_those_who_are_away_says_so(caplog):
    spec = built(SMALL, 30, 40).spec
    sums = MetricSums(6.0, 30, {name: np.int32([3, 30]) for name in spec.metric_sums_like})
    record = record_of_test(sums, spec, 1)
    assert record["test_samples"] == 30 and record["test"]["top1_percent"] == 10.0
    assert "the test after epoch 2 is of 30 of 40 samples, as clients are away" in caplog.text
    whole = record_of_test(sums._replace(samples=40), spec, 1)
    assert "test_samples" not in whole and len(caplog.records) == 1
    assert record_of_test(MetricSums(), spec, 1) == {"test_samples": 0}

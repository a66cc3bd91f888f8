"""Over lines in memory: the same bits as in one program, in every mode, and whatever goes wrong on the way."""

import collections
import contextlib
import dataclasses
import itertools
import queue
import re

import numpy as np
import pytest

from msjax import compress, config
from msjax.distributed import messages
from msjax.distributed.channel import Close, Handled, Lost, Received, Stop
from msjax.distributed.coordinator import Stopped
from msjax.distributed.drive import linger
from msjax.distributed.membership import Policy, Stage
from msjax.distributed.rpc import split_pb2 as pb
from msjax.split.schedule import Phase

from .memory_network import Clock
from .network import RUN, net
from .setups import MODES, SLOW_BUT_FIRST, SMALL

pytestmark = pytest.mark.usefixtures("built_once")


@pytest.mark.parametrize("mode", SLOW_BUT_FIRST, ids=str)
def test_network_equals_one_program(tmp_path, mode):
    cfg = dataclasses.replace(SMALL, mode=mode, grad_codec=compress.StochasticUniform(bits=8))
    if mode in MODES[1:3]:  # and what only some runs have
        cfg = dataclasses.replace(cfg, codec=compress.TopK(ratio=0.9), grad_kept_only=True, eval_compressed=False)
    with net(tmp_path, cfg) as it:
        it.start_clients().run()
        it.assert_equal_to_program()
        assert it.server.run._initial is None  # there has been a checkpoint
        text = it.metrics.text()
        assert "msjax_received_bytes_total" in text and it.counted("restarts") == 0


@pytest.mark.slow
def test_messages_that_are_coded_without_loss_are_counted_as_sent(tmp_path):
    model = dataclasses.replace(SMALL.model, width=1.0)
    cfg = dataclasses.replace(SMALL, model=model, codec=compress.TopK(ratio=0.99), epochs=1)
    with net(tmp_path, cfg) as it:
        for client in range(cfg.clients):
            it.start_client(client, compression="all")
        it.run()
        assert not it.failures, it.failures
        plain, coded = it.server.run.traffic, it.server.run.coded_bytes()
        assert 0 < coded["coded_uplink_bytes"] < plain.uplink_feature_bytes
        assert coded["coded_downlink_bytes"] > plain.downlink_gradient_bytes  # not coded, and with headers


@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[1], MODES[3]], ids=str)
def test_client_that_lost_its_memory(tmp_path, mode):
    """A client dies and starts anew from its checkpoints: all go back to them, and the result is the same.

    So they do where it could be dropped, but too few would be left; and, where there is no checkpoint, to the start.
    But not where it waits for its turn, as in sequential mode in step 9.
    """
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=3)
    policy = {"stragglers": "drop", "min_clients": cfg.clients}
    turns = mode.kind == "sequential"
    with net(tmp_path, cfg, checkpoint_steps=1000 if turns else 2, disk=not turns, **policy) as it:
        it.start_clients()
        for step in (9, 17) if turns else (3, 5):
            it.run_to(step)
            it.restart(1)
        it.run()
        it.assert_equal_to_program()
        assert it.counted("restarts") == (1 if turns else 2) and it.epochs == [1, 2, 3]
    if turns:
        return
    # Another run of clients that have checkpoints of the first one is none the wiser.
    (tmp_path / "server").rename(tmp_path / "first")
    cfg = dataclasses.replace(cfg, seed=1)
    with net(tmp_path, cfg, run="0" * 31 + "2", disk=True) as it:
        it.start_clients()
        it.run_to(5)
        it.restart(1)
        it.run()
        it.assert_equal_to_program()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=str)
def test_server_that_died(tmp_path, mode):
    """The server comes back from its last checkpoint, and the clients go back to it."""
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=3)
    with net(tmp_path, cfg) as it:
        it.start_clients()
        it.run_to(6)
        it.kill_server()
        away = it.clock() + 60.0
        it.loop.run(lambda: it.clock() > away)
        it.start_server()
        it.run()
        it.assert_equal_to_program()
        assert it.epochs == [1, 2, 3]


@pytest.mark.slow
def test_everyone_died(tmp_path):
    """Server and clients come back, the clients in another order, and go on from the last checkpoint."""
    cfg = dataclasses.replace(SMALL, mode=MODES[1], epochs=3)
    with net(tmp_path, cfg, disk=True) as it:
        it.start_clients()
        it.run_to(6)
        for client in range(cfg.clients):
            it.stores[client].wait()  # so that the server is told that they have one of this step
        it.run_to(7)
        it.stores["server"].wait()
        it.kill_server()
        for client in range(cfg.clients):
            it.kill(client)
        it.start_server()
        for client in reversed(range(cfg.clients)):
            it.start_client(client)
        it.run()
        it.assert_equal_to_program()
        assert min(step for generation, (step, *_) in it.order if generation == it.order[-1][0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[1::2], ids=str)
def test_lost_doubled_and_late_messages(tmp_path, mode):
    """Requests are lost, doubled and slow, copies come out of order over later connections, answers are lost."""
    cfg = dataclasses.replace(SMALL, mode=mode)
    rng, said, happened = np.random.default_rng(0), [], collections.Counter()
    with net(tmp_path, cfg) as it:

        def rule(direction, client, message):
            draw = rng.random()
            if message.WhichOneof("kind") == "answer":
                happened["lost answer"] += draw < 0.05
                return () if draw < 0.05 else (draw,)
            if message.WhichOneof("kind") != "request":
                return None
            said.append((client, message))
            kind = "lost" if draw < 0.1 else "old copy" if draw < 0.3 else "doubled" if draw > 0.8 else "late"
            happened[kind] += 1
            if kind == "old copy":
                it.network.inject(*said[rng.integers(len(said))])
            return {"lost": (), "doubled": (draw, 2 * draw)}.get(kind, (draw,))

        it.disturb(rule)
        it.start_clients()
        it.run()
        it.assert_equal_to_program()
        assert it.counted("restarts") == 0
    assert len(happened) == 5 and min(happened.values()) > 0, happened


@pytest.mark.slow
def test_line_that_is_cut(tmp_path):
    """Of all clients, again and again: nobody goes back to a checkpoint, as nobody has forgotten anything.

    It makes no difference which end notices first.
    """
    cfg = dataclasses.replace(SMALL, epochs=4)
    with net(tmp_path, cfg) as it:
        it.start_clients()
        for step, late in ((2, {}), (5, {"server_notices_after": 40.0}), (8, {"client_notices_after": 40.0})):
            it.run_to(step)
            it.cut(**late)
        it.run()
        it.assert_equal_to_program()
        assert it.counted("restarts") == 0


@pytest.mark.slow
def test_first_connection_is_cut_before_the_start_is_heard(tmp_path):
    """Nobody goes back for that: there is nothing to go back from."""
    with net(tmp_path, SMALL, stragglers="drop") as it:
        it.start_clients()
        it.loop.run(lambda: it.server.run is not None)
        it.cut()
        it.run()
        it.assert_equal_to_program()
        assert it.counted("restarts") == it.counted("stragglers") == 0


@pytest.mark.slow
def test_last_answer_is_lost(tmp_path, caplog):
    """By two clients. One comes back for it, and gets it though training has ended; the other is not waited for.

    A third dies before it hears of the end, and is started again: it has its part.
    """
    cfg = dataclasses.replace(SMALL, mode=MODES[1])
    with net(tmp_path, cfg, deadline_seconds=10.0) as it:
        it.start_clients()
        it.loop.run(lambda: it.server.membership.stage is Stage.ENDING)
        it.cut(1)
        it.kill(2)
        third = it.loop.clients[3].run
        it.loop.run(lambda: third.done)
        it.restart(3)
        it.run()
        assert "clients [2] did not say that they have kept their parts" in caplog.text
        it.finals[2] = it.finals[3]
        it.assert_equal_to_program()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [MODES[1], MODES[3]], ids=str)
def test_one_that_dies_after_the_last_step_goes_back_with_all(tmp_path, mode):
    """It is the one with the result, and has but a checkpoint of an earlier step; the others have kept theirs.

    In turns the server has its part, and nobody has to go back.
    """
    cfg = dataclasses.replace(SMALL, mode=mode)
    with net(tmp_path, cfg, deadline_seconds=10.0) as it:
        it.start_clients()
        it.loop.run(lambda: it.server.membership.stage is Stage.ENDING)
        last = it.server.run.schedule.test_clients[-1]
        it.kill(last)
        others = [c for c in range(cfg.clients) if c != last]
        it.loop.run(lambda: all(it.server.membership.clients[c].goodbye for c in others))
        it.start_client(last)
        it.run()
        assert it.counted("restarts") == (mode == MODES[1])
        it.assert_equal_to_program()


@pytest.mark.slow
def test_one_that_dies_before_its_last_answer_says_so_where_others_have_gone(tmp_path):
    """All that it has is a checkpoint of an earlier step, and there is nobody left to train with."""
    cfg = dataclasses.replace(SMALL, mode=MODES[1])
    with net(tmp_path, cfg, deadline_seconds=10.0) as it:
        it.start_clients()
        it.loop.run(lambda: it.server.membership.stage is Stage.ENDING)
        it.kill(2)
        it.loop.run(lambda: it.server.membership.clients[3].goodbye)
        it.kill(3)
        it.start_client(2)
        it.run()
        assert str(it.failures.pop(2)).startswith(
            "the run has ended, and this client has no checkpoint of its last step"
        )
        it.finals[2] = it.finals[3]
        it.assert_equal_to_program()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lines", "server"])
def test_lines_that_are_cut_or_a_server_that_dies_after_the_last_step(tmp_path, fault):
    """One client has kept its part, and another died before it could: both are there again, and so is its part."""
    cfg = dataclasses.replace(SMALL, mode=MODES[1])
    with net(tmp_path, cfg) as it:
        it.start_clients()
        it.loop.run(lambda: it.server.membership.stage is Stage.ENDING)
        it.kill(2)
        it.loop.run(lambda: it.server.membership.clients[3].goodbye)
        if fault == "server":
            it.kill_server()
            it.start_server()
        else:
            it.cut(0, 1, 3)
        it.start_client(2)
        it.run()
        it.assert_equal_to_program()


@pytest.mark.slow
def test_full_disks(tmp_path, monkeypatch):
    """Checkpoints that cannot be written are missed, and nothing else."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with net(tmp_path, SMALL, disk=True) as it:
        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        it.start_clients().run()
        it.assert_equal_to_program()
        assert it.counted("failed_saves") > 0 and it.stores["server"].latest() is None


ROUNDS = config.ModeConfig(kind="splitfed", average_steps=2, client_fraction=0.5)
COMPRESSED = compress.EntropyMask(signed=True, bits=2.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"update_codec": COMPRESSED},
        *(pytest.param({"mode": mode}, marks=pytest.mark.slow) for mode in (*MODES[1:], ROUNDS)),
        pytest.param({"mode": MODES[2], "update_codec": COMPRESSED}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_of_more_epochs_than_it_had_is_one_that_had_them(tmp_path, fields):
    """All parties go on from the end, where each has a checkpoint."""
    optim = config.OptimConfig(learning_rate=0.01, schedule="constant")
    with net(tmp_path, dataclasses.replace(SMALL, epochs=1, optim=optim, **fields)) as it:
        it.start_clients().run()
        assert not it.failures
        run, active = it.server.run, list(it.server.membership.active)
        store, schedule = it.stores["server"], run.schedule
        store.save(schedule.total_steps, store.hold(run.party), checkpoint_clients=active)  # as `ServerProgram` does
        it.kill_server()
        it.finals.clear()
        it.cfg = dataclasses.replace(it.cfg, epochs=2)
        it.start_server(samples=(schedule.samples, schedule.test_samples))
        it.start_clients().run()
        positions = [position for _, position in it.order]
        assert it.epochs == [1, 2] and len(set(positions)) == len(positions)  # nothing is done twice
        it.assert_equal_to_program()


@pytest.mark.parametrize("step", [1, 5], ids=["from the beginning", "from a checkpoint"])
def test_a_run_that_is_resumed_goes_on_without_a_client_that_is_gone_and_waits_for_the_others(tmp_path, step):
    with net(tmp_path, dataclasses.replace(SMALL, epochs=3)) as it:
        it.start_clients().run_to(step)
        it.kill_server()
        it.kill(1)
        it.policy = Policy(start_clients=3)
        it.start_server()
        it.restart(2)
        it.run()
        assert not it.failures and sorted(it.finals) == [0, 2, 3] and it.epochs == [1, 2, 3]


def test_a_server_that_lingers_tells_who_comes_that_the_run_is_over(tmp_path):
    inbox, said, clock = queue.SimpleQueue(), [], Clock()
    hello = pb.Hello(protocol=messages.PROTOCOL, run=RUN, instance="a")
    with net(tmp_path, SMALL) as it:
        coordinator = it.server
        coordinator.membership = dataclasses.replace(coordinator.membership, stage=Stage.OVER)
        hello.generation = coordinator.membership.generation
        inbox.put(Received(1, pb.FromClient(hello=hello)))

        def carry(out):
            said.append(out)
            clock.now = 31.0

        linger(coordinator, inbox, carry, 30.0, clock=clock)
        assert said[0].message.finished.over and [type(out) for out in said[1:]] == [Close, Handled]
        inbox.put(Stop("by a signal"))
        with pytest.raises(Stopped, match="by a signal"):
            linger(coordinator, inbox, carry, 30.0, clock=clock)


@contextlib.contextmanager
def with_stores(tmp_path):
    """Parties that have begun, whose stores can be made slow or full."""
    with net(tmp_path, SMALL) as it:
        it.start_clients()
        it.loop.run(lambda: 1 in it.stores)
        yield it


def test_no_checkpoint_of_the_server_where_a_client_could_not_save_its_own(tmp_path):
    """It would be one to which nobody could go back. The next is one again."""
    with with_stores(tmp_path) as it:
        it.stores[1].full = True
        it.run_to(2)
        assert it.stores["server"].latest() is None and it.counted("failed_saves") == 1
        it.stores[1].full = False
        it.run()
        assert it.stores["server"].latest() == 4 and it.counted("failed_saves") == 1
        assert min(it.stores[0].steps()) == 4  # older ones are deleted once the server has said that it has this one
        it.assert_equal_to_program()


def test_the_server_has_no_checkpoint_that_a_client_has_not_finished(tmp_path):
    """A client's of step 2 is being written when it and the server die: all go back to where it has one."""
    with with_stores(tmp_path) as it:
        it.stores[1].slow = True
        it.run_to(3)
        assert it.stores[1].begun and it.stores[0].steps() == [2] and it.stores["server"].latest() is None
        it.kill(1)  # and what it had begun is gone
        it.kill_server()
        it.start_client(1)
        it.start_server()
        it.run()
        assert [position for _, position in it.order].count((0, Phase.FEATURES, 0)) == 2
        assert it.stores["server"].latest() == 4
        it.assert_equal_to_program()


def test_a_checkpoint_that_is_finished_late_counts_from_then_on(tmp_path):
    """The server keeps its state of then, and clients keep what they may have to go back to; the server's is slow."""
    with with_stores(tmp_path) as it:
        it.stores[1].slow = it.stores["server"].slow = True
        it.run_to(2)
        assert it.stores["server"].latest() is None and not it.stores["server"].begun
        it.stores[1].wait()
        it.run_to(3)
        assert it.stores["server"].latest() is None and list(it.stores["server"].begun) == [2]
        it.run_to(4)
        assert it.stores[0].steps() == [2, 4] and it.counted("failed_saves") == 0
        it.restart(1)  # the server waits for what it was writing, and all go back to step 2
        it.run()
        positions = [position for _, position in it.order]
        assert positions.count((1, Phase.FEATURES, 0)) == 1 and positions.count((2, Phase.FEATURES, 0)) == 2
        it.assert_equal_to_program()


def test_a_checkpoint_that_is_not_finished_before_the_next_is_due_counts_then(tmp_path):
    """Where steps are quicker than saves: to begin the next one waits for it."""
    with with_stores(tmp_path) as it:
        it.stores[1].slow = True
        it.run_to(4)
        assert it.stores["server"].latest() == 2 and it.counted("failed_saves") == 0
        began = it.clock()
        it.restart(1)
        it.run()
        assert it.server.ready_at < began < it.server.restored_at
        assert [position for _, position in it.order].count((1, Phase.FEATURES, 0)) == 1
        it.assert_equal_to_program()


def test_what_the_server_is_writing_is_not_deleted_by_clients_where_another_cannot_save_any_more(tmp_path):
    """It is slow, and no later save waits for it. Then all go back, to a checkpoint that all have."""
    with net(tmp_path, dataclasses.replace(SMALL, epochs=4), checkpoint_steps=1) as it:
        it.start_clients()
        it.loop.run(lambda: 1 in it.stores)
        it.stores["server"].slow = True
        it.run_to(3)
        it.stores[1].full = True
        it.run_to(9)
        assert len(it.stores[0].steps()) <= 4 and it.counted("failed_saves") >= 5
        it.stores[1].full = False
        it.restart(0)
        it.run()
        assert not it.failures and it.counted("restarts") == 1
        it.assert_equal_to_program()


def test_a_checkpoint_that_a_client_could_not_save_is_missed(tmp_path):
    with with_stores(tmp_path) as it:
        it.stores[1].slow = True
        it.run_to(3)
        it.stores[1].begun.clear()  # it failed
        it.run_to(4)
        assert it.stores["server"].latest() is None and it.counted("failed_saves") == 1
        it.run()
        it.assert_equal_to_program()


def test_a_checkpoint_does_not_wait_for_a_client_that_was_dropped(tmp_path):
    """The others can go on from it; the dropped one comes back with the part of one of them."""
    with net(tmp_path, SMALL, stragglers="drop", deadline_seconds=2.0) as it:
        it.start_clients().run_to(1)
        it.stores[1].slow = True
        it.run_to(2)
        it.kill(1)  # while its own of step 2 is being written
        it.run_to(3)
        assert it.stores["server"].latest() == 2 and it.counted("failed_saves") == 0
        assert it.server.run.restore() == (2, (0, 2, 3))


def test_a_checkpoint_from_which_nobody_could_go_on_is_not_written(tmp_path, caplog):
    """The last that waits is dropped while another, which came back behind it, goes on: the one before counts."""
    cfg = dataclasses.replace(SMALL, epochs=4)
    with net(tmp_path, cfg, checkpoint_steps=4, stragglers="drop", deadline_seconds=2.0) as it:
        it.start_clients().run_to(2)
        for client in (1, 2, 3):
            it.kill(client)
        it.run_to(3)
        it.stores[0].slow = True
        it.run_to(4)  # of which client 0 alone has a checkpoint, or will have
        it.start_client(1)
        it.loop.run(lambda: 1 in it.server.membership.active)
        it.kill(0)
        it.run_to(it.step + 2)
        assert it.stores["server"].latest() is None
        assert it.server.run.restore() == (0, None)
    assert "no checkpoint at step 4: client 0 could not save before being dropped" in caplog.text


def test_old_copies_behind_the_new_request_change_nothing(tmp_path):
    """They come while it waits for another client's: its place is taken, its answer is that of the new one."""
    said = []
    with net(tmp_path, SMALL) as it:

        def keep(direction, client, message):
            if client == 0 and message.WhichOneof("kind") == "request":
                said.append(message)

        it.disturb(keep)
        it.delay(3, 1.0, step=2)
        it.start_clients()
        it.loop.run(lambda: it.server.membership.clients[0].message == (2, Phase.FEATURES, 0))
        assert said[-1].request.position.step == 2 and len(said) == 5
        for old in said[:-1]:
            it.network.inject(0, old)
        it.run()
        it.assert_equal_to_program()


def test_a_connection_is_of_one_client_for_good(tmp_path):
    """Whatever has ended it: who was let in as one client is not to say Hello again as another."""

    def hello(client, protocol=messages.PROTOCOL):
        return pb.FromClient(hello=pb.Hello(protocol=protocol, client=client, instance=f"{client}"))

    ends = {
        "its own goodbye": (hello(1), pb.FromClient(goodbye=pb.Goodbye(error="x"))),
        "its fault": (hello(1), pb.FromClient(request=pb.Request())),
        "no Hello": (pb.FromClient(request=pb.Request()),),
        "an old protocol": (hello(1, 1),),
    }
    with net(tmp_path, SMALL) as it:
        for session, (end, said) in enumerate(ends.items(), 100):
            outs = [out for one in said for out in it.server.handle(Received(session, one))]
            assert isinstance(outs[-1], Close) and outs[-1].session == session, end
            assert not list(it.server.handle(Received(session, hello(0)))), end
            assert not list(it.server.handle(Lost(session)))
        assert it.server.membership.tally.connected == 0
        it.start_clients().run()
        assert not it.failures


# -- Two processes of one client. ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_process_with_the_same_client_id_waits_for_the_first_to_die(tmp_path, caplog):
    """It does not disturb the run; once the first is dead it goes on in its place."""
    cfg = dataclasses.replace(SMALL, epochs=3)
    with net(tmp_path, cfg) as it:
        it.start_clients()
        it.run_to(2)
        it.start_client(1, name="second")
        it.run_to(4)
        assert it.counted("restarts") == 0 and it.counted("refused") > 0
        assert (
            "client_id must be of one process at a time, got 1, which another process has, at client 1's address"
            in caplog.text
        )
        it.kill(1)
        it.run()
        it.assert_equal_to_program()
        assert it.counted("restarts") == 1


def test_a_second_process_gives_up_after_its_time(tmp_path):
    with net(tmp_path, SMALL) as it:
        it.start_client(0)
        it.loop.run_until_idle()
        it.start_client(0, name="second", retry_seconds=30.0)
        it.run("second", seconds=60.0)
        assert "client_id must be of one process at a time, got 0" in str(it.failures["second"])
        assert 0 in it.loop.clients


def test_a_client_that_never_gets_on_gives_up_though_its_connections_are_taken(tmp_path):
    """Each is cut once the client has asked again: it is told where the run is, and never gets an answer."""
    with net(tmp_path, SMALL) as it:

        def rule(direction, client, message):
            kind = message.WhichOneof("kind")
            if client == 2 and direction == "up" and kind == "request" and message.request.position.step >= 2:
                it.network.cut(2)
            return None

        it.start_client(2, retry_seconds=100.0)
        for client in (0, 1, 3):
            it.start_client(client)
        it.run_to(1)
        it.disturb(rule)
        began = it.clock()
        it.run(2, seconds=1000.0)
        told = str(it.failures[2])
        assert re.fullmatch(
            r"the connection is cut \(the server takes this client's connections, but no new answer has come for "
            r"1\d\d s, all of retry_seconds\)",
            told,
        ), told
        assert 100.0 < it.clock() - began < 120.0


def test_clients_that_wait_for_another_do_not_give_up(tmp_path):
    """Though they get no answer for longer than retry_seconds: the server is there, and waits as they do."""
    with net(tmp_path, SMALL, stragglers="wait") as it:
        for client in range(4):
            it.start_client(client, retry_seconds=60.0)
        it.run_to(2)
        it.kill(2)
        away = it.clock() + 600.0
        it.loop.run(lambda: it.clock() > away, seconds=1000.0)
        assert not it.failures
        it.start_client(2)
        it.run()
        it.assert_equal_to_program()


def test_a_client_says_every_minute_that_the_server_is_away(tmp_path, caplog):
    with net(tmp_path, SMALL) as it:
        it.kill_server()
        it.start_client(0, retry_seconds=200.0)
        it.run(0, seconds=300.0)
        says = r"no server is.* \(the server has been away, or turned this client away, for 20\d s, all of retry_"
        assert re.match(says, str(it.failures[0]))
        left = [int(s) for s in re.findall(r"no server is there; trying again for up to (\d+) s", caplog.text)]
        assert len(left) == 4 and left[0] == 200 and all(60 <= a - b < 71 for a, b in itertools.pairwise(left))


def test_bytes_of_repeated_messages_are_counted(tmp_path):
    """At both ends: what was sent again after a lost connection or a lost answer was really sent."""
    cfg, lost, carried = dataclasses.replace(SMALL, epochs=1), [], {"up": 0, "down": 0}

    def rule(direction, client, message):
        carried[direction] += message.ByteSize()
        if direction == "down" and client == 1 and message.WhichOneof("kind") == "answer" and not lost:
            lost.append(message)
            return ()
        return None

    with net(tmp_path, cfg) as it:
        it.disturb(rule)
        it.start_clients()
        clients = list(it.loop.clients.values())
        it.run_to(1)
        it.cut(2)
        it.run()
        it.assert_equal_to_program()
        totals = it.metrics.totals()
        assert lost and totals["sent_bytes"] == carried["down"]
        assert sum(client.sent_bytes for client in clients) == carried["up"] >= totals["received_bytes"]
        received = sum(client.received_bytes for client in clients)
        assert totals["sent_bytes"] - received >= lost[0].ByteSize()
        spec = it.server.run.spec
        payloads = sum(
            len(exchange.clients) * spec.up(exchange).nbytes
            for step in range(spec.schedule.total_steps)
            for exchange in spec.schedule.step_exchanges(step)
            if spec.up(exchange) is not None
        )
        assert totals["received_bytes"] > payloads


@pytest.mark.parametrize("way", ["up", "down"])
def test_requests_or_answers_that_are_lost_silently(tmp_path, way):
    """The line stays open, and small messages pass: the client repeats its request over a fresh one, and then says so.

    One whose request has come is told so, and waits for the others for as long as it takes.
    """

    def rule(direction, client, message):
        kind = message.WhichOneof("kind")
        position = getattr(message, kind).position if kind in ("request", "answer") else None
        return () if direction == way and client == 1 and position is not None and position.step >= 1 else None

    with net(tmp_path, dataclasses.replace(SMALL, epochs=1)) as it:
        it.disturb(rule)
        for client in range(4):
            it.start_client(client, answer_seconds=100.0, retry_seconds=90.0)
        it.run(1)
        told = "the server takes this client's connections, but no new answer has come for"
        assert told in str(it.failures.pop(1)) and not it.failures
        assert it.clock() < 250  # two tries of 100 s
        began = it.clock()
        it.loop.run(lambda: it.clock() > began + 2000)
        assert not it.failures  # the others wait
        it.rules.clear()
        it.start_client(1)
        it.run()
        it.assert_equal_to_program()

"""What clients and server say to each other, what is refused, and the same in threads; over lines in memory."""

import dataclasses
import itertools
import json
import math
import queue
import re
import time
from concurrent import futures

import jax
import numpy as np
import pytest

from msjax import __version__, build, compress, data, tasks
from msjax.distributed import agreement, drive, messages, sizes
from msjax.distributed.channel import Close, ConnectionLost, Lost, Received, Send
from msjax.distributed.coordinator import Stopped
from msjax.distributed.rpc import split_pb2 as pb
from msjax.split import parties

from .network import RUN, net
from .setups import MODES, SMALL, TEST_COUNT, built, dataset, make_parties

pytestmark = pytest.mark.usefixtures("built_once")


def hello(client):
    return pb.FromClient(hello=pb.Hello(protocol=5, client=client))


HELLO = hello(0)


def ready(cfg=SMALL, ds=None, samples=30, test_samples=TEST_COUNT):
    """What a client says that has built this run for this data."""
    summary = build.DataSummary.of(ds or dataset())
    run = build.build(cfg, summary, samples=samples, test_samples=test_samples)
    description = agreement.describe(run.spec, summary)
    return pb.FromClient(ready=pb.Ready(samples=samples, test_samples=test_samples, description=description))


def talk(it, *messages, client=0):
    """Says these things by hand; returns what the server says, and why it ends the connection, if it does."""
    channel = it.network.connect(client)
    for message in messages:
        channel.send(message)
    it.loop.run(lambda: it.network.next_arrival is None)
    said = []
    with pytest.raises(ConnectionLost) as lost:
        while True:
            said.append(channel.receive().WhichOneof("kind"))
    return channel, said, lost.value


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([pb.FromClient(goodbye=pb.Goodbye())], "Hello"),
        ([pb.FromClient()], "Hello"),
        (
            [pb.FromClient(hello=pb.Hello(protocol=9))],
            f"protocol must be 5, that of msjax {__version__} on the server, got 9: server and clients need versions",
        ),
        ([pb.FromClient(hello=pb.Hello(protocol=5, client=4))], "client_id must be in 0..3, as the run has it, got 4"),
        ([HELLO, pb.FromClient(goodbye=pb.Goodbye())], "before the end"),
        ([HELLO, HELLO], "unexpected hello"),
        ([HELLO, pb.FromClient(request=pb.Request())], "before the start"),
        ([HELLO, pb.FromClient(ready=pb.Ready())], "at least one sample"),
    ],
)
def test_strangers_are_turned_away(tmp_path, messages, says):
    with net(tmp_path, SMALL) as it:
        _, _, lost = talk(it, *messages)
        assert says in str(lost) and lost.final
        assert it.counted("refused") == 1 and not it.failures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            pb.Request(position=pb.Position(step=5, phase=5)),
            "no exchange (step, phase, test round) = (5, 5, 0) of client 0",
        ),
        (pb.Request(position=pb.Position(step=99, phase=2)), "no exchange (step, phase, test round) = (99"),
        (pb.Request(position=pb.Position(step=5, phase=2), payload=[b"no such thing"]), "message must"),
        (pb.Request(position=pb.Position(step=5, phase=2)), "arrays in the payload of this exchange must be 1, got 0"),
    ],
)
def test_a_request_that_does_not_fit_ends_one_connection(tmp_path, request_, says):
    """Its client is turned away for good; the others wait for one that knows better."""
    with net(tmp_path, SMALL) as it:
        it.start_clients()
        it.run_to(1)
        request_.generation = it.server.membership.generation
        it.network.inject(0, pb.FromClient(request=request_))
        it.run(0)
        assert says in str(it.failures.pop(0)) and not it.failures
        it.stores.pop(0).close()
        it.start_client(0)
        it.run()
        it.assert_equal_to_program()


def test_a_client_of_another_version_takes_part_and_is_told_of(tmp_path, caplog):
    other = pb.Hello(protocol=5, client=0, version="9.1")
    with net(tmp_path, SMALL) as it:
        _, said, _ = talk(it, pb.FromClient(hello=other), ready())
        assert said == ["welcome"] and f"client 0 has msjax 9.1, and this server {__version__};" in caplog.text
        assert it.server.membership.clients[0].ready


def test_a_client_with_other_data_is_turned_away_alone(tmp_path):
    with net(tmp_path, SMALL) as it:
        talk(it, HELLO, ready())
        ds = dataset()
        wide = data.Arrays(np.pad(ds.train_inputs, ((0, 0), (0, 0), (0, 2), (0, 0))), ds.train_labels)
        other = ready(ds=dataclasses.replace(ds, train=wide))
        _, said, lost = talk(it, hello(1), other, client=1)
        assert said == ["welcome"] and "all clients must have the same run" in str(lost) and lost.final
        assert "input_shape is [8, 8, 1] here and [8, 10, 1] there" in str(lost)
        talk(it, hello(1), ready(), client=1)
        assert [client.ready for client in it.server.membership.clients] == [True, True, False, False]


def test_one_that_comes_late_has_enough_to_test_on(tmp_path):
    """Each client tests on its share of the same positions; fewer samples to train on are repeated."""
    with net(tmp_path, SMALL, stragglers="drop", start_clients=3) as it:
        for client, tests in ((0, 40), (1, 35), (2, 40)):
            talk(it, hello(client), ready(test_samples=tests), client=client)
        assert it.server.run.schedule.test_samples == 35
        _, _, lost = talk(it, hello(3), ready(samples=7, test_samples=34), client=3)
        assert lost.final and "at least 35 test samples, as many as the run tests on, got 34" in str(lost)
        _, _, lost = talk(it, hello(3), ready(samples=7, test_samples=35), client=3)
        assert not lost.final and it.server.membership.clients[3].ready


def test_a_run_that_goes_on_keeps_the_samples_that_it_was_built_from(tmp_path):
    """Its steps and epochs follow from them, and whoever had fewer may be gone for good."""
    with net(tmp_path, SMALL, stragglers="drop", start_clients=2) as it:
        it.kill_server()
        it.start_server(samples=(20, 35))
        _, _, lost = talk(it, hello(2), ready(test_samples=34), client=2)
        assert lost.final and "at least 35 test samples" in str(lost)
        for client in (0, 1):
            talk(it, hello(client), ready(), client=client)
        schedule = it.server.run.schedule
        assert (schedule.samples, schedule.test_samples) == (20, 35)


def test_what_one_said_that_left_before_the_start_binds_nobody(tmp_path):
    """Client 0 had other classes, and is gone: those who have begun are let in again, and client 0 once it is right."""

    def with_classes(names):
        message = ready()
        description = json.loads(message.ready.description)
        description["data"]["hash of class names"] = names
        message.ready.description = json.dumps(description)
        return message

    wrong, right = with_classes("0" * 16), with_classes("1" * 16)
    with net(tmp_path, SMALL, stragglers="drop", start_clients=3) as it:
        talk(it, hello(0), wrong)
        it.cut(0)
        it.loop.run_until_idle()
        for client in (1, 2, 3, 1, 0):
            _, _, lost = talk(it, hello(client), right, client=client)
            assert not lost.final, lost
        assert it.server.run is not None
        _, _, lost = talk(it, hello(2), wrong, client=2)
        assert lost.final and 'where client 0, which came before, is "here"' in str(lost)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"codec": compress.TopK(0.5)}, "codec is .*MaskEncoded.* here and .*TopK"),
        ({"optim": dataclasses.replace(SMALL.optim, learning_rate=0.5)}, None),  # the server's, as all of the config
        (
            {"model": dataclasses.replace(SMALL.model, width=0.5)},
            "client values is .* here and .* there; .*features is",
        ),
    ],
    ids=["codec", "rate", "model"],
)
def test_a_client_that_has_built_another_run_is_told_what_differs(tmp_path, change, differs):
    with net(tmp_path, SMALL) as it:
        _, _, lost = talk(it, HELLO, ready(dataclasses.replace(SMALL, **change)))
        if differs is None:
            assert not lost.final
        else:
            assert lost.final and re.search(f"server and client must have the same run, but .*{differs}", str(lost))


def test_metrics_that_clients_report_are_of_the_samples_that_there_are():
    """U-shaped, where the labels and so the losses are the clients'."""
    server, clients = make_parties(dataclasses.replace(SMALL, mode=MODES[1]))
    spec, (features, gradient) = server.spec, list(server.spec.schedule.step_exchanges(0))[:2]
    answers = server.handle(features, {c.client_id: c.send(features) for c in clients})
    clients[0].receive(features, answers[0])
    request = messages.to_request(clients[0].send(gradient), gradient, spec).request
    found = messages.from_request(request, spec, gradient)
    assert found.metrics.samples == spec.schedule.batch_size_of(gradient)
    messages.check(found, spec, gradient)
    poisoned = found._replace(metrics=found.metrics._replace(sums={"top1": np.float32([np.nan])}))
    with pytest.raises(messages.ProtocolError, match="metrics must be finite, got nan of top1 in step 0"):
        messages.check(poisoned, spec, gradient)
    request.metrics.samples = 2**64 - 1
    with pytest.raises(messages.ProtocolError, match=r"metrics must be of .* samples, got 18446744073709551615"):
        messages.from_request(request, spec, gradient)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"normalized channels": 300_000_000},
            "normalized channels must be at most those of the inputs, 1, got 300000000",
        ),
        ({"input_shape": "abc"}, "a shape must have sizes of at least 1, got 'abc'"),
        ({"input_shape": [-5]}, "a shape must have sizes of at least 1, got .-5."),
        ({"inputs": [["", "uint8", [50_000, 50_000, 1]]]}, r"an example must have fewer than 2\^31 values"),
        ({"inputs": [["", "S100000000", [8, 8, 1]]]}, "arrays must be of numbers, got 'S100000000'"),
        ({"num_classes": 2.5}, "num_classes must be an integer of at least 1, got 2.5"),
    ],
)
def test_a_description_of_what_no_data_can_be_is_refused(tmp_path, change, says):
    message = ready()
    description = json.loads(message.ready.description)
    description["data"] |= change
    message.ready.description = json.dumps(description)
    with net(tmp_path, SMALL) as it:
        _, _, lost = talk(it, HELLO, message)
        assert lost.final and re.search(says, str(lost))


@pytest.mark.parametrize("limit", [1000, None])
def test_a_run_whose_messages_can_become_too_large_ends_at_the_first_ready(tmp_path, monkeypatch, limit):
    """Nobody waits on: the server ends, and its clients hear why."""
    if limit is None:
        monkeypatch.setattr(sizes, "_MOST_BYTES", 3000)
    with net(tmp_path, SMALL, stragglers="drop") as it:
        it.start_server(**({} if limit is None else {"max_message_bytes": limit}))
        it.start_client(0)
        it.run()
        error = it.failures.pop("server")
        assert isinstance(error, sizes.MessageTooLargeError)
        told = f"a client's message in phase FEATURES must have at most {limit or 3000:,} bytes, and can have "
        helps = "a smaller batch_size, another codec or another cut"
        assert str(error).startswith(told) and str(error).endswith(helps) and "(it carries float32[10, " in str(error)
        assert ("a larger --max-megabytes (up to 65536)" in str(error)) == (limit is not None)
        assert str(it.failures[0]) == f"the server stopped: {error}"


@pytest.mark.parametrize(("policy", "refused"), [({}, False), ({"start_clients": 3}, True)], ids=str)
def test_a_part_has_to_fit_where_a_client_may_come_late(tmp_path, policy, refused):
    """It travels with the features of another, whatever becomes of stragglers."""
    spec = built(SMALL, 30).spec
    sent = [sizes.most_bytes(spec, exchange)[0] for exchange in spec.schedule.step_exchanges(0)]
    with_part = sent[0] + spec.part_payload().nbytes
    assert max(sent) < with_part
    with net(tmp_path, SMALL, **policy) as it:
        it.kill_server()
        it.start_server(max_message_bytes=with_part - 1)
        it.start_client(0)
        it.loop.run(lambda: "server" in it.failures or it.server.membership.clients[0].ready)
        assert isinstance(it.failures.pop("server", None), sizes.MessageTooLargeError) == refused


def test_a_client_refuses_a_run_that_its_server_did_not(tmp_path, monkeypatch):
    with net(tmp_path, SMALL) as it:
        it.start_clients()
        check = sizes.check_sizes
        monkeypatch.setattr(
            sizes, "check_sizes", lambda spec, **options: check(spec, max_bytes=1000) if not options else None
        )
        it.loop.run(lambda: 0 in it.failures)
        assert isinstance(it.failures[0], sizes.MessageTooLargeError)


@pytest.mark.parametrize("mode", [MODES[0], pytest.param(MODES[1], marks=pytest.mark.slow), MODES[3]], ids=str)
def test_no_message_becomes_larger_than_was_foreseen(tmp_path, mode):
    """Nor far from it, but where it is entropy-coded."""
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=1)
    with net(tmp_path, cfg) as it:
        largest = {}

        def rule(direction, client, message):
            if (kind := message.WhichOneof("kind")) in ("request", "answer"):
                position = message.request.position if kind == "request" else message.answer.position
                key = position.step, position.phase, position.test_round
                largest[key, direction] = max(largest.get((key, direction), 0), message.ByteSize())

        it.disturb(rule)
        it.start_clients().run()
        assert not it.failures, it.failures
        run = it.server.run
        for exchange in run.schedule.exchanges():
            for direction, most in zip(("up", "down"), sizes.most_bytes(run.spec, exchange), strict=True):
                assert most - 400 < largest[exchange.position, direction] <= most


def test_another_task_is_another_run():
    one, other = (build_with(task) for task in (tasks.classification(), tasks.custom(tasks.cross_entropy, name="mine")))
    assert "task is 'classification' here and 'mine' there" in agreement.differences(one, other)


def build_with(task):
    spec = dataclasses.replace(built(SMALL, 30).spec, task=task)
    return agreement.parse(agreement.describe(spec, build.DataSummary.of(dataset())))


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"data": 1, "run": {}}', "[" * 100_000])
def test_what_is_no_description_is_refused(text):
    with pytest.raises(ValueError, match="description must be that of a client's data and run"):
        agreement.parse(text)


def test_clients_hear_of_a_server_that_fails(tmp_path):
    with net(tmp_path, SMALL) as it:
        build_first = it.server._readies._build

        def fail(*args):
            it.server._readies._build = shapes_differ
            return build_first(*args)

        def shapes_differ(*args):
            raise ValueError("a shape that does not fit")

        it.server._readies._build = fail
        it.start_clients().run()
        assert str(it.failures.pop("server")) == "a shape that does not fit"
        assert {str(e) for e in it.failures.values()} == {"the server stopped: a shape that does not fit"}


def test_the_server_says_why_a_client_left_and_nothing_of_its_data(tmp_path, caplog):
    with net(tmp_path, SMALL) as it:

        def load(client, cfg):
            raise data.DataError("the column 'diagnosis' of /home/ann/patients.csv has NaN")

        it.load, load = load, it.load
        it.start_client(1)
        it.run(1)
        it.loop.run(lambda: it.server.membership.clients[1].session is None)
        assert "patients.csv" in str(it.failures.pop(1))
        left = [record.getMessage() for record in caplog.records if "client 1 left" in record.getMessage()]
        why = "it cannot open its folder, load its data or build the run (DataError); its own log says more"
        assert left == [f"client 1 left: {why}"]
        it.load = load
        it.start_clients().run()
        it.assert_equal_to_program()


def test_what_a_client_says_of_its_failure_is_one_short_line(tmp_path, caplog):
    with net(tmp_path, SMALL) as it:
        talk(it, HELLO, pb.FromClient(goodbye=pb.Goodbye(error="no\nclient 2 left: " + "x" * 5000)))
    (left,) = (record.getMessage() for record in caplog.records if "left" in record.getMessage())
    assert left.startswith("client 0 left: noclient 2") and "\n" not in left and len(left) < 300


def test_a_stop_while_clients_gather(tmp_path):
    with net(tmp_path, SMALL) as it:
        it.start_client(0)
        it.loop.run_until_idle()
        it.clock.now += 1.0
        it.loop.run_until_idle()
        it.loop.stop("by a signal")
        it.run()
        assert str(it.failures[0]) == "the server stopped: by a signal" and isinstance(it.failures["server"], Stopped)


def test_a_client_does_not_go_on_with_a_server_of_another_run(tmp_path):
    """What it has learned and saved is of the first: whoever wants it in the other starts it anew."""
    with net(tmp_path, SMALL) as it:
        it.start_client(0)
        it.loop.run(lambda: it.server.membership.clients[0].ready)
        it.kill_server()
        it.run_name = "0" * 31 + "2"
        it.start_server()
        it.run(0, seconds=60.0)
        assert "the server now serves another run" in str(it.failures.pop(0))
        it.start_client(0)
        it.loop.run(lambda: it.server.membership.clients[0].ready)
        assert not it.failures


@pytest.mark.parametrize(("run", "counts"), [(RUN, True), ("0" * 31 + "2", False), ("", False)])
def test_where_a_client_was_counts_in_its_own_run_alone(tmp_path, run, counts):
    """The generation of another run says nothing, even if it is the same number."""
    with net(tmp_path, SMALL) as it:
        hello = pb.Hello(protocol=5, client=0, run=run, generation=it.server.membership.generation)
        talk(it, pb.FromClient(hello=hello))
        generation = it.server.membership.clients[0].session.generation
        assert generation == (it.server.membership.generation if counts else 0)


@pytest.mark.parametrize(
    ("welcome", "says"),
    [
        (
            {"protocol": 9},
            f"the server's protocol is 9, this client's 5, that of msjax {__version__}: server and clients",
        ),
        ({"run": "../elsewhere"}, "the run's name must be 32 hexadecimal digits, got '../elsewhere'"),
        ({"run": RUN + "\n"}, "the run's name must be 32 hexadecimal digits"),
    ],
)
def test_a_client_turns_a_welcome_away_that_it_cannot_take(tmp_path, welcome, says):
    """It opens no store for it: the name would become a folder's."""
    with net(tmp_path, SMALL) as it:
        message = it.server._welcome()
        for name, value in welcome.items():
            setattr(message.welcome, name, value)
        it.server._welcome = lambda: message
        it.start_client(0)
        it.run(0)
        assert says in str(it.failures[0]) and 0 not in it.stores


@pytest.mark.slow
def test_a_client_that_loads_for_longer_than_the_deadline(tmp_path):
    """Its session is closed, its next is ready at once."""
    with net(tmp_path, SMALL, deadline_seconds=10.0) as it:
        load = it.load

        def slow(client, cfg):
            it.clock.now += 25.0 if client == 2 else 0.0
            return load(client, cfg)

        it.load = slow
        it.start_clients().run()
        it.assert_equal_to_program()


@pytest.mark.slow
def test_own_data_of_unequal_amounts(tmp_path):
    """Each client draws as many samples an epoch as the one that has the fewest, from all that it has."""
    amounts = (100, 60, 40, 80)
    ds = dataset()
    with net(tmp_path, SMALL) as it:
        it.own_data = lambda client, cfg: (data.Arrays(*ds.train[-amounts[client] :]), amounts[client])
        it.start_clients().run()
        assert not it.failures, it.failures
        assert it.server.run.schedule.samples == 40
        run, clients = built(SMALL, 40), []
        for client, n in enumerate(amounts):
            own = parties.ClientData(data.Arrays(*ds.train[-n:]), ds.test)
            clients.append(parties.Client(client, run.spec, run.client, own, SMALL.seed))
        for _ in parties.run(parties.Server(run.spec, run.server, SMALL.seed), clients):
            pass
        for client in range(4):
            jax.tree.map(np.testing.assert_array_equal, clients[client].state, it.finals[client].state)


@pytest.mark.slow
def test_clients_test_all_of_their_own(tmp_path):
    """The means are over the test samples of all: those of a common test set that is made of them."""
    tests = []
    for own in (False, True):
        with net(tmp_path / str(own), SMALL) as it:
            if own:
                it.own_tests = True
                it.test_data = lambda client: data.Arrays(*dataset().test[10 * client : 10 * client + 10])
            it.start_clients().run()
            assert not it.failures, it.failures
            assert it.server.run.schedule.test_samples == (10 if own else 40)
            tests.append(it.tests)
    assert len(tests[0]) == 2 and tests[0][1].samples == 40
    jax.tree.map(np.testing.assert_array_equal, *tests)


# -- Threads. ------------------------------------------------------------------------------------------------------


class QueueChannel:
    """A line between two threads, which is cut once the client has received so many messages."""

    _sessions = itertools.count()  # whose `next` no other thread comes between

    def __init__(self, lines, inbox, messages):
        self._session, self._lines, self._inbox = next(self._sessions), lines, inbox
        self._left = messages
        lines[self._session] = queue.Queue()

    def send(self, message):
        self._inbox.put(Received(self._session, message, "this process"))

    def receive(self, timeout):
        if self._left == 0:
            raise ConnectionLost("cut")
        self._left -= 1
        try:
            message = self._lines[self._session].get(timeout=timeout)
        except queue.Empty:
            raise ConnectionLost(f"no answer within {timeout} s") from None
        if isinstance(message, ConnectionLost):
            raise message
        self.received_at = time.monotonic()
        return message

    def close(self):
        self._inbox.put(Lost(self._session))


@pytest.mark.slow
def test_threads_equal_one_program(tmp_path):
    """The loops that gRPC is to run in; one client's line is cut twice, all on a real clock."""
    with net(tmp_path, SMALL) as it:
        it.clock = time.monotonic
        it.start_server()
        it.start_clients()
        lines, inbox = {}, queue.Queue()

        def carry(out):
            match out:
                case Send(session, message):
                    lines[session].put(message)
                case Close(session, reason, final):
                    lines[session].put(ConnectionLost(reason, final=final))

        def connect(messages=math.inf):
            return QueueChannel(lines, inbox, messages)

        cuts = iter([9, 6])
        with futures.ThreadPoolExecutor(4) as pool:
            sessions = list(it.loop.clients.values())
            calls = [pool.submit(drive.take_part, session, connect) for session in sessions[1:]]
            calls.append(pool.submit(drive.take_part, sessions[0], lambda: connect(next(cuts, math.inf))))
            drive.serve(it.server, inbox, carry)
            for call in calls:
                call.result(60)
        assert next(cuts, None) is None
        it.assert_equal_to_program()


def test_a_description_is_not_parsed_where_it_is_too_long(tmp_path, monkeypatch):
    """Parsed, JSON takes many times its bytes."""
    monkeypatch.setattr(agreement, "parse", lambda description: pytest.fail("it was parsed"))
    long = pb.FromClient(ready=pb.Ready(samples=30, description="[" + "{}," * (1 << 19)))
    with net(tmp_path, SMALL) as it:
        _, said, lost = talk(it, HELLO, long)
    assert said == ["welcome"] and lost.final
    assert str(lost) == "description must have at most 1,048,576 bytes, got 1,572,865"


def test_a_fault_as_long_as_what_was_sent_is_told_in_short(tmp_path, caplog):
    good = json.loads(ready().ready.description)
    good["data"]["inputs"] = [["", "uint8", [1] * 100_000]]
    long = pb.FromClient(ready=pb.Ready(samples=30, test_samples=TEST_COUNT, description=json.dumps(good)))
    with net(tmp_path, SMALL) as it:
        _, said, lost = talk(it, HELLO, long)
    assert said == ["welcome"] and lost.final and len(str(lost)) < 2100
    assert "input_shape must be three positive integers" in str(lost)
    assert max(len(record.getMessage()) for record in caplog.records) < 2200

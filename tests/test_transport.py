"""Over loopback gRPC: the same bits as in one program, in every mode, and whatever goes wrong on the way."""

import contextlib
import dataclasses
import socket
import threading
import time

import grpc
import jax
import numpy as np
import pytest
from msjax.protocol import Phase

from msjax import _serving, assemble, compress, data, parties
from msjax.transport import client as client_lib
from msjax.transport import split_pb2 as pb
from msjax.transport._messages import ProtocolError
from msjax.transport.coordinator import Policy, Stopped
from msjax.transport.options import ClientOptions, ServeOptions

from .test_parties import MODES, SMALL, dataset, make_parties

SECONDS = 240  # after which a test gives up


@pytest.fixture(autouse=True)
def random_data(monkeypatch):
    arrays = dataset()
    ds = data.Dataset(
        "random", data.Arrays(*arrays[:2]), data.Arrays(*arrays[2:]), 10, np.float32([0.5]), np.float32([0.25])
    )
    monkeypatch.setattr(data, "load", lambda *args, **options: ds)


assemble_anew, programs_anew = assemble.assemble, assemble.Assembly.programs
ONCE, ASSEMBLED, PROGRAMS = threading.RLock(), {}, {}


def assemble_once(cfg, samples, test_samples):
    with ONCE:
        key = cfg, samples, test_samples
        if key not in ASSEMBLED:
            info = assemble.SetInfo((8, 8, 1), 10, (0.5,), (0.25,))
            ASSEMBLED[key] = assemble_anew(cfg, info, samples=samples, test_samples=test_samples)
        return ASSEMBLED[key]


def programs_once(parts, seed, *, numpy_encoder=False):
    with ONCE:
        key = id(parts), seed, numpy_encoder  # of parts that are kept
        if key not in PROGRAMS:
            PROGRAMS[key] = programs_anew(parts, seed, numpy_encoder=numpy_encoder)
        return PROGRAMS[key]


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """All parties of this process share their compiled functions, which hold no state."""
    monkeypatch.setattr(
        assemble, "assemble", lambda cfg, info, samples, test_samples: assemble_once(cfg, samples, test_samples)
    )
    monkeypatch.setattr(assemble.Assembly, "programs", programs_once)


class Net:
    """A server and clients in threads of this process, each with a folder of its own under `path`."""

    def __init__(self, path, cfg, **options):
        self.path, self.cfg = path, cfg
        self.server_options = ServeOptions(**{"listen": "localhost:0", "checkpoint_steps": 2, **options})
        self.runners, self.threads, self.failures, self.finals = {}, {}, {}, {}
        self.address = None
        self.start_server()

    def start_server(self, listen=None):
        (self.path / "server").mkdir(exist_ok=True)
        options = self.server_options if listen is None else dataclasses.replace(self.server_options, listen=listen)
        self.serving = _serving.Serving(self.cfg, options, self.path / "server")
        self.address = self.address or f"localhost:{self.serving.port}"
        self.server_thread = self._thread("server", self.serving.train)

    def start_client(self, number, wrap=lambda connection: connection, **options):
        options = {"server": self.address, "answer_seconds": 20.0, **options}
        options = ClientOptions(number=number, state=str(self.path / f"client{number}"), **options)
        runner = _serving.TakingPart(options).runner
        connect = runner._connect
        runner._connect = lambda: wrap(connect())
        self.runners[number] = runner
        self._thread(number, runner.train)

    def _thread(self, name, target):
        def run():
            try:
                self.finals[name] = target()
            except Exception as error:
                error.add_note(f"in {name}")
                self.failures[name] = error

        self.threads[name] = threading.Thread(target=run, daemon=True)
        self.threads[name].start()
        return self.threads[name]

    def wait_for_step(self, step):
        """Until the server has reached a step."""
        deadline = time.monotonic() + SECONDS
        while self.serving.metrics.step._value.get() < step:
            assert time.monotonic() < deadline and not self.failures, self.failures
            time.sleep(0.005)

    def join(self, *names):
        for name in names or list(self.threads):
            self.threads[name].join(SECONDS)
            if self.threads[name].is_alive():
                raise AssertionError(f"{name} hangs") from next(iter(self.failures.values()), None)

    def close(self):
        self.serving.close()


@contextlib.contextmanager
def net(path, cfg, **options):
    it = Net(path, cfg, **options)
    try:
        yield it
    finally:
        it.close()


def expected(cfg):
    """The states at the end of the run in one program, without a network."""
    plan, server, clients = make_parties(cfg)
    for _ in parties.run(plan, server, clients):
        pass
    return server, clients


def assert_equal_to_program(it, cfg):
    """Bit for bit."""
    assert not it.failures, it.failures
    server, clients = expected(cfg)
    pairs = [(server.state, it.serving.coordinator.party.state)]
    pairs += [(clients[n].state, it.finals[n].state) for n in range(cfg.clients)]
    for ours, theirs in pairs:
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_own_data_of_unequal_amounts(tmp_path, monkeypatch):
    """Each client draws as many samples an epoch as the one that has the fewest, from all that it has."""
    amounts = (100, 60, 40, 80)
    whole = data.load("random")

    def load_data(cfg, options):
        n = amounts[options.number]
        return dataclasses.replace(whole, train=data.Arrays(*whole.train[-n:]))

    monkeypatch.setattr(_serving, "load_data", load_data)
    with net(tmp_path, SMALL) as it:
        for number in range(SMALL.clients):
            it.start_client(number, own_data=True)
        it.join()
        assert not it.failures, it.failures
    parts = assemble_once(SMALL, min(amounts), len(whole.test_labels))
    shapes, programs = parts.shapes(), programs_once(parts, SMALL.seed)
    assert parts.plan.samples == 40
    clients = []
    for number, n in enumerate(amounts):
        own = (whole.train_inputs[-n:], whole.train_labels[-n:], whole.test_inputs, whole.test_labels)
        own = parties.ClientData(*map(np.asarray, own))
        clients.append(parties.Client(number, parts.plan, shapes, programs, parts.client, own, SMALL.seed))
    for _ in parties.run(parts.plan, parties.Server(parts.plan, shapes, programs, parts.server), clients):
        pass
    for number, client in enumerate(clients):
        jax.tree.map(np.testing.assert_array_equal, client.state, it.finals[number].state)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_network_equals_one_program(tmp_path, mode):
    cfg = dataclasses.replace(SMALL, mode=mode, grad_codec=compress.StochasticUniform(bits=8))
    with net(tmp_path, cfg) as it:
        for number in range(cfg.clients):
            it.start_client(number)
        it.join()
        assert_equal_to_program(it, cfg)
        history = it.serving.history
        assert [r["epoch"] for r in history] == [1, 2]
        assert history[0]["test"].keys() == {"loss", "top1_percent", "top5_percent"}
        text = it.serving.metrics.text()
        assert 'msjax_exchanges_total{phase="FEATURES"}' in text and "msjax_received_bytes_total" in text


@pytest.mark.parametrize("mode", [MODES[1], MODES[3]], ids=str)
def test_client_that_lost_its_memory(tmp_path, mode):
    """A client dies and starts anew from its checkpoints: all go back to them, and the result is the same.

    So they do where it could be dropped, but too few would be left; and, where there is no checkpoint, to the start.
    """
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=3)
    policy = Policy(stragglers="drop", min_clients=cfg.clients)
    with net(tmp_path, cfg, policy=policy, checkpoint_steps=2 if mode.kind != "sequential" else 1000) as it:
        for number in range(cfg.clients):
            it.start_client(number)
        for step in (3, 5) if mode.kind != "sequential" else (9, 17):
            it.wait_for_step(step)
            kill(it, 1)
            it.start_client(1)
        it.join()
        assert_equal_to_program(it, cfg)
        assert [epoch["epoch"] for epoch in it.serving.history] == [1, 2, 3]
    if mode.kind == "sequential":
        return
    # Another run of clients that have checkpoints of the first one is none the wiser.
    (tmp_path / "server").rename(tmp_path / "first")
    cfg = dataclasses.replace(cfg, seed=1)
    with net(tmp_path, cfg) as it:
        for number in range(cfg.clients):
            it.start_client(number)
        it.wait_for_step(5)
        kill(it, 1)
        it.start_client(1)
        it.join()
        assert_equal_to_program(it, cfg)


def kill(it, number):
    """Ends a client's thread as a crash would: nothing is said or saved."""

    class Killed(Exception):
        pass

    def dead(*args, **kwargs):
        raise Killed

    runner = it.runners[number]
    runner._next = runner._send = runner._take = dead
    it.threads[number].join(SECONDS)
    assert isinstance(it.failures.pop(number), Killed)
    runner._store.close()


@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=str)
def test_server_that_died(tmp_path, mode):
    """The server comes back from its last checkpoint, and the clients go back to it."""
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=3)
    with net(tmp_path, cfg) as it:
        for number in range(cfg.clients):
            it.start_client(number)
        it.wait_for_step(6)
        it.serving._endpoint._server.stop(None).wait()
        it.serving.coordinator._assemble = None
        it.serving.coordinator.stop("killed")
        it.join("server")
        it.failures.pop("server")
        it.serving.coordinator._store.close()
        it.start_server(it.address)
        it.join()
        assert_equal_to_program(it, cfg)
        received = [epoch["traffic"]["received_bytes"] for epoch in it.serving.history]
        assert received == sorted(received) and received[0] > 0


class Wrapped:
    """A connection around another."""

    def __init__(self, connection):
        self._connection = connection

    def __getattr__(self, name):
        return getattr(self._connection, name)


class Flaky(Wrapped):
    """A connection whose messages are lost, doubled or late, by the draws of a seeded generator."""

    def __init__(self, connection, rng):
        super().__init__(connection)
        self._rng, self._kept = rng, None

    def send(self, message):
        if message.WhichOneof("kind") != "request":
            return self._connection.send(message)
        draw = self._rng.random()
        if draw < 0.1:
            return None  # lost
        if self._kept is not None and draw < 0.3:
            self._connection.send(self._kept)  # one of long ago, out of order
        self._connection.send(message)
        if draw > 0.8:
            self._connection.send(message)  # twice
        self._kept = message
        return None

    def receive(self, seconds):
        message = self._connection.receive(seconds)
        if message.WhichOneof("kind") == "answer" and self._rng.random() < 0.05:
            raise client_lib._Lost("the answer was lost")
        return message


@pytest.mark.parametrize("mode", [MODES[1], MODES[3]], ids=str)
def test_lost_doubled_and_late_messages(tmp_path, mode):
    cfg = dataclasses.replace(SMALL, mode=mode)
    with net(tmp_path, cfg) as it:
        for number in range(cfg.clients):
            rng = np.random.default_rng(number)
            it.start_client(number, wrap=lambda c, rng=rng: Flaky(c, rng), answer_seconds=0.5)
        it.join()
        assert_equal_to_program(it, cfg)


class Line:
    """A TCP line to `address` that can be cut."""

    def __init__(self, address):
        host, port = address.split(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("localhost", 0))
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        self._open, self._threads = [], []
        self._start(self._accept)

    def _start(self, target, *args):
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self):
        with self._listener, contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self._open += [near, far]
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    @staticmethod
    def _pump(a, b):
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for end in self._open:
            end.close()


def test_line_that_is_cut(tmp_path):
    """Of all clients, again and again: nobody goes back to a checkpoint, as nobody has forgotten anything."""
    cfg = dataclasses.replace(SMALL, epochs=4)
    with net(tmp_path, cfg) as it:
        line = Line(it.address)
        for number in range(cfg.clients):
            it.start_client(number, server=line.address)
        for step in (2, 5, 8):
            it.wait_for_step(step)
            line.cut()
        it.join()
        line.close()
        assert_equal_to_program(it, cfg)
        assert it.serving.metrics.restarts._value.get() == 0


def test_last_answer_is_lost(tmp_path, caplog):
    """By two clients. One comes back for it, and gets it though training has ended; the other is not waited for.

    A third dies when it hears of the end, and is started again: it has its half.
    """
    dead = RuntimeError("dead")

    def losing(number, error):
        class Losing(Wrapped):
            def receive(self, seconds):
                message = self._connection.receive(seconds)
                last = it.runners[number]._exchange is not None and it.runners[number]._following is None
                if last and message.WhichOneof("kind") == "answer" and not it.serving.coordinator._ended:
                    while not it.serving.coordinator._ended:
                        time.sleep(0.01)
                    raise error
                return message

        return Losing

    class Dying(Wrapped):
        def receive(self, seconds):
            message = self._connection.receive(seconds)
            if message.WhichOneof("kind") == "finished":
                raise dead
            return message

    with net(tmp_path, SMALL, policy=Policy(deadline_seconds=10.0)) as it:
        for number, wrap in enumerate([lambda c: c, losing(1, client_lib._Lost("lost")), losing(2, dead), Dying]):
            it.start_client(number, wrap=wrap)
        it.join(3)
        assert it.failures.pop(3) is dead
        it.runners[3]._store.close()
        it.start_client(3)
        it.join()
        assert it.failures == {2: dead}
        assert "clients [2] did not hear that training has ended" in caplog.text
        it.failures.clear()
        it.finals[2] = it.finals[3]
        assert_equal_to_program(it, SMALL)


def silent_from(step):
    """A client that never answers again from `step` on, but keeps its line open."""

    class Silent(Wrapped):
        def send(self, message):
            if message.WhichOneof("kind") != "request" or message.request.key.step < step:
                self._connection.send(message)

    return Silent


def test_straggler_stops_the_run(tmp_path):
    policy = Policy(deadline_seconds=1.0, stragglers="stop")
    with net(tmp_path, SMALL, policy=policy) as it:
        for number in range(SMALL.clients):
            it.start_client(number, wrap=silent_from(3) if number == 2 else lambda c: c)
        it.join("server", 0, 1, 3)
        assert isinstance(it.failures["server"], Stopped) and "[2]" in str(it.failures["server"])
        for number in (0, 1, 3):
            assert isinstance(it.failures[number], client_lib.Refused) and "[2]" in str(it.failures[number])


def late_once(step, seconds, phase=None):
    """A client whose first request of a step, or of an exchange of it, is late."""
    late = []

    class Late(Wrapped):
        def send(self, message):
            key = message.request.key
            now = message.WhichOneof("kind") == "request" and key.step == step and phase in (None, key.phase)
            if now and not late:
                late.append(time.sleep(seconds))
            self._connection.send(message)

    return Late


def test_straggler_is_waited_for(tmp_path):
    policy = Policy(deadline_seconds=0.2, stragglers="wait")
    with net(tmp_path, SMALL, policy=policy) as it:
        for number in range(SMALL.clients):
            it.start_client(number, wrap=late_once(2, 1.0) if number == 2 else lambda c: c)
        it.join()
        assert_equal_to_program(it, SMALL)
        assert it.serving.metrics.stragglers._value.get() > 0


@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=str)
def test_dropped_straggler_comes_back(tmp_path, mode):
    """The others go on without it; when it is back it takes part again, with the others' half."""
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=8)
    policy = Policy(deadline_seconds=2.0, stragglers="drop")
    with net(tmp_path, cfg, policy=policy) as it:
        for number in range(cfg.clients):
            it.start_client(number)
        it.wait_for_step(2)
        kill(it, 2)
        steps_alone = 6 if mode.kind != "sequential" else 20
        it.wait_for_step(2 + steps_alone)
        if mode.kind != "sequential":  # the first that is asked for its half dies of it, and comes back, too
            asked = it.runners[0]._take
            it.runners[0]._take = lambda answer: 1 / 0 if answer.send_half else asked(answer)
        it.start_client(2)
        if mode.kind != "sequential":
            it.join(0)
            assert isinstance(it.failures.pop(0), ZeroDivisionError)
            it.runners[0]._store.close()
            it.start_client(0)
        it.join()
        assert not it.failures, it.failures
        halves = [it.finals[n].state for n in range(cfg.clients)]
        assert int(it.serving.coordinator.party.train.samples) == 0
        samples = it.serving.history
        assert len(samples) == cfg.epochs
        if mode.kind != "sequential":
            for a, b in zip(jax.tree.leaves(halves[0][:2]), jax.tree.leaves(halves[2][:2]), strict=True):
                np.testing.assert_array_equal(a, b)


def test_first_in_turn_is_dropped_before_it_gives_a_half(tmp_path):
    """The next then begins as the first would have, with the half that all draw from the seed."""
    cfg = dataclasses.replace(SMALL, mode=MODES[3])
    with net(tmp_path, cfg, policy=Policy(deadline_seconds=5.0, stragglers="drop")) as it:
        it.start_client(0, wrap=silent_from(1))
        for number in range(1, cfg.clients):
            it.start_client(number)
        it.wait_for_step(4)
        assert not it.failures, it.failures
        it.serving.coordinator.stop("enough")
        it.join("server")


def test_dropped_from_its_turn(tmp_path):
    """It comes back for its next. After its last it hears of the end: the last client lacks the trained half then."""
    cfg = dataclasses.replace(SMALL, mode=MODES[3])
    late = {n: late_once(step, 4.0, Phase.FEATURES) for n, step in ((0, 1), (1, 15), (3, 21))}
    with net(tmp_path, cfg, policy=Policy(deadline_seconds=3.0, stragglers="drop")) as it:
        for number in range(cfg.clients):
            it.start_client(number, wrap=late.get(number, lambda c: c))
        it.join()
        assert str(it.failures.pop(3)).endswith("its half is not the trained one")
        assert not it.failures, it.failures
        assert it.serving.metrics.stragglers._value.get() == 3  # each once


def test_dropped_between_features_and_gradient(tmp_path):
    """U-shaped, where the server waits for its gradient with the features of all."""
    cfg = dataclasses.replace(SMALL, mode=MODES[1])
    late = late_once(2, 5.0, phase=Phase.GRADIENT)
    with net(tmp_path, cfg, policy=Policy(deadline_seconds=2.0, stragglers="drop")) as it:
        for number in range(cfg.clients):
            it.start_client(number, wrap=late if number == 1 else lambda c: c)
        it.join("server")
        assert "server" not in it.failures
        assert it.serving.metrics.stragglers._value.get() == 1
        assert [epoch["epoch"] for epoch in it.serving.history] == [1, 2]


def test_full_disks(tmp_path, monkeypatch):
    """Checkpoints that cannot be written are missed, and nothing else."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with net(tmp_path, SMALL) as it:
        monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        for number in range(SMALL.clients):
            it.start_client(number)
        it.join()
        assert_equal_to_program(it, SMALL)
        assert it.serving.metrics.failed_saves._value.get() > 0
        assert it.serving.coordinator._store.latest() is None


def stream(address, *messages, token=None):
    """Says these things and returns what the server says, to the end or the error."""
    with grpc.insecure_channel(address) as channel:
        metadata = [("authorization", f"Bearer {token}")] if token else None
        release = threading.Event()

        def say():
            yield from messages
            release.wait(10)

        try:
            answers = [
                a.WhichOneof("kind")
                for a in client_lib.split_pb2_grpc.SplitStub(channel).Train(say(), metadata=metadata, timeout=10)
            ]
        except grpc.RpcError as error:
            return error.code(), error.details()
        finally:
            release.set()
        return answers


HELLO = pb.FromClient(hello=pb.Hello(protocol=1, client=0))
READY = pb.FromClient(ready=pb.Ready(samples=25, test_samples=42, input_shape=(8, 8, 1), num_classes=10))


@pytest.mark.parametrize(
    ("messages", "code", "says"),
    [
        ([READY], grpc.StatusCode.INVALID_ARGUMENT, "Hello"),
        ([pb.FromClient()], grpc.StatusCode.INVALID_ARGUMENT, "Hello"),
        ([pb.FromClient(hello=pb.Hello(protocol=9))], grpc.StatusCode.FAILED_PRECONDITION, "protocol must be 1"),
        ([pb.FromClient(hello=pb.Hello(protocol=1, client=4))], grpc.StatusCode.INVALID_ARGUMENT, "0..3"),
        ([HELLO, pb.FromClient(farewell=pb.Farewell())], grpc.StatusCode.INVALID_ARGUMENT, "before the end"),
        ([HELLO, HELLO], grpc.StatusCode.INVALID_ARGUMENT, "unexpected hello"),
        ([HELLO, pb.FromClient(request=pb.Request())], grpc.StatusCode.INVALID_ARGUMENT, "before the start"),
        ([HELLO, pb.FromClient(ready=pb.Ready())], grpc.StatusCode.INVALID_ARGUMENT, "at least one sample"),
    ],
)
def test_strangers_are_turned_away(tmp_path, messages, code, says):
    with net(tmp_path, SMALL) as it:
        found = stream(it.address, *messages)
        it.serving.coordinator.stop("test")
        assert found[0] == code and says in found[1]
        assert it.serving.metrics.refused._value.get() == 1


def test_a_client_with_other_data_is_turned_away_alone(tmp_path):
    with net(tmp_path, SMALL) as it:
        coordinator = it.serving.coordinator
        first, other = (coordinator.join(pb.Hello(client=number), "here") for number in (0, 1))
        assert it.serving.metrics.connected._value.get() == 2
        coordinator.ready(first, READY.ready)
        unlike = pb.Ready(samples=25, test_samples=42, input_shape=(9, 8, 1), num_classes=10)
        with pytest.raises(ProtocolError, match=r"got \(\(9, 8, 1\), 10\) beside \(\(8, 8, 1\)"):
            coordinator.ready(other, unlike)
        coordinator.ready(other, READY.ready)
        assert it.server_thread.is_alive()
        coordinator.stop("test")


def test_clients_hear_of_a_server_that_fails(tmp_path):
    def fail(*_):
        raise ValueError("a shape that does not fit")

    with net(tmp_path, SMALL) as it:
        it.serving.coordinator._assemble = fail
        for number in range(SMALL.clients):
            it.start_client(number)
        it.join()
        assert str(it.failures.pop("server")) == "a shape that does not fit"
        assert {str(e) for e in it.failures.values()} == {"the server stopped: a shape that does not fit"}


def test_a_message_that_is_too_long_is_not_repeated(tmp_path):
    with net(tmp_path, SMALL, max_megabytes=1) as it:
        connection = client_lib.Connection(it.address, client_lib.TlsFiles(), None)
        connection.send(HELLO)
        assert connection.receive(10).WhichOneof("kind") == "welcome"
        connection.send(pb.FromClient(request=pb.Request(payload=bytes(2 << 20))))
        with pytest.raises(client_lib.Refused, match="larger than max"):
            connection.receive(10)
        connection.close()
        it.serving.coordinator.stop("test")

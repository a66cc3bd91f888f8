"""Over gRPC on loopback: what the lines in memory (`test_distributed`) do not show."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from unittest import mock

import grpc
import jax
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.proxy import Proxy
from msjax import config, data
from msjax.cli import main as cli
from msjax.distributed import client_program, messages, server_program
from msjax.distributed.channel import ConnectionLost
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.client_run import Interrupted
from msjax.distributed.coordinator import Stopped
from msjax.distributed.options import ClientOptions, ServeOptions
from msjax.distributed.remote import RemoteServer
from msjax.distributed.rpc import frames
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.connection import Connection, metadata_of
from msjax.distributed.rpc.security import TlsFiles
from msjax.distributed.rpc.server import most_calls
from msjax.distributed.served_folder import finish
from msjax.distributed.server_program import ServerProgram
from msjax.distributed.stores import Held
from msjax.parts import load_part, served_run_id
from msjax.runs import RunFolder, plots
from msjax.split import parties
from msjax.split.modes import Parallel
from msjax.split.schedule import Schedule
from msjax.split.traffic import run_traffic

from .authority import Authority
from .setups import MODES, SMALL, dataset, make_parties
from .test_link_budget import LINK

CFG = dataclasses.replace(SMALL, mode=MODES[1], clients=2, epochs=1)
TOKENS = "0 alice\n1 bob\n"


@pytest.fixture(autouse=True)
def random_data(monkeypatch):
    monkeypatch.setattr(data, "load", lambda *args, **options: dataset())


class Net:
    """A server in a thread, and clients in others."""

    def __init__(self, path, cfg=CFG, **options):
        self.path, self.cfg = path, dataclasses.replace(cfg, out=str(path))
        self.folder = RunFolder.create(self.cfg, "run")
        self.program = ServerProgram(self.cfg, ServeOptions(**{"listen": "localhost:0", **options}), self.folder)
        self.address = f"localhost:{self.program.port}"
        self.failures, self.threads = {}, []
        self.start("server", self.program.train)

    def start(self, name, target):
        def run():
            try:
                target()
            except Exception as error:
                self.failures[name] = error

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def client(self, client_id, preset=None, **options):
        options = {"server": self.address, "answer_seconds": 60.0, **options}
        options = ClientOptions(client_id=client_id, state=str(self.path / f"client{client_id}"), **options)
        program = ClientProgram(options, preset)
        self.start(client_id, program.train)
        return program

    def join(self):
        for thread in self.threads:
            thread.join(240)
            assert not thread.is_alive(), self.failures

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.program.stop("test")
        self.program.close()
        self.folder.close()


def fails_first(save):
    failed = set()

    def save_trained(path, *args, **names):
        if path not in failed:
            failed.add(path)
            raise OSError(28, "No space left on device")
        save(path, *args, **names)

    return save_trained


@pytest.mark.slow
def test_training_over_tls_with_tokens_equals_one_program(tmp_path, caplog, monkeypatch):
    """U-shaped; the parts are in files at the end, and the bytes of all messages were counted."""
    caplog.set_level("INFO", "msjax")
    write, full = RunFolder.write_history, iter([OSError(28, "No space left on device")])

    def write_history(folder, history):
        for error in full:  # once; it is no reason to end
            raise error
        write(folder, history)

    monkeypatch.setattr(RunFolder, "write_history", write_history)
    for program in (server_program, client_program):  # and each party once more, when it writes its part
        monkeypatch.setattr(program, "SECONDS_BETWEEN_TRIES", 0.01)
        monkeypatch.setattr(program, "save_trained", fails_first(program.save_trained))
    authority = Authority(tmp_path)
    (tmp_path / "tokens").write_text(TOKENS)
    for name in ("alice", "bob"):
        (tmp_path / name).write_text(name + "\n")
    with Net(tmp_path, tls=authority.issue("localhost"), tokens=str(tmp_path / "tokens")) as net:
        for client_id, name in enumerate(("alice", "bob")):
            net.client(client_id, tls=authority.issue(f"client-{name}"), token_file=str(tmp_path / name))
        net.join()
        assert not net.failures, net.failures
    server, clients = make_parties(net.cfg)
    for _ in parties.run(server, clients):
        pass
    files = (net.folder.path / "server", tmp_path / "client0/client", tmp_path / "client1/client")
    run_id = served_run_id(net.program.coordinator.name, net.program.coordinator.membership.generation)
    for file, party in zip(files, (server, *clients), strict=True):
        part = load_part(file.with_suffix(".safetensors"))
        jax.tree.map(np.testing.assert_array_equal, (part.params, part.stats), party.state[:2])
        assert part.run_id == run_id
    assert "no record of epoch 1 yet: [Errno 28] No space left" in caplog.text
    assert caplog.text.count("safetensors cannot be written: [Errno 28] No space left") == 3
    summary = net.folder.read_summary()
    again = ServerProgram(net.cfg, ServeOptions(listen="localhost:0"), net.folder)
    assert again.coordinator._readies._samples == (server.spec.schedule.samples, server.spec.schedule.test_samples)
    again.close()
    assert len(net.folder.read_history()) == 1
    assert summary["test"] == server.test.means(server.spec.task)
    file = net.folder.path / "server.safetensors"
    part = load_part(file)
    assert finish(net.cfg, net.folder) == []
    # As where the server ends after it has told all clients that training is over, who then have gone.
    for name in ("server.safetensors", "summary.json", "metrics.jsonl"):
        (net.folder.path / name).unlink()
    assert finish(net.cfg, net.folder) == ["server.safetensors", "summary.json"]
    assert len(net.folder.read_history()) == 1
    again, when = net.folder.read_summary(), "utc"  # all but the time at which it was written
    assert again["environment"].pop(when) >= summary["environment"].pop(when) and again == summary
    anew = load_part(file)
    assert (anew.run_id, anew.step) == (part.run_id, part.step)
    jax.tree.map(np.testing.assert_array_equal, anew[1:3], part[1:3])
    if plots.available():
        assert (net.folder.path / "curves.png").exists() and list((net.folder.path / "tensorboard").iterdir())
    said = caplog.text
    assert "is ready; training waits for clients [" in said and "epoch 1 of 1" in said
    assert said.count("all clients are ready: training begins, and its first steps compile") == 1
    traffic = summary["traffic"]
    assert traffic.items() >= run_traffic(server.spec, net.cfg.epochs).to_json().items()
    assert traffic["received_bytes"] > traffic["uplink_bytes"] > 0
    assert traffic["sent_bytes"] > traffic["downlink_bytes"] > 0


@pytest.mark.slow
def test_a_client_measures_its_link_and_not_the_server(tmp_path):
    """The server compiles for seconds; a message and its answer take the line's delay at least."""
    with Net(tmp_path, LINK) as net, Proxy(net.address, megabits=None, delay_ms=50) as link:
        clients = [net.client(client_id, server=link.address) for client_id in range(2)]
        net.join()
        assert not net.failures, net.failures
    for number, client in enumerate(clients):
        party = client.session.party
        saved = load_part(tmp_path / f"client{number}" / "client.safetensors")
        assert saved.up_bits == pytest.approx(float(party.up_bits), rel=1e-5)
        most_bytes = 1000 + party.spec.features.batch_leaves(10)[0].size * LINK.cut_bits / 8
        assert most_bytes / 10 < party.bytes_per_second < most_bytes / 0.1


@pytest.mark.slow
def test_messages_in_chunks_train_the_same(tmp_path, monkeypatch):
    """Every payload is longer than a frame; small ones stand for those of more than two gigabytes."""
    monkeypatch.setattr(frames, "FRAME_BYTES", 100)
    chunks, before = [], frames.Joiner.add

    def add(self, frame):
        found = before(self, frame)
        chunks.append(found is None)
        return found

    monkeypatch.setattr(frames.Joiner, "add", add)
    with Net(tmp_path) as net:
        for client_id in range(2):
            net.client(client_id)
        net.join()
        assert not net.failures, net.failures
    assert sum(chunks) > 100
    server, clients = make_parties(net.cfg)
    for _ in parties.run(server, clients):
        pass
    part = load_part(net.folder.path / "server.safetensors")
    jax.tree.map(np.testing.assert_array_equal, part.params, server.state.params)


def hello(client=0):
    return pb.FromClient(hello=pb.Hello(protocol=5, client=client))


def answer_to(address, *messages, token=None):
    """What the server says last, or why it ends the stream."""
    connection = Connection(address, TlsFiles(), token)
    try:
        for message in messages:
            connection.send(message)
        said = connection.receive(20).WhichOneof("kind")
        return said if len(messages) == 1 else connection.receive(20)
    except ConnectionLost as lost:
        return lost
    finally:
        connection.close()


def test_a_training_server_checks_whose_token_it_is(tmp_path, caplog):
    (tmp_path / "tokens").write_text(TOKENS)
    with Net(tmp_path, tokens=str(tmp_path / "tokens")) as net:
        none = "the server wants a token, and none has come: --token-file gives one"
        for token, says in ((None, none), ("", none), ("mallory", "no such token")):
            lost = answer_to(net.address, hello(), token=token)
            assert str(lost) == says and lost.final
        lost = answer_to(net.address, hello(0), token="bob")
        assert str(lost) == "no such token for client 0" and lost.final
        assert answer_to(net.address, hello(0), token="alice") == "welcome"
        assert answer_to(net.address, hello(1), token="bob") == "welcome"
        assert net.program.metrics.refused._value.get() == 4
        assert (
            caplog.text.count("refused: ") == caplog.text.count("refused: 1 call, the last from ") == 1
        )  # in a minute
    assert caplog.text.count("refused: ") == 2 and "refused: 3 calls, the last from" in caplog.text  # at the end


def test_a_message_that_is_too_long_is_not_repeated(tmp_path):
    with Net(tmp_path, max_megabytes=1) as net:
        lost = answer_to(net.address, hello(), pb.FromClient(request=pb.Request(payload=[bytes(2 << 20)])))
        assert "larger than max" in str(lost) and lost.final
        there = RemoteServer(net.address)
        with pytest.raises(ValueError, match=rf"^{net.address}: .* a trained part \(msjax serve --part\)"):
            there.describe()
        there.close()
        lost = answer_to(net.address, pb.FromClient(goodbye=pb.Goodbye()))
        assert "the first message must be Hello" in str(lost) and lost.final


OWN = """
import jax
import optax
from flax import nnx
from msjax import compress, config, models, tasks


class Client(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return {{"h": jax.nn.relu(self.conv(x)), "dark": x[..., 0] < 0}}


class Server(nnx.Module):
    def __init__(self):
        self.out = nnx.Linear(8, 10, rngs=nnx.Rngs(1))

    def __call__(self, features):
        return self.out(features["h"].mean((1, 2))) + features["dark"].mean((1, 2))[:, None]


def make_model(summary):
    client, server = Client(), Server()
    features = jax.eval_shape(lambda x: client(x), summary.inputs.batch(1))
    {returned}


def make_task():
    return tasks.custom(tasks.cross_entropy, {{"top1_percent": tasks.mean_of(hits, 100.0)}}, name={name!r})


def hits(outputs, labels):
    return outputs.argmax(-1) == labels


def make_optimizer(learning_rate):
    return optax.lion(learning_rate, weight_decay=0.1)


def get_config():
    return config.Config(
        model=config.ModelConfig(name=":make_model"),
        task=config.TaskConfig(name=":make_task"),
        optim=config.OptimConfig(kind=":make_optimizer", learning_rate=0.001),
        codec=compress.RandK(0.5),
        clients=2,
        batch_size=10,
        epochs=1,
    )
"""
ALL = "return client, server"
OF_SERVER = (
    "return models.RemotePart({'h': jax.ShapeDtypeStruct((4, 4, 8), 'float32'), "
    "'dark': jax.ShapeDtypeStruct((8, 8), 'bool')}), server"
)
OF_CLIENT = "return client, models.RemotePart(jax.ShapeDtypeStruct((10,), 'float32'))"


def preset(path, name, returned, task="mine"):
    file = path / f"{name}.py"
    file.write_text(OWN.format(returned=returned, name=task))
    return config.load_preset(str(file))


@pytest.mark.slow
def test_each_party_has_its_own_code(tmp_path):
    """Of a model of one's own each has its part alone, and an optimizer; the same numbers as of one that has both."""
    whole = preset(tmp_path, "whole", ALL)
    with Net(tmp_path, preset(tmp_path, "server", OF_SERVER)) as net:
        for client_id in (0, 1):
            net.client(client_id, preset(tmp_path, f"client{client_id}", OF_CLIENT))
        net.join()
        assert not net.failures, net.failures
    server, clients = make_parties(whole)
    for _ in parties.run(server, clients):
        pass
    part = load_part(net.folder.path / "server.safetensors", preset=whole)
    jax.tree.map(np.testing.assert_array_equal, part.params, server.state.params)
    assert net.folder.read_summary()["test"] == server.test.means(server.spec.task)


def test_unlike_parties_are_told_what_differs(tmp_path):
    with Net(tmp_path, preset(tmp_path, "server", ALL)) as net:
        net.client(0)
        net.client(1, preset(tmp_path, "client", ALL, task="another"))
        for thread in net.threads[1:]:
            thread.join(120)
        assert "functions do not travel: give this client its own preset" in str(net.failures.pop(0))
        told = str(net.failures.pop(1))
        assert "server and client must have the same run, but task is 'mine' here and 'another' there" in told
        assert not net.failures


def test_a_server_that_stops_says_so(tmp_path):
    with Net(tmp_path) as net:
        net.client(0)
        deadline = time.monotonic() + 60
        while not net.program.metrics.connected._value.get():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        net.program.stop("by a signal")
        net.join()
        assert isinstance(net.failures["server"], Stopped)
        assert str(net.failures[0]) == "the server stopped: by a signal" and isinstance(net.failures[0], Interrupted)


def test_a_finished_run_goes_on_to_more_epochs(tmp_path, capsys):
    """With the numbers of one that had as many from the beginning, whose learning rate is constant."""
    optim = config.OptimConfig(learning_rate=0.01, schedule="constant")
    cfg = dataclasses.replace(CFG, optim=optim, epochs=2)
    with Net(tmp_path, cfg) as net:
        for client in range(2):
            net.client(client)
        net.join()
        assert not net.failures, net.failures
    run = str(tmp_path / "run")
    for epochs, says in (("2", "must be a run that is not finished"), ("0", "epochs must be an integer of at least 1")):
        assert cli.run("serve", ["--resume", run, "--epochs", epochs]) == 2 and says in capsys.readouterr().err
    (tmp_path / "run/metrics.jsonl").rename(tmp_path / "metrics")  # as where the disk was full
    assert cli.run("serve", ["--resume", run, "--epochs", "1"]) == 2
    assert "epochs must be above 2, which the run has done or is in, got 1" in capsys.readouterr().err
    (tmp_path / "metrics").rename(tmp_path / "run/metrics.jsonl")
    with socket.create_server(("localhost", 0)) as line:
        address = f"localhost:{line.getsockname()[1]}"
    net.failures, net.threads, net.address = {}, [], address
    for client in range(2):
        net.client(client)
    assert cli.run("serve", ["--resume", run, "--epochs", "3", "--listen", address]) == 0
    net.join()
    assert not net.failures, net.failures
    server, clients = make_parties(dataclasses.replace(cfg, epochs=3))
    for _ in parties.run(server, clients):
        pass
    for file, party in (("run/server", server), *((f"client{n}/client", clients[n]) for n in range(2))):
        part = load_part((tmp_path / file).with_suffix(".safetensors"))
        jax.tree.map(np.testing.assert_array_equal, party.state.params, part.params)
    folder, found = RunFolder.open(run, read_only=True)
    assert found.epochs == 3 and [record["epoch"] for record in folder.read_history()] == [1, 2, 3]
    assert folder.read_summary()["test"] == folder.read_history()[-1]["test"]


def test_a_server_whose_disk_is_full_tries_until_it_has_written_its_part(tmp_path, monkeypatch, caplog):
    pauses, full = [], iter(2 * [OSError(28, "No space left on device")])
    cfg = dataclasses.replace(CFG, out=str(tmp_path))
    folder = RunFolder.create(cfg, "run")
    program = ServerProgram(cfg, ServeOptions(listen="localhost:0"), folder)

    def save(*args, **names):
        for error in full:
            raise error

    monkeypatch.setattr(server_program, "save_trained", save)
    monkeypatch.setattr(server_program.drive, "serve", lambda *ends: program._save_part())  # all that counts of a run
    monkeypatch.setattr(server_program.drive, "linger", lambda *args: pauses.append(args[-1]))
    monkeypatch.setattr(server_program.served_folder, "write_results", lambda *args: "written")
    program._save_end = lambda: None
    program._parts = program.coordinator.run = mock.Mock()
    try:
        assert program.train() == "written" and pauses == [30.0, 30.0]
    finally:
        program.coordinator.run = None
        program.close()
        folder.close()
    assert caplog.text.count("server.safetensors cannot be written: [Errno 28] No space left on device") == 2


def test_a_steps_seconds_begin_when_training_does_or_goes_on(tmp_path, monkeypatch):
    cfg = dataclasses.replace(CFG, out=str(tmp_path))
    folder = RunFolder.create(cfg, "run")
    program = ServerProgram(cfg, ServeOptions(listen="localhost:0"), folder)
    coordinator = program.coordinator
    schedule, seconds = Schedule(Parallel(), 2, 4, 12, 2, 2), program.metrics.step_seconds._sum.get
    coordinator.run = mock.Mock(schedule=schedule, saved_step=0)
    first, now = next(schedule.exchanges(0)), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    try:
        coordinator.ready_at = coordinator.restored_at = now - 5.0
        program._count(first)
        assert seconds() == pytest.approx(5)
        program._count(first)
        assert seconds() == pytest.approx(5)
        program._step_began -= 100.0
        coordinator.restored_at = now - 10.0  # after a wait of 90 seconds
        program._count(first)
        assert seconds() == pytest.approx(15)
        assert program._pace.status(0).startswith(f"{2 * 2 * len(first.clients) / 10:.0f} samples/s")
    finally:
        coordinator.run = None
        program.close()
        folder.close()


def test_counts_go_on_where_an_earlier_process_left_them(tmp_path):
    """Also those since the last record of an epoch; the wait for the clients is apart."""
    with Net(tmp_path) as net:
        file = net.folder.path / "counts.json"
        earlier = {"received_bytes": 100.0, "sent_bytes": 50.0, "seconds": 7.0, "waited_seconds": 3.0}
        file.write_text(json.dumps(earlier))
        program = ServerProgram(net.cfg, ServeOptions(listen="localhost:0"), net.folder)
        request = pb.Request(payload=[b"1234"])
        program.metrics.received(0, request)
        program._began -= 60.0  # nobody has come for a minute
        program.close()
        counts = json.loads(file.read_text())
        assert counts["received_bytes"] == 100 + request.ByteSize() and counts["sent_bytes"] == 50
        assert type(counts["received_bytes"]) is type(counts["sent_bytes"]) is int
        assert counts["seconds"] == 7.0 and 63 <= counts["waited_seconds"] < 120
        program.coordinator.membership = dataclasses.replace(
            program.coordinator.membership, first_seconds=(((None, (0, 10)), 9.0), (((0, 10), (1, 10)), 3.5))
        )
        program.metrics.received(0, request)
        program._store.save(1, Held({"state": np.zeros(1)}, {}))  # as what led to a checkpoint is part of it
        assert json.loads(file.read_text())["received_bytes"] == 100 + 2 * request.ByteSize()
        program._store.close()
        again = ServerProgram(net.cfg, ServeOptions(listen="localhost:0"), net.folder)
        assert again.coordinator.membership.first_seconds == program.coordinator.membership.first_seconds
        again.close()
        file.write_text("damaged")
        ServerProgram(net.cfg, ServeOptions(listen="localhost:0"), net.folder).close()


def assert_nobody_watches(channel):
    """Who watches a server's health would hold one of its calls, and needs no token."""
    watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    with pytest.raises(grpc.RpcError) as refused:
        next(watched)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_who_watches_a_servers_health_holds_no_call(tmp_path):
    with Net(tmp_path) as net, grpc.insecure_channel(net.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert_nobody_watches(channel)


def assert_answered_unasked(channel, *methods):
    """Calls that send nothing, and do not say that nothing comes, end all the same."""
    leave = threading.Event()

    def says_nothing():
        leave.wait(60)
        yield from ()

    named = {f"grpc.health.v1.Health/{name}": name for name in ("Check", "Watch")} | dict.fromkeys(methods)
    calls = {method: channel.stream_stream(f"/{method}")(says_nothing(), timeout=60) for method in named}
    try:
        for method, call in calls.items():
            answers = call if method.endswith("Check") or method in methods else iter(())
            for answer in answers:
                assert answer
            good = grpc.StatusCode.UNIMPLEMENTED if method.endswith("Watch") else grpc.StatusCode.OK
            assert call.code() is good
    finally:
        leave.set()


def unread(stack, address, method, said, count, token=None, *, in_turn=False):
    """Returns as many calls that say one thing and take five bytes of the answer; they last until `stack` ends.

    With `in_turn` each has come to the server before the next is made.
    """
    options = [("grpc.http2.lookahead_bytes", 5), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    leave, held = threading.Event(), []

    def says():
        yield said
        leave.wait(60)

    for number in range(count):
        if number % 8 == 0:
            channel = stack.enter_context(grpc.insecure_channel(address, options))
        held.append(channel.stream_stream(f"/{method}")(says(), metadata=metadata_of(token)))
        if in_turn:
            held[-1].initial_metadata()
    stack.callback(leave.set)
    stack.callback(held.clear)  # a call that nobody refers to ends
    return held


HELLO = pb.FromClient(hello=pb.Hello(protocol=messages.PROTOCOL, client=0, instance="one"))


@pytest.mark.parametrize(
    ("method", "said", "most"),
    [("msjax.v2.Split/Train", HELLO.SerializeToString(), 2), ("grpc.health.v1.Health/Check", b"", 8)],
)
def test_who_does_not_read_keeps_nobody_out(tmp_path, method, said, most):
    """Whatever a server does, gRPC ends no call whose client takes nothing of the answer."""
    with Net(tmp_path) as net, contextlib.ExitStack() as stack:
        held = unread(stack, net.address, method, said, most_calls(net.cfg.clients) + 4)
        deadline = time.monotonic() + 30
        while sum(call.is_active() for call in held) > most:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        connection = Connection(net.address, TlsFiles(), None)
        connection.send(pb.FromClient(hello=pb.Hello(protocol=messages.PROTOCOL, client=1)))
        assert connection.receive(20).WhichOneof("kind") == "welcome"
        connection.close()


def test_who_sends_nothing_holds_no_call(tmp_path):
    """A unary call would wait for its message, of which strangers need not send any."""
    with Net(tmp_path) as net, grpc.insecure_channel(net.address) as channel:
        assert_answered_unasked(channel)


def test_an_address_that_is_taken(tmp_path):
    with Net(tmp_path) as net, pytest.raises(ValueError, match="listen must be a free host:port"):
        ServerProgram(net.cfg, ServeOptions(listen=net.address), net.folder)

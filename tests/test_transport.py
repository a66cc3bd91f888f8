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

from msjax import _network, compress, config, data, parties
from msjax.protocol import Phase
from msjax.transport import client as client_lib
from msjax.transport import server as server_lib
from msjax.transport import split_pb2 as pb

from .test_parties import MODES, SMALL, dataset, make_parties

SECONDS = 120  # after which a test gives up


@pytest.fixture(autouse=True)
def random_data(monkeypatch):
    ds = data.Dataset("random", *dataset(), 10, np.float32([0.5]), np.float32([0.25]))
    monkeypatch.setattr(data, "load", lambda *args, **options: ds)


class Net:
    """A server and clients in threads of this process, each with a folder of its own under `path`."""

    def __init__(self, path, cfg, **options):
        self.path, self.cfg = path, cfg
        self.server_options = _network.ServeOptions(listen="localhost:0", checkpoint_steps=2, **options)
        self.runners, self.threads, self.failures, self.finals = {}, {}, {}, {}
        self.address = None
        self.start_server()

    def start_server(self, listen=None):
        (self.path / "server").mkdir(exist_ok=True)
        options = self.server_options if listen is None else dataclasses.replace(self.server_options, listen=listen)
        self.serving = _network.Serving(self.cfg, options, self.path / "server")
        self.address = self.address or f"localhost:{self.serving.port}"
        self.server_thread = self._thread("server", self.serving.train)

    def start_client(self, number, wrap=lambda connection: connection, **options):
        options = {"server": self.address, "checkpoint_steps": 2, "answer_seconds": 20.0, **options}
        runner = _network.make_runner(
            _network.ClientOptions(number, state=str(self.path / f"client{number}"), **options)
        )
        connect = runner._connect
        runner._connect = lambda: wrap(connect())
        self.runners[number] = runner
        self._thread(number, runner.train)

    def _thread(self, name, target):
        def run():
            try:
                self.finals[name] = target()
            except Exception as error:
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
            assert not self.threads[name].is_alive(), f"{name} hangs"

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


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_network_equals_one_program(tmp_path, mode):
    cfg = dataclasses.replace(SMALL, mode=mode, grad_codec=compress.StochasticUniform(bits=8))
    with net(tmp_path, cfg) as it:
        for number in range(cfg.clients):
            it.start_client(number)
        it.join()
        assert_equal_to_program(it, cfg)
        history = it.serving.progress["history"]
        assert [r["epoch"] for r in history] == [1, 2]
        assert history[0]["test"].keys() == {"loss", "top1_percent", "top5_percent"}
        text = it.serving.metrics.text()
        assert 'msjax_exchanges_total{phase="FEATURES"}' in text and "msjax_received_bytes_total" in text


@pytest.mark.parametrize("mode", [MODES[1], MODES[2], MODES[3]], ids=str)
def test_client_that_lost_its_memory(tmp_path, mode):
    """A client dies and starts anew from its checkpoints, at an arbitrary point: all go back, the result is the same."""
    cfg = dataclasses.replace(SMALL, mode=mode, epochs=3)
    with net(tmp_path, cfg) as it:
        for number in range(cfg.clients):
            it.start_client(number)
        for step in (3, 5) if mode.kind != "sequential" else (9, 17):
            it.wait_for_step(step)
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
        it.serving._server.stop(None).wait()
        it.serving.coordinator._assemble = None
        it.serving.coordinator.stop("killed")
        it.join("server")
        it.failures.pop("server")
        it.serving.coordinator._store.close()
        it.start_server(it.address)
        it.join()
        assert_equal_to_program(it, cfg)

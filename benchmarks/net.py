"""Parties for benchmarks: a run on random images, and its coordinator and clients behind gRPC in one program."""

import argparse
import pathlib
import threading
import time
import uuid
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import proxy
from msjax import build, config, data
from msjax.compress import Identity
from msjax.distributed import agreement, drive
from msjax.distributed.channel import Stop
from msjax.distributed.coordinator import Coordinator, Stopped
from msjax.distributed.membership import Policy
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.rpc.connection import Connection
from msjax.distributed.rpc.security import TlsFiles, Tokens
from msjax.distributed.rpc.server import most_silent
from msjax.distributed.rpc.training import TrainEndpoint, TrainServicer
from msjax.distributed.session import ClientSession, Own
from msjax.distributed.stores import ClientStore, ServerStore
from msjax.split import parties
from msjax.split.schedule import Exchange

TINY = {"model_name": "convnet", "model_width": 1.0}
"""The smallest network that there is, on images of the digits' size."""
_STUCK_SECONDS = 900.0


class Case(NamedTuple):
    """A run of some steps on random images."""

    cfg: config.Config
    run: build.Built
    own: parties.ClientData
    """Of every client: the bytes that are sent depend on the shapes alone."""
    description: str

    @classmethod
    def of(cls, options: argparse.Namespace, cut: str, *, steps: int, **compressed: Any) -> "Case":
        """Returns the run that the options of the command describe.

        `compressed` are fields of its config that say what is compressed; by default nothing is.
        """
        tiny = options.model_name == TINY["model_name"]
        shape = (8, 8, 1) if tiny else (32, 32, 3)
        cfg = config.Config(
            model=config.ModelConfig(name=options.model_name, width=options.model_width, cut=cut),
            data=config.DataConfig(name="digits" if tiny else "cifar10"),
            optim=config.OptimConfig(learning_rate=0.01, schedule="constant"),
            clients=options.clients,
            batch_size=options.batch,
            epochs=1,
            seed=options.seed,
            **{"codec": Identity()} | compressed,
        )
        samples = steps * options.batch
        rng = np.random.default_rng(options.seed)
        images = rng.integers(0, 256, (samples, *shape), dtype=np.uint8)
        train = data.Arrays(images, rng.integers(0, 10, samples, dtype=np.int32))
        mean, std = (np.full(shape[2], value, np.float32) for value in (0.5, 0.25))
        summary = build.DataSummary.of(data.Dataset(cfg.data.name, train, train, 10, mean, std))
        run = build.build(cfg, summary, samples=samples, test_samples=0)
        own = parties.ClientData(train, data.Arrays(*train[:0]))
        return cls(cfg, run, own, agreement.describe(run.spec, summary))

    @property
    def exchanges(self) -> list[Exchange]:
        """Those of every step."""
        return list(self.run.spec.schedule.step_exchanges(0))

    def client(self, client_id: int) -> parties.Client:
        """Returns a client before the first step."""
        return parties.Client(client_id, self.run.spec, self.run.client, self.own, self.cfg.seed)

    def server(self) -> parties.Server:
        """Returns the server before the first step."""
        return parties.Server(self.run.spec, self.run.server, self.cfg.seed)


class Net:
    """A coordinator behind gRPC and all clients, in threads of this program; `link` is between them, if any.

    Args:
      folder: for the parties' checkpoints.
      link: options of the proxy, or None for no proxy.
      lockstep: requests leave, and answers are taken, when all clients have theirs.
    """

    def __init__(self, case: Case, folder: pathlib.Path, *, link: dict[str, Any] | None, lockstep: bool):
        self.case, self.metrics = case, Metrics()
        clients = case.cfg.clients
        progress: dict[str, Any] = {}
        self.coordinator = Coordinator(
            case.cfg,
            lambda *_: (case.run.spec, lambda: case.run.server),
            ServerStore(folder / "server", progress),
            Policy(),
            self.metrics,
            run=uuid.uuid4().hex,
            progress=progress,
            checkpoint_steps=10**9,
        )
        self._endpoint = TrainEndpoint(ListenOptions(listen="127.0.0.1:0"), self.metrics, clients)
        self._servicer = TrainServicer(Tokens(None), self.metrics, most_silent=most_silent(clients))
        self._endpoint.start(self._servicer)
        address = str(self._endpoint.address)
        self.link = None if link is None else proxy.Proxy(address, **link)
        self._address = address if link is None else self.link.address
        self.clients: dict[int, parties.Client] = {}
        self.marks: list[float] = []
        """Lockstep: when requests were let go and when all had their answers, in turn."""
        self._together = threading.Barrier(
            clients, lambda: self.marks.append(time.perf_counter()), timeout=_STUCK_SECONDS
        )
        self._lockstep, self._folder = lockstep, folder
        self._on_exchange: Callable[[Exchange], None] = lambda exchange: None
        self._sessions = [self._session(client_id) for client_id in range(clients)]

    def _session(self, client_id):
        case = self.case
        own = Own(len(case.own.train), 0, case.description)
        return ClientSession(
            client_id,
            lambda cfg: own,
            lambda *_: self.clients.setdefault(client_id, case.client(client_id)),
            lambda run: ClientStore(self._folder / f"client{client_id}"),
            retry_seconds=0.0,
            on_exchange=lambda exchange: self._on_exchange(exchange),
        )

    def _connect(self):
        connection = Connection(self._address, TlsFiles(), None)
        return _Lockstep(connection, self._together) if self._lockstep else connection

    def train(self, on_step: Callable[[], None]) -> None:
        """Trains to the end; calls `on_step` at every step's end, while all clients wait and nothing is under way."""

        def at_end():
            jax.block_until_ready([self.coordinator.run.party.state, *(c.state for c in self.clients.values())])
            on_step()

        ends = threading.Barrier(len(self._sessions), at_end, timeout=_STUCK_SECONDS)
        last = self.case.exchanges[-1].phase

        def on_exchange(exchange):
            if exchange.phase == last:
                ends.wait()

        self._on_exchange = on_exchange
        with futures.ThreadPoolExecutor(len(self._sessions) + 1) as pool:
            running = [pool.submit(drive.serve, self.coordinator, self._servicer.inbox, self._servicer.carry)]
            running += [pool.submit(drive.take_part, session, self._connect) for session in self._sessions]
            try:
                futures.wait(running, return_when=futures.FIRST_EXCEPTION)
                failures = [f.exception() for f in running if f.done() and f.exception()]
            except KeyboardInterrupt as stop:
                failures = [stop]
            if failures:
                for barrier in (ends, self._together):
                    barrier.abort()
                self._servicer.inbox.put(Stop("a party failed"))
                self._endpoint.close()  # those who wait for an answer then know that none comes
        # A barrier that breaks does so for everyone; who broke it says why.
        for error in sorted(failures, key=lambda e: isinstance(e, threading.BrokenBarrierError | Stopped)):
            raise error

    def close(self) -> None:
        """Ends all connections."""
        self._servicer.close()
        self._endpoint.close()
        if self.link is not None:
            self.link.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Lockstep:
    """A connection whose requests leave, and whose answers are taken, when all clients have theirs."""

    def __init__(self, connection, together):
        self._connection, self._together = connection, together

    def send(self, message):
        if message.WhichOneof("kind") == "request":
            self._together.wait()
        self._connection.send(message)

    def receive(self, timeout):
        message = self._connection.receive(timeout)
        if message.WhichOneof("kind") == "answer":
            self._together.wait()
        return message

    def __getattr__(self, name):
        return getattr(self._connection, name)

"""A client's end of the network: it follows the script, repeats what was lost, and goes back where it is told to."""

import contextlib
import json
import logging
import queue
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc

from msjax import config, parties
from msjax.protocol import Phase
from msjax.transport import _messages, split_pb2_grpc
from msjax.transport import split_pb2 as pb
from msjax.transport._security import TlsFiles

log = logging.getLogger("msjax.client")

# Refusals that another try would meet again.
_FINAL = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Refused(Exception):
    """The server turned this client away, or the run ended before its time."""


class _Lost(Exception):
    """The connection, or an answer, was lost."""


class Connection:
    """One stream to the server."""

    def __init__(self, address: str, tls: TlsFiles, token: str | None, max_bytes: int = -1):
        self._channel = open_channel(address, tls, max_bytes)
        self._outbox: queue.Queue[pb.FromClient | None] = queue.Queue()
        self._inbox: queue.Queue[pb.FromServer | Exception] = queue.Queue()
        metadata = [("authorization", f"Bearer {token}")] if token else None
        self._stream = split_pb2_grpc.SplitStub(self._channel).Train(iter(self._outbox.get, None), metadata=metadata)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            for message in self._stream:
                self._inbox.put(message)
            self._inbox.put(_Lost("the server closed the stream"))
        except grpc.RpcError as error:
            # A message that is too large will be so again; the code alone may also mean too many calls.
            refused = error.code() in _FINAL or "larger than max" in (error.details() or "")
            self._inbox.put(Refused(error.details()) if refused else _Lost(error.details()))

    def send(self, message: pb.FromClient) -> None:
        self._outbox.put(message)

    def receive(self, seconds: float | None) -> pb.FromServer:
        """The server's next message.

        Raises:
          _Lost: the stream has ended, or nothing came in time.
          Refused: the server turned the client away.
        """
        try:
            message = self._inbox.get(timeout=seconds)
        except queue.Empty:
            raise _Lost(f"no answer within {seconds} s") from None
        if isinstance(message, Exception):
            raise message
        return message

    def finish(self, seconds: float) -> None:
        """Bids farewell, and waits for the server to end the stream."""
        self.send(pb.FromClient(farewell=pb.Farewell()))
        with contextlib.suppress(_Lost, Refused):
            while True:
                self.receive(seconds)

    def close(self) -> None:
        """Breaks the stream off, unless it has ended."""
        self._stream.cancel()
        self._outbox.put(None)
        self._channel.close()


def open_channel(address: str, tls: TlsFiles, max_bytes: int) -> grpc.Channel:
    """A channel to `address`, with TLS where there are files for it; options as `channel_options`."""
    options = channel_options(max_bytes)
    if tls:
        return grpc.secure_channel(address, tls.client(), options)
    # What is sent in the open must not leave the machine for a proxy that the environment names.
    return grpc.insecure_channel(address, [*options, ("grpc.enable_http_proxy", 0)])


def channel_options(max_bytes: int) -> list[tuple[str, Any]]:
    """gRPC's options: messages up to `max_bytes` (-1 for any), and pings that find a dead link within half a minute."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", max_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        # A connection of its own for every client, also for several in one program.
        ("grpc.use_local_subchannel_pool", 1),
    ]


class Own(NamedTuple):
    """What a client says of its data."""

    samples: int
    """How many it draws in an epoch."""
    test_samples: int
    input_shape: tuple[int, ...]
    num_classes: int


class Runner:
    """Takes one client through a run.

    Args:
      connect: makes a `Connection`.
      load: from the run's config to the client's `Own`.
      build: from (config, samples, test_samples) to the `parties.Client`, as it is before the first step.
      open_store: from the run's name to its store of checkpoints, with `steps()`, `save(step, state)`,
        `restore(step, state)`, `prune(step)`, `close()`.
      answer_seconds: after which an answer counts as lost, and the request is repeated over a new connection.
      retry_seconds: for how long a lost connection is tried again.
    """

    def __init__(
        self,
        number: int,
        connect: Callable[[], Connection],
        load: Callable[[config.Config], Own],
        build: Callable[..., parties.Client],
        open_store: Callable[[str], Any],
        *,
        compression: str | None = None,
        answer_seconds: float = 600.0,
        retry_seconds: float = 600.0,
    ):
        self.config: config.Config | None = None  # of the run, once the server has told it
        self._number, self._connect, self._load, self._build = number, connect, load, build
        self._open_store, self._store = open_store, None
        self._compression = compression
        self._answer_seconds, self._retry_seconds = answer_seconds, retry_seconds
        self.run, self._generation = "", 0
        self._data = None
        self._party: parties.Client | None = None
        self._initial = None
        self._script = iter(())
        self._exchange = self._following = None
        self._request: pb.FromClient | None = None
        self._early: pb.FromClient | None = None  # the following exchange's, where it could be made already
        self._send_half = False

    def train(
        self,
        on_exchange: Callable[[Any], None] = lambda exchange: None,
        on_end: Callable[[parties.Client], None] = lambda party: None,
    ) -> parties.Client:
        """Trains to the end, calls `on_end`, lets the server know, and returns the client as it then is.

        Raises:
          Refused: the server turned the client away, or stopped.
          ConnectionError: the server was away for longer than `retry_seconds`, with steps left to do.
        """
        self._on_exchange, self._on_end = on_exchange, on_end
        self._last_contact = time.monotonic()
        wait, told = 0.1, ""
        while True:
            connection, contact = self._connect(), self._last_contact
            try:
                self._attend(connection)
                return self._party
            except _Lost as lost:
                if self._last_contact > contact:  # it was there until now
                    self._last_contact = time.monotonic()
                away = time.monotonic() - self._last_contact
                if away > self._retry_seconds:
                    if self._party is not None and self._exchange is None:
                        log.warning("all steps are done, but the server did not say so: %s", lost)
                        on_end(self._party)
                        return self._party
                    raise ConnectionError(f"the server has been away for {away:.0f} s: {lost}") from None
                wait = 0.1 if away < 1 else min(10.0, wait * 2)
                if str(lost) != told:
                    log.warning("%s; trying again for up to %.0f s", lost, self._retry_seconds - away)
                    told = str(lost)
                time.sleep(wait * random.uniform(0.5, 1.0))
            finally:
                connection.close()

    def _attend(self, connection):
        """One connection's life; returns at the end of the run."""
        hello = pb.Hello(protocol=_messages.PROTOCOL, client=self._number, run=self.run, generation=self._generation)
        connection.send(pb.FromClient(hello=hello))
        while True:
            # Until training has begun, the server waits for the other clients, however long they take.
            message = connection.receive(self._answer_seconds if self._request is not None else None)
            self._last_contact = time.monotonic()
            match message.WhichOneof("kind"):
                case "welcome":
                    self._welcome(connection, message.welcome)
                case "start":
                    self._start(message.start)
                    self._send(connection)
                    self._prepare()
                case "answer":
                    if self._take(message.answer):
                        self._send(connection)
                        self._prepare()
                case "finished":
                    if message.finished.error:
                        raise Refused(f"the server stopped: {message.finished.error}")
                    if self._party is not None and self._request is None:
                        self._on_end(self._party)
                        connection.finish(seconds=10.0)
                        return
                    if message.finished.dropped:
                        self._end_apart()
                        return
                    self._send(connection)  # the last answer was lost

    def _end_apart(self):
        """The run has ended without this client."""
        if self._party is not None and not self._party.keeps_result:
            log.warning("training ended while this client was away")
        elif self._party is None or not self._has_trained():
            raise Refused("training ended while this client was away; its half is not the trained one")
        self._on_end(self._party)

    def _welcome(self, connection, welcome):
        if welcome.protocol != _messages.PROTOCOL:
            raise Refused(f"the server's protocol is {welcome.protocol}, this client's {_messages.PROTOCOL}")
        if self.run and welcome.run != self.run:
            raise Refused("the server now serves another run, for which this client must be started anew")
        if self._store is None:
            # It becomes a folder's name.
            if not re.fullmatch("[0-9a-f]{32}", welcome.run):
                raise Refused(f"the run's name must be 32 hexadecimal digits, got {welcome.run!r}")
            self.run, self._store = welcome.run, self._open_store(welcome.run)
        self._checkpoint_steps = welcome.checkpoint_steps  # that of a server that was started anew may be another
        if self._data is None:
            self.config = config.from_json(json.loads(welcome.config))
            self._data = self._load(self.config)
        connection.send(pb.FromClient(ready=pb.Ready(**self._data._asdict())))

    def _start(self, start):
        """Goes to where the server says, unless the client has been there already."""
        known = start.generation == self._generation and self._party is not None and not start.half
        if known and (self._exchange is None or start.step <= self._exchange.step):
            return
        if self._party is None:
            self._party = self._build(self.config, start.samples, start.test_samples)
            self._initial = self._party.state
        self._generation = start.generation
        party = self._party
        if start.half:
            payload = _messages.decode(start.half, party.shapes.half())
            party.adopt(payload, start.step)
        elif start.step in self._store.steps():
            party.state = self._store.restore(start.step, self._initial)
        elif start.step == 0 or not party.needs_state(start.step):
            party.state = self._initial
        else:
            raise Refused(f"the run is at step {start.step}, of which this client has no checkpoint")
        party.begin()
        self._script = party.script(start.step)
        self._following = next(self._script, None)
        self._send_half, self._early = False, None
        self._next()

    def _next(self):
        """Goes on to the next exchange and makes its request."""
        self._exchange, self._following = self._following, next(self._script, None)
        self._request, self._early = self._early, None
        if self._exchange is None:
            self._save_at(self._party.end)  # should this process die before it has written its half
        elif self._request is None:
            self._request = self._make(self._exchange)

    def _make(self, exchange):
        party = self._party
        fields = {"generation": self._generation, "saved": self._save(exchange), "compression": self._compression}
        if self._send_half:
            fields["half"] = _messages.encode(party.half(), party.shapes.half(), self._compression)
            self._send_half = False
        return _messages.to_request(party.send(exchange), exchange, party.shapes.up(exchange), **fields)

    def _prepare(self):
        """While a request is on its way: what can be done of the exchange behind it without its answer."""
        following = self._following
        if following is None or self._early is not None:
            return
        if following.phase == self._exchange.phase == Phase.TEST:  # the half does not change in a test
            self._early = self._make(following)
        else:
            self._party.prepare(following)

    def _save(self, exchange):
        """Whether there is a checkpoint of the state before this step, where there should be one."""
        return self._party.may_checkpoint(exchange, self._checkpoint_steps) and self._save_at(exchange.step)

    def _save_at(self, step):
        if step in self._store.steps():
            return True
        try:
            self._store.save(step, self._party.state)
        except OSError as error:
            log.error("no checkpoint at step %d: %s", step, error)
            return False
        return True

    def _has_trained(self):
        """Whether nothing but tests are left."""
        left = (self._exchange, self._following, *self._script)
        return self._party is not None and all(e is None or e.phase in (Phase.TEST, Phase.RESULT) for e in left)

    def _send(self, connection):
        if self._request is not None:
            connection.send(self._request)

    def _take(self, answer):
        """Goes on with an answer; False where it is a repeated one."""
        request = self._request and self._request.request
        if request is None or answer.generation != self._generation or answer.key != request.key:
            return False
        exchange = self._exchange
        form = self._party.shapes.down(exchange)
        # No half is handed on before one was given: not even later, if those whose turn it was were dropped.
        payload = _messages.decode(answer.payload, form, optional=self._exchange.phase == Phase.TAKE)
        self._party.receive(exchange, parties.Message(payload))
        self._store.prune(answer.saved_step)
        self._send_half = answer.send_half
        self._on_exchange(exchange)
        self._next()
        return True

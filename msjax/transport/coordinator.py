"""The run as the server leads it: the clients' messages of each exchange are collected, and answered.

The threads that read the clients' streams (see `server`) hand in what comes; the one that calls `Coordinator.train`
walks through the script.
"""

import dataclasses
import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from msjax import config, parties
from msjax.assemble import Assembly
from msjax.protocol import Exchange, Phase
from msjax.transport import _messages
from msjax.transport import split_pb2 as pb

log = logging.getLogger("msjax.server")


class Stopped(Exception):
    """Training ended before its time; the last checkpoint is what there is to go on from."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the server does about clients that are late."""

    deadline_seconds: float = 300.0
    """How long an exchange waits for a client, from when the first of the others has come, and the end for all to hear
    of it."""
    stragglers: Literal["wait", "drop", "stop"] = "wait"
    """After that: wait on, and say so; drop those that have not come, until they come back; or stop the run."""
    min_clients: int = 1
    """drop: where fewer than these would be left, wait all the same."""

    def __post_init__(self):
        if not self.deadline_seconds > 0:
            raise ValueError(f"deadline_seconds must be above 0, got {self.deadline_seconds}")
        if self.min_clients < 1:
            raise ValueError(f"min_clients must be at least 1, got {self.min_clients}")
        if self.stragglers not in ("wait", "drop", "stop"):
            raise ValueError(f"stragglers must be wait, drop or stop, got {self.stragglers!r}")


class _Again(Exception):
    """Training goes back to the last checkpoint."""


class _Session:
    """One client's stream, while it lasts."""

    def __init__(self, client: int, peer: str):
        self.client, self.peer = client, peer
        self.outbox: queue.Queue[pb.FromServer | None] = queue.Queue()
        self.ready: pb.Ready | None = None
        self.fault = ""  # why the stream ends, where the client is to blame
        self.continues = False  # it knows where it is
        self.started = False

    def send(self, message: pb.FromServer) -> None:
        self.outbox.put(message)

    def close(self) -> None:
        self.outbox.put(None)


class Coordinator:
    """The state of a run that clients see, between their threads and the one that trains.

    Args:
      assemble: from (samples, test_samples, input_shape, num_classes) to the run's parts, called when all clients have
        said what data they have.
      store: of checkpoints: `latest()`, `save(step, server, extra)`, `restore(step, server)`.
      run: names the run, also when it is resumed by another process: clients keep their checkpoints under it.
      compression: of the answers' bytes, as `msjax.wire` takes it.
    """

    def __init__(
        self,
        cfg: config.Config,
        assemble: Callable[..., Assembly],
        store: Any,
        policy: Policy,
        metrics: Any,
        *,
        run: str,
        checkpoint_steps: int = 100,
        compression: str | None = None,
    ):
        self.cfg, self.policy, self.metrics = cfg, policy, metrics
        self._assemble, self._store = assemble, store
        self._checkpoint_steps, self._compression = checkpoint_steps, compression
        self.run = run
        # The lock guards all below; whatever changes is announced on it.
        self._changed = threading.Condition()
        self._sessions: dict[int, _Session] = {}
        self._generation = 0
        self._start_step = 0
        self._begun: set[int] = set()  # who has been told to start in this generation
        self._active: set[int] = set(range(cfg.clients))
        self._returning: set[int] = set()
        self._pending: dict[int, tuple[Exchange, pb.Request, parties.Message]] = {}
        self._answered: dict[int, pb.FromServer] = {}
        self._halves_from: int | None = None
        self._lost_state = False
        self._ended = False
        self._content: set[int] = set()  # who has heard of the end and has all its answers
        self._stop: str | None = None
        self._ready: pb.Ready | None = None  # of a client at the start: what data all must have
        self.parts: Assembly | None = None
        self.shapes: parties.Shapes | None = None
        self._programs: parties.Programs | None = None
        self.party: parties.Server | None = None

    # -- What the clients' threads call. ---------------------------------------------------------------------------

    def join(self, hello: pb.Hello, peer: str) -> _Session:
        """Registers a client's stream; an older one of the same client is closed."""
        session = _Session(hello.client, peer)
        with self._changed:
            if (old := self._sessions.get(hello.client)) is not None:
                old.close()
            self._sessions[hello.client] = session
            self.metrics.connected.set(len(self._sessions))
            known = hello.run == self.run and hello.generation == self._generation and hello.generation > 0
            session.continues = known and hello.client in self._begun
            self._changed.notify_all()
        cfg = json.dumps(config.to_json(config.without_paths(self.cfg)))
        welcome = pb.Welcome(
            protocol=_messages.PROTOCOL, run=self.run, config=cfg, checkpoint_steps=self._checkpoint_steps
        )
        session.send(pb.FromServer(welcome=welcome))
        log.info("client %d joined from %s", hello.client, peer)
        return session

    def ready(self, session: _Session, ready: pb.Ready) -> None:
        """A client has its data; it starts when all have, or at once where the run is under way.

        Raises:
          ProtocolError: there is none, or it is unlike that of the others.
        """
        if not ready.samples:
            raise _messages.ProtocolError("a client must have at least one sample to train on, got 0")
        with self._changed:
            others = (s.ready for s in self._sessions.values() if s.ready is not None and s is not session)
            if (other := self._ready or next(others, None)) is not None and _kind_of(ready) != _kind_of(other):
                raise _messages.ProtocolError(
                    "all clients must have inputs of one shape and one number of classes, got "
                    f"{_kind_of(ready)} beside {_kind_of(other)}"
                )
            session.ready = ready
            if self.party is not None:
                self._admit(session)
            self._changed.notify_all()

    def _admit(self, session):
        client = session.client
        if self._ended:
            self._tell_end(session)
        elif (session.continues and client in self._active) or client not in self._begun:
            # In the first case it repeats its last request, if it had sent one.
            self._begun.add(client)
            self._start(session)
        elif client in self._active and (
            self.policy.stragglers != "drop" or len(self._active) <= self.policy.min_clients
        ):
            # It was in the run and does not know where: all go back to the last checkpoint.
            self._lost_state = True
        else:
            self._active.discard(client)
            self._pending.pop(client, None)
            self._returning.add(client)
        self._changed.notify_all()

    def _start(self, session, **fields):
        fields = {"step": self._start_step, **fields}
        plan = self.parts.plan
        numbers = {"samples": plan.samples, "test_samples": plan.test_samples}
        session.send(pb.FromServer(start=pb.Start(generation=self._generation, **numbers, **fields)))
        session.started = True

    def _tell_end(self, session):
        """One that still waits for an answer does not take this for the end: it gets both once it has asked again."""
        if session.client in self._active and not (session.started or session.continues):
            # It does not know where it is, but may have a checkpoint of the end.
            self._start(session, step=self.parts.plan.total_steps)
        dropped = session.client not in self._active
        session.send(pb.FromServer(finished=pb.Finished(dropped=dropped)))

    def receive(self, session: _Session, request: pb.Request) -> None:
        """A client's message of an exchange.

        Raises:
          ProtocolError: the client may not send that.
        """
        with self._changed:
            if self.party is None:
                raise _messages.ProtocolError("a request before the start")
            if request.generation != self._generation:
                return  # sent before the client heard of the new one
            if session.client in self._returning:
                return
            answered = self._answered.get(session.client)
            if answered is not None and answered.answer.key == request.key:
                session.send(answered)
                if self._ended:
                    self._tell_end(session)
                return
        exchange = _messages.from_key(self.parts.plan, request.key, session.client)
        message = _messages.from_request(request, self.shapes, exchange)
        with self._changed:
            if request.generation != self._generation:
                return
            if answered is not None and exchange.key < _tuple(answered.answer.key):
                return  # a duplicate of long ago
            self._pending[session.client] = (exchange, request, message)
            self.metrics.received(session.client, request)
            self._changed.notify_all()

    def farewell(self, session: _Session) -> None:
        """A client has heard of the end, and has all its answers.

        Raises:
          ProtocolError: there was no end.
        """
        with self._changed:
            if not self._ended:
                raise _messages.ProtocolError("a farewell before the end")
            self._content.add(session.client)
            self._changed.notify_all()

    def leave(self, session: _Session) -> None:
        with self._changed:
            if self._sessions.get(session.client) is session:
                del self._sessions[session.client]
                self.metrics.connected.set(len(self._sessions))
                log.info("client %d left", session.client)
            self._changed.notify_all()

    def stop(self, reason: str) -> None:
        """Ends training at the next opportunity."""
        with self._changed:
            self._stop = self._stop or reason
            self._changed.notify_all()

    # -- What the training thread calls. ---------------------------------------------------------------------------

    def train(
        self, on_exchange: Callable[[Exchange], None] = lambda exchange: None, on_end: Callable[[], None] = lambda: None
    ) -> None:
        """Trains to the end, calls `on_end`, and returns when the clients have heard of it.

        Raises:
          Stopped: `stop` was called, or the policy says so.
        """
        try:
            self._gather()
            while True:
                try:
                    for exchange in self.parts.plan.exchanges(self._start_step):
                        self._exchange(exchange)
                        on_exchange(exchange)
                    break
                except _Again:
                    self._go_back()
            on_end()
        except Exception as error:  # whatever it is, clients are not to wait for a server that is gone
            self._fail(str(error))
            raise
        self._end()

    def _end(self):
        """Tells the clients that training has ended, and waits until they have heard it.

        One whose last answer was lost asks for it again; how long that may take is the policy's deadline.
        """
        with self._changed:
            self._ended = True
            for session in self._sessions.values():
                if session.ready is not None:
                    self._tell_end(session)
            deadline = time.monotonic() + self.policy.deadline_seconds
            while missing := sorted(self._active - self._content):
                left = deadline - time.monotonic()
                if left <= 0 or self._stop is not None:
                    log.warning("clients %s did not hear that training has ended", missing)
                    break
                self._changed.wait(min(1.0, left))
            for session in self._sessions.values():
                session.close()

    def _gather(self):
        """Waits until all clients are ready, and starts."""
        everyone = set(range(self.cfg.clients))
        told = time.monotonic()
        with self._changed:
            while missing := everyone - {c for c, s in self._sessions.items() if s.ready is not None}:
                self._check_stop()
                if time.monotonic() - told > self.policy.deadline_seconds:
                    log.warning("training waits for clients %s to be ready", sorted(missing))
                    told = time.monotonic()
                self._changed.wait(1.0)
            readies = [self._sessions[c].ready for c in sorted(everyone)]
            self._ready = readies[0]
            samples, tests = min(r.samples for r in readies), min(r.test_samples for r in readies)
            self.parts = self._assemble(samples, tests, *_kind_of(self._ready))
            self.shapes, self._programs = self.parts.shapes(), self.parts.programs(self.cfg.seed)
            self._build()
            # Unlike those of another process that served this run.
            self._generation = secrets.randbits(48) + 1
            for client in sorted(everyone):
                self._admit(self._sessions[client])

    def _build(self):
        """The server's half from the last checkpoint, or new."""
        self.party = parties.Server(self.parts.plan, self.shapes, self._programs, self.parts.server)
        step = self._store.latest()
        self._start_step = step or 0
        if step is None:
            self._store.forget(self.party)
        else:
            self._store.restore(step, self.party)

    def _go_back(self):
        """A new generation, from the last checkpoint."""
        with self._changed:
            self._lost_state = False
            self._build()
            self._generation += 1
            self._pending.clear()
            self._answered.clear()
            self._returning.clear()
            self._active = set(range(self.cfg.clients))
            self._halves_from = None
            self._begun = set()
            log.warning("going back to step %d", self._start_step)
            self.metrics.restarts.inc()
            for client, session in self._sessions.items():
                if session.ready is not None:
                    self._begun.add(client)
                    self._start(session)

    def _exchange(self, exchange):
        messages = self._collect(exchange)
        if not messages:
            return  # everyone who should have taken part was dropped
        if exchange.phase in (Phase.TAKE, Phase.FEATURES):
            self._maybe_save(exchange)
        answers = self.party.handle(exchange, messages)
        form, encoded = self.shapes.down(exchange), {}
        with self._changed:
            # Someone may be waiting to come back: the next request of one client is to bring its half.
            asked = min(messages) if self._wants_half(exchange) else None
            self._halves_from = asked if asked is not None else self._halves_from
        for client, answer in answers.items():
            # Each is sent as soon as it is encoded; an average, which is the same for all, is encoded once.
            out = pb.FromServer()
            if id(answer.payload) not in encoded:
                encoded[id(answer.payload)] = _messages.encode(answer.payload, form, self._compression)
            out.answer.payload = encoded[id(answer.payload)]
            out.answer.generation, out.answer.send_half = self._generation, client == asked
            out.answer.key.CopyFrom(_messages.to_key(exchange))
            out.answer.saved_step = self._store.latest() or 0
            with self._changed:
                self._answered[client] = out
                self._pending.pop(client, None)
                if client in self._sessions:
                    self._sessions[client].send(out)
            self.metrics.sent(client, out.answer)

    def _collect(self, exchange):
        """The messages of an exchange, of all its clients or of those that came before the deadline."""
        began = time.monotonic()
        # The clock runs from the first message on: while none has come, it is not one that is late.
        deadline = began + self.policy.deadline_seconds if len(exchange.clients) == 1 else None
        with self._changed:
            while True:
                self._check_stop()
                if self._lost_state:
                    raise _Again
                self._let_in(exchange)
                expected = [c for c in exchange.clients if c in self._active]
                there = {
                    c: self._pending[c] for c in expected if c in self._pending and self._pending[c][0] == exchange
                }
                if len(there) == len(expected):
                    break
                if there and deadline is None:
                    deadline = time.monotonic() + self.policy.deadline_seconds
                if deadline is not None and time.monotonic() >= deadline:
                    if self._goes_on_without(exchange, sorted(set(expected) - set(there)), len(there)):
                        break
                    deadline = time.monotonic() + self.policy.deadline_seconds
                left = 1.0 if deadline is None else deadline - time.monotonic()
                self._changed.wait(min(1.0, max(0.01, left)))
        self.metrics.waited(time.monotonic() - began)
        self._requests = {c: request for c, (_, request, _) in there.items()}
        return {c: message for c, (_, _, message) in there.items()}

    def _goes_on_without(self, exchange, missing, came):
        """What the policy says of clients that have missed a deadline: whether the others go on."""
        self.metrics.stragglers.inc(len(missing))
        if self.policy.stragglers == "stop":
            raise Stopped(f"clients {missing} did not answer within {self.policy.deadline_seconds} s")
        # In turns, those who wait for theirs count as well.
        left = len(self._active) - len(missing) if len(exchange.clients) == 1 else came
        if self.policy.stragglers == "wait" or left < self.policy.min_clients:
            log.warning("step %d waits for clients %s", exchange.step, missing)
            return False
        log.warning("step %d goes on without clients %s", exchange.step, missing)
        self._active -= set(missing)
        for client in missing:
            self._pending.pop(client, None)
            if client in self._sessions:
                self._returning.add(client)
        return True

    def _maybe_save(self, exchange):
        """Saves where the script allows and every client has."""
        step, plan = exchange.step, self.parts.plan
        if not plan.may_checkpoint(step, self._checkpoint_steps) or step == self._start_step:
            return
        if exchange.phase == Phase.FEATURES and plan.sequential and plan.clients > 1:
            return  # saved before TAKE
        if exchange.phase == Phase.FEATURES and not all(r.saved for r in self._requests.values()):
            log.warning("no checkpoint at step %d: a client could not save", step)
            self.metrics.failed_saves.inc()
            return
        self._save(step)

    def _save(self, step):
        try:
            self._store.save(step, self.party)
        except OSError as error:
            # Training goes on; what is lost, should the server die, is the time since the last checkpoint.
            log.error("no checkpoint at step %d: %s", step, error)
            self.metrics.failed_saves.inc()

    def _wants_half(self, exchange):
        """Whether the answers of this exchange are the last of a step that someone waits to come back after."""
        asked_already = self._halves_from in self._active
        if not self._returning or asked_already or self.parts.plan.sequential:
            return False
        last = [e for e in self.parts.plan.step_exchanges(exchange.step) if e.phase <= Phase.AVERAGE][-1]
        return exchange == last and exchange.step + 1 < self.parts.plan.total_steps

    def _let_in(self, exchange):
        """Starts the clients that came back, where they can: with the half that another has brought."""
        here = [c for c in sorted(self._returning & set(exchange.clients)) if c in self._sessions]
        # In turns each is handed a half when its own begins.
        sequential = self.parts.plan.sequential
        if exchange.phase != (Phase.TAKE if sequential else Phase.FEATURES) or not here:
            return
        half = b""
        if not sequential:
            donor = self._pending.get(self._halves_from)
            if donor is None or donor[0] != exchange:
                return
            half, self._halves_from = donor[1].half, None
            if not half:
                return
        for client in here:
            self._returning.discard(client)
            self._active.add(client)
            self._answered.pop(client, None)
            log.info("client %d comes back at step %d", client, exchange.step)
            self._start(self._sessions[client], step=exchange.step, half=half)

    def _check_stop(self):
        if self._stop is not None:
            raise Stopped(self._stop)

    def _fail(self, error: str):
        with self._changed:
            for session in self._sessions.values():
                session.send(pb.FromServer(finished=pb.Finished(error=error)))
                session.close()


def _tuple(key):
    return key.step, key.phase, key.number


def _kind_of(ready):
    """Shape of an input, and number of classes."""
    return tuple(ready.input_shape), ready.num_classes

"""The server's side of a run, without I/O: what clients say goes in, what they are told comes out.

`transitions` decides, `server_run` computes; this module stands between them and the messages. It is for one thread.
Who carries messages puts them in a queue, from any thread; that one thread hands them to `Coordinator.handle`, one
after the other, and sends what this yields.
"""

import contextlib
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msjax
from msjax import config
from msjax.distributed import actions as do
from msjax.distributed import events as ev
from msjax.distributed import messages, sizes
from msjax.distributed.channel import Close, Lost, Received, Send, Stop, Tick
from msjax.distributed.membership import Kinds, Membership, Policy, Stage, Verdict
from msjax.distributed.readiness import Build, Readies
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.server_run import Came, ServerRun
from msjax.distributed.transitions import transition
from msjax.logs import shorten
from msjax.split import shards
from msjax.split.finite import NonFiniteError
from msjax.split.parties import Message
from msjax.split.schedule import Exchange

log = logging.getLogger("msjax.server")

_MOST_OF_WHY = 200
"""Characters of what a client says of its failure."""


class Stopped(Exception):
    """Training ended before its time; the last checkpoint is what there is to go on from."""


class Coordinator:
    """One run, from the first client to the last goodbye.

    Args:
      build: see `readiness.Build`; called for each description that clients give, and again when all clients have said
        how many samples they have.
      store, progress: see `ServerRun`.
      run: names the run, also when it is resumed by another process: clients keep their checkpoints under it.
      compression: of the answers' bytes, as `msjax.wire` takes it.
      max_message_bytes: that the server takes of a message; a run whose messages can become larger ends at the first
        Ready.
      on_exchange: called after each exchange, once its answers are sent.
      on_end: called after the last, before the clients hear of the end; again where they had to go back from there.
      generation: the first, where it is not drawn.
      samples: those to train and to test on, as an earlier process of this run has built it; by default they follow
        from the clients that are ready when training begins.
      first_seconds: that of the membership of an earlier process that served this run: how long compiling takes.
    """

    def __init__(
        self,
        cfg: config.Config,
        build: Build,
        store: Any,
        policy: Policy,
        metrics: Any,
        *,
        run: str,
        progress: dict[str, Any],
        checkpoint_steps: int = 100,
        compression: str | None = None,
        max_message_bytes: int = sizes.MOST_MEGABYTES << 20,
        on_exchange: Callable[[Exchange], None] = lambda exchange: None,
        on_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        generation: int | None = None,
        samples: tuple[int, int] | None = None,
        first_seconds: tuple[tuple[Kinds, float], ...] = (),
    ):
        self.cfg, self.metrics, self.name = cfg, metrics, run
        self._store, self._progress = store, progress
        self._checkpoint_steps, self._compression = checkpoint_steps, compression
        # Of a client that comes while the others train.
        brings_part = policy.stragglers == "drop" or (policy.start_clients or cfg.clients) < cfg.clients
        sizes_of = {"max_message_bytes": max_message_bytes, "brings_part": brings_part}
        self._readies = Readies(cfg, build, samples=samples, **sizes_of)
        self._on_exchange, self._on_end, self._clock = on_exchange, on_end, clock
        # Unlike those of another process that served this run.
        generation = secrets.randbits(48) + 1 if generation is None else generation
        first = {"generation": generation, "first_seconds": first_seconds}
        self.membership = Membership.begin(policy, clients=cfg.clients, now=clock(), **first)
        self.run: ServerRun | None = None
        """Once all clients were ready."""
        self.ready_at: float | None = None
        """When they first were, on the clock: training begins."""
        self.restored_at: float | None = None
        """When training last began or went on from a checkpoint, on the clock."""
        self._clients: dict[int, int] = {}  # whose a session is
        self._closed: set[int] = set()  # sessions that are over, whose stream may still bring something
        self._heard: set[int] = set()  # sessions of which a request has come
        self._came: dict[int, Came] = {}
        self._computed: dict[int, Message] = {}
        # By identity: an average, which is the same for all, is encoded once.
        self._encoded: dict[int, list[bytes]] = {}
        self._answers: dict[int, pb.FromServer] = {}
        self._arrived: dict[int, float] = {}  # of the open exchange, when each client's message had
        self._asked: int | None = None
        self._opened_at = 0.0
        self._failed = False
        self.saved_at_end: dict[int, int] = {}
        """Of each client that has said goodbye the step of its last checkpoint."""

    @property
    def wake_at(self) -> float | None:
        """When `Tick` is due; None where nothing has a deadline."""
        return self.membership.wake_at

    @property
    def over(self) -> bool:
        """Whether the run has ended, one way or the other."""
        return self.membership.stage is Stage.OVER

    def handle(self, event: Received | Lost | Stop | Tick) -> Iterator[Send | Close]:
        """Does what follows from an event, and yields what is to be sent as soon as it is there. Take all of it.

        Raises:
          Stopped: the run has ended before its time, as somebody or the policy wanted.
          Exception: whatever went wrong; the clients have been told.
        """
        for out in self._handle(event):
            if isinstance(out, Send) and (client := self._clients.get(out.session)) is not None:
                self.metrics.sent(client, out.message)
            yield out

    def _handle(self, event):
        try:
            match event:
                case Received():
                    yield from self._receive(event)
                case Lost(session):
                    client = self._end(session)
                    self._closed.discard(session)
                    if client is not None:
                        yield from self._follow(ev.Left(client, session))
                case Stop(reason):
                    yield from self._follow(ev.StopAsked(reason))
                case Tick():
                    yield from self._follow(ev.TimePassed())
        except Stopped:
            raise
        except Exception as error:  # clients are not to wait for a server that is gone
            # What else may end a server, as want of memory or disk, need not be there when it is started again.
            self._failed = isinstance(error, NonFiniteError | ValueError)
            with contextlib.suppress(Stopped):
                yield from self._follow(ev.Failed(str(error)))
            raise error

    def _follow(self, event):
        """Carries out what follows from an event, and from the server's own work."""
        todo: deque[Callable[[], ev.Event]] = deque([lambda: event])
        while todo:
            self.membership, actions = transition(self.membership, todo.popleft()(), self._clock())
            self.metrics.connected.set(self.membership.tally.connected)
            for action in actions:
                match action:
                    case do.RestoreCheckpoint(again):
                        todo += [lambda again=again: self._restore(again), self._open_next]
                    case do.Advance():
                        todo += [lambda action=action: self._advance(action), self._exchange_done]
                    case do.StopRun(reason):
                        raise Stopped(reason)
                    case _:
                        yield from self._tell(action)

    # -- What clients say. -----------------------------------------------------------------------------------------

    def _receive(self, event):
        session, client = event.session, self._clients.get(event.session)
        if session in self._closed:  # a stream is one client's, who was let in as such: no other may come by it
            return
        if client is not None:
            self.metrics.received(client, event.message, event.nbytes)
        try:
            follows = self._hello(event) if client is None else self._said(client, event)
        except messages.ProtocolError as error:
            fault = str(error)
        except sizes.MessageTooLargeError:
            raise  # no other client's would be smaller, so that there is nothing to wait for
        except Exception:
            log.exception("client %s", client)
            fault = "internal error"
        else:
            if isinstance(follows, ev.Requested):
                yield from self._acknowledge(follows)
            yield from self._follow(follows)
            if isinstance(follows, ev.Left):
                yield Close(session)
            return
        if client is None:
            log.warning("%s: %s", event.peer, fault)
            self.metrics.refused.inc()
            self._end(session)
            yield Close(session, fault, final=True)
        else:
            yield from self._follow(ev.BrokeProtocol(client, session, fault))

    def _hello(self, event):
        if event.message.WhichOneof("kind") != "hello":
            raise messages.ProtocolError("the first message must be Hello")
        hello = event.message.hello
        if hello.protocol != messages.PROTOCOL:
            raise messages.ProtocolError(
                f"protocol must be {messages.PROTOCOL}, that of msjax {msjax.__version__} on the server, got "
                f"{hello.protocol}: server and clients need versions of msjax with the same protocol"
            )
        if hello.client >= self.cfg.clients:
            most = self.cfg.clients - 1
            raise messages.ProtocolError(f"client_id must be in 0..{most}, as the run has it, got {hello.client}")
        if hello.version not in ("", msjax.__version__):
            said = "client %d has msjax %s, and this server %s; best all have the same version"
            log.warning(said, hello.client, shorten(hello.version, 40), msjax.__version__)
        self._clients[event.session] = hello.client
        self.metrics.received(hello.client, event.message, event.nbytes)
        generation = hello.generation if hello.run == self.name else 0
        return ev.Joined(hello.client, event.session, hello.instance, event.peer, generation)

    def _acknowledge(self, event):
        """Says, once a session, that requests arrive; not where the answer itself is there to be repeated."""
        waits = self.membership.verdict(event) in (Verdict.NEW, Verdict.SIGN_OF_LIFE)
        if waits and event.session not in self._heard:
            self._heard.add(event.session)
            yield Send(event.session, pb.FromServer(received=pb.Received()))

    def _end(self, session):
        """A session is over; returns whose it was."""
        self._closed.add(session)
        self._heard.discard(session)
        return self._clients.pop(session, None)

    def _said(self, client, event):
        session, message = event.session, event.message
        match message.WhichOneof("kind"):
            case "ready":
                return self._ready(client, session, message.ready)
            case "request":
                return self._request(client, session, message.request, event.at)
            case "goodbye":
                if not (why := message.goodbye.error):
                    self.saved_at_end[client] = message.goodbye.saved_step
                    return ev.SaidGoodbye(client, session, message.goodbye.generation)
                self._end(session)
                printable = "".join(filter(str.isprintable, why[:_MOST_OF_WHY]))
                return ev.Left(client, session, f"{printable}; its own log says more")
            case kind:
                raise messages.ProtocolError(f"unexpected {kind}")

    def _ready(self, client, session, ready):
        # Before the start what counts is what those have said who are still here.
        here = [c for c, it in enumerate(self.membership.clients) if self.run or (it.ready and c != client)]
        self._readies.check(ready, here)
        self._readies.keep(client, ready)
        return ev.SaidReady(client, session, ready.saved_step)

    def _request(self, client, session, request, at):
        position = (request.position.step, request.position.phase, request.position.test_round)
        brings_part = bool(request.part) and client == self.membership.donor
        event = ev.Requested(client, session, request.generation, position, brings_part)
        if self.membership.verdict(event) is Verdict.NEW:
            exchange = self.run.exchange_of(client, position)
            if exchange is None:  # whose turn is later sends early
                exchange = messages.from_position(self.run.schedule, request.position, client)
            message = messages.from_request(request, self.run.spec, exchange)
            messages.check(message, self.run.spec, exchange, allow_nonfinite=self.cfg.allow_nonfinite)
            if brings_part:  # it goes to another client as it is
                messages.check_part(request.part, self.run.spec, allow_nonfinite=self.cfg.allow_nonfinite)
            else:
                request.ClearField("part")
            self._came[client] = Came(exchange, request, message)
            self._arrived[client] = self._clock() if at is None else at
        return event

    # -- What the server does itself. ------------------------------------------------------------------------------

    def _restore(self, again):
        if self.run is None:
            self.ready_at = self._clock()
            active = self.membership.active
            who = "all" if len(active) == self.cfg.clients else f"{len(active)} of {self.cfg.clients}"
            log.info("%s clients are ready: training begins, and its first steps compile", who)
            self.run = ServerRun(
                *self._readies.built(active),
                self.cfg.seed,
                self._store,
                self._progress,
                checkpoint_steps=self._checkpoint_steps,
                failed_save=self.metrics.failed_saves.inc,
                allow_nonfinite=self.cfg.allow_nonfinite,
                mesh=shards.mesh_of() if self.cfg.shard_server else None,
            )
        step, clients = self.run.restore()
        if again:
            log.warning("going back to step %d", step)
            self.metrics.restarts.inc()
        self._answers.clear()
        self._came.clear()
        self.restored_at = self._clock()
        return ev.Restored(step, clients, self.run.back_to)

    def _open_next(self):
        self._opened_at = self._clock()
        info = self.run.next_exchange()
        if info is not None:
            return ev.Opened(info)
        self._on_end()
        return ev.Ended(self.run.schedule.total_steps, self.run.keepers, self.run.back_to, self.run.hands_out)

    def _advance(self, action):
        self.metrics.waited(self._clock() - self._opened_at)
        self._computed = self.run.answer({client: self._came.pop(client) for client in action.clients})
        self._encoded, self._asked = {}, action.asks_part_of
        return ev.Computed()

    def _exchange_done(self):
        self._computed = {}
        self._on_exchange(self.run.exchange)
        return self._open_next()

    # -- What clients are told. ------------------------------------------------------------------------------------

    def _tell(self, action):
        match action:
            case do.WelcomeClient(_, session):
                yield Send(session, self._welcome())
            case do.StartClient():
                yield Send(action.session, self._start(action))
            case do.SendAnswer(client, session):
                self._answers[client] = self._answer(client)
                if session is not None:
                    yield Send(session, self._answers[client])
            case do.ResendAnswer(client, session):
                yield Send(session, self._answers[client])
            case do.TellEnd(_, session, dropped):
                yield Send(session, pb.FromServer(finished=pb.Finished(dropped=dropped, keeps=self._keeps(session))))
            case do.TellOver(session):
                yield Send(session, pb.FromServer(finished=pb.Finished(over=True, keeps=self._keeps(session))))
            case do.TellFailure(session, reason):
                yield Send(session, pb.FromServer(finished=pb.Finished(error=reason, failed=self._failed)))
            case do.RefuseSession(session, reason):
                self.metrics.refused.inc()
                self._end(session)
                yield Close(session, reason)
            case do.CloseSession(session, fault):
                client = self._end(session)
                if fault:
                    log.warning("client %s: %s", client, fault)
                    self.metrics.refused.inc()
                yield Close(session, fault, final=bool(fault))
            case do.CountStragglers(count):
                self.metrics.stragglers.inc(count)
            case do.Warn(text):
                log.warning("%s", text)
            case do.Inform(text):
                log.info("%s", text)

    def _keeps(self, session):
        return self._clients.get(session) in self.membership.keepers

    def _welcome(self):
        cfg = json.dumps(config.to_json(config.without_paths(self.cfg), paths=False))
        welcome = {"protocol": messages.PROTOCOL, "version": msjax.__version__, "run": self.name, "config": cfg}
        return pb.FromServer(welcome=pb.Welcome(checkpoint_steps=self._checkpoint_steps, **welcome))

    def _start(self, action):
        schedule, part = self.run.schedule, b""
        if action.part_from is not None:
            part = self._came[action.part_from].request.part
        elif action.afresh and (own := self.run.part_for(action.client, action.step)) is not None:
            part = messages.encode_part(own, self.run.spec, self._compression)
        fields = {"generation": self.membership.generation, "step": action.step, "part": part}
        numbers = {"samples": schedule.samples, "test_samples": schedule.test_samples}
        return pb.FromServer(start=pb.Start(**fields, **numbers))

    def _answer(self, client):
        out, run, payload = pb.FromServer(), self.run, self._computed[client].payload
        if id(payload) not in self._encoded:
            self._encoded[id(payload)] = messages.encode(payload, run.spec.down(run.exchange), self._compression)
        out.answer.payload.extend(self._encoded[id(payload)])
        run.count_answer(self._encoded[id(payload)])
        out.answer.generation, out.answer.send_part = self.membership.generation, client == self._asked
        out.answer.position.CopyFrom(messages.to_position(run.exchange))
        out.answer.saved_step = run.saved_step
        if run.spec.cut_seconds is not None:
            out.answer.server_seconds = self._clock() - self._arrived[client]
        return out

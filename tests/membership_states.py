"""A model of a run's clients and lines for `transitions`, small enough that all that can happen may be tried.

Weights are numbers that stand for how they came about: who trains on, averages or keeps other weights than the run's is
found. Clients and lines react as `session`, `client_run` and `coordinator` do. Lines are cut, and processes die, the
server's too. `explore` goes through all orders of messages until as many faults as it is given have come to pass; from
every state a calm run must lead to the end.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from msjax.distributed import actions as do
from msjax.distributed import events as ev
from msjax.distributed.events import HandsOut
from msjax.distributed.membership import Membership, Policy, Verdict
from msjax.distributed.transitions import transition

from .membership_run import AVERAGE, FEATURES, TAKE, TEST, script


class Process(NamedTuple):
    """A client: what it knows, what is on its disk, and its line."""

    instance: int = 0
    line: int | None = None
    names: int = 0
    """How many lines it has had."""
    up: tuple = ()
    """What is under way to the server: (line, kind, …)."""
    generation: int = 0
    at: int = 0
    """Which of its exchanges it is at."""
    weights: Any = 0
    request: tuple | None = None
    """(generation, key, whether it brings its part, weights), until it is answered."""
    asked: bool = False
    disk: tuple = ()
    """Checkpoints: (step, weights)."""
    lacks_part: bool = False
    kept: tuple | None = None
    """(generation, weights) of the part that it has written."""
    ended: str = ""

    def save(self, step):
        saved = dict(self.disk)
        return self._replace(disk=tuple(sorted({step: self.weights, **saved}.items())))


class Saved(NamedTuple):
    """The server's checkpoint."""

    step: int = 0
    clients: tuple[int, ...] | None = None
    server: Any = 0
    client: Any = 0
    last_turn: int | None = None


class State(NamedTuple):
    """All there is."""

    membership: Membership
    processes: tuple[Process, ...]
    now: float = 0.0
    at: int = 0
    """Which exchange is open."""
    server: Any = 0
    client: Any = 0
    """The clients' weights; in turns and rounds those of the part that goes round."""
    last_turn: int | None = None
    saved: Saved = Saved()
    came: tuple = ()
    """(client, weights, whether it brought them as its part)"""
    computed: tuple = ()
    asked: int | None = None
    answers: tuple = ()
    """The last one to each client."""
    end: tuple | None = None
    """(generation, weights) of the trained part."""
    over: str = ""
    faults: int = 0
    kills: int = 0
    ticks: int = 0


class Model:
    """A run of `clients` and `steps`, of a `kind` of `membership_run.script`, and what may go wrong in it.

    Args:
      faults: how many lines are cut and processes die, the server's included.
      kills: how many of these may be the server's.
      ticks: how often a deadline may pass before anything else does.
      policy: its fields.
    """

    def __init__(self, kind, clients, steps, *, faults, kills=0, ticks=0, **policy):
        self.kind, self.steps, self.everyone = kind, steps, range(clients)
        self.exchanges = script(kind, clients, steps)
        self.own = [[e for e in self.exchanges if c in e.clients] for c in self.everyone]
        self.policy, self.limits = Policy(**{"deadline_seconds": 10.0, **policy}), (faults, kills, ticks)
        self._numbers = {}
        self._calm = {}

    def number(self, *made_of):
        return self._numbers.setdefault(made_of, len(self._numbers) + 1)

    def begin(self) -> State:
        """All have come and said that they are ready."""
        membership = Membership.begin(self.policy, clients=len(self.everyone), generation=1, now=0.0)
        faults, kills, ticks = self.limits
        state = State(membership, tuple(Process() for _ in self.everyone), faults=faults, kills=kills, ticks=ticks)
        for client in self.everyone:
            state = self.connect(state, client)
            state = self.deliver(state, client)
        return state

    # -- The server. -----------------------------------------------------------------------------------------------

    def say(self, state: State, event) -> State:
        """Hands an event in, and does what follows, as the coordinator does."""
        membership, actions = transition(state.membership, event, state.now)
        state = state._replace(membership=membership)
        todo = []
        for action in actions:
            match action:
                case do.RestoreCheckpoint():
                    todo = [self._restore, self._open]
                case do.Advance():
                    todo = [lambda state, it=action: self._advance(state, it), self._open_next]
                case do.StopRun() | do.Finish():
                    state = state._replace(over=type(action).__name__)
                case _:
                    state = self._tell(state, action)
        for work in todo:
            state = self.say(*work(state))
        return state

    def _tell(self, state, action):
        keepers, generation = state.membership.keepers, state.membership.generation
        match action:
            case do.WelcomeClient(_, session):
                return self._send(state, session, "welcome")
            case do.StartClient(client, session, step, part_from, afresh):
                part = None
                if part_from is not None:
                    part = next((weights for c, weights, brings in state.came if c == part_from and brings), None)
                    assert part is not None, f"client {part_from} has brought no part"
                elif afresh and client == self._has_part(state, step, client):
                    part = state.client
                return self._send(state, session, "start", generation, step, part)
            case do.SendAnswer(client, session):
                exchange = self.exchanges[state.at]
                said = ("answer", generation, exchange.key, dict(state.computed)[client], client == state.asked)
                kept = {**dict(state.answers), client: (*said, state.saved.step)}
                state = state._replace(answers=tuple(sorted(kept.items())))
                return state if session is None else self._send(state, session, *kept[client])
            case do.ResendAnswer(client, session):
                return self._send(state, session, *dict(state.answers)[client])
            case do.TellEnd(client, session, dropped):
                return self._send(state, session, "end", client in keepers, dropped, False)
            case do.TellOver(session):
                return self._send(state, session, "end", self._client_of(session) in keepers, False, True)
            case do.CloseSession(session, fault):
                return self._send(state, session, "close", fault)
            case do.RefuseSession(session):
                return self._send(state, session, "close", "")
        return state

    def _keepers(self, state):
        if self.kind == "turns" and state.last_turn is not None:
            return (state.last_turn,)
        return tuple(self.everyone) if self.kind == "parallel" else self.exchanges[-1].clients

    def _has_part(self, state, step, client):
        if self.kind == "parallel":
            return None
        keepers = self._keepers(state) if step == self.steps else (state.last_turn,)
        return client if client in keepers else None

    def _back_to(self, state):
        return state.saved.step if self.kind == "parallel" else 0

    def _restore(self, state):
        saved = state.saved
        at = next(i for i, e in enumerate(self.exchanges) if e.step == saved.step)
        state = state._replace(at=at, server=saved.server, client=saved.client, last_turn=saved.last_turn)
        state = state._replace(came=(), answers=(), computed=(), end=None)
        return state, ev.Restored(saved.step, self._able(saved), self._back_to(state))

    def _able(self, saved):
        return saved.clients if saved.step and self.kind == "parallel" else None

    def _open(self, state):
        if state.at == len(self.exchanges):
            state = state._replace(end=(state.membership.generation, state.client))
            hands_out = None if self.kind == "parallel" else HandsOut.EXACTLY
            return state, ev.Ended(self.steps, self._keepers(state), self._back_to(state), hands_out)
        exchange, able = self.exchanges[state.at], self._able(state.saved)
        if self.kind == "turns":
            turn = exchange.clients + (() if state.last_turn is None else (state.last_turn,))
            exchange = dataclasses.replace(exchange, turn=turn)
        able = None if able is None else frozenset(able)
        return state, ev.Opened(dataclasses.replace(exchange, able=able, back_to=self._back_to(state)))

    def _open_next(self, state):
        return self._open(state._replace(at=state.at + 1))

    def _advance(self, state, action):
        """Computes the answers, from weights that must be the run's."""
        exchange, phase = action.exchange, action.exchange.key[1]
        assert exchange.key == self.exchanges[state.at].key
        given = {client: weights for client, weights, _ in state.came}
        came = tuple((client, given[client]) for client in sorted(action.clients))
        averages_own = phase == AVERAGE and self.kind == "parallel"
        for client, weights in came:
            should = self.number("step", state.client, client, state.server) if averages_own else state.client
            trains = phase in (FEATURES, TEST) or averages_own
            assert weights == should or not trains, f"client {client} goes on with other weights than the run's"
        answer = None
        if came and phase == (FEATURES if self.kind == "parallel" else TAKE):
            clients = action.clients if self.kind == "parallel" else None
            saved = Saved(exchange.step, clients, state.server, state.client, state.last_turn)
            if exchange.step:
                state = state._replace(saved=saved)
        if came and phase == FEATURES:
            answer = self.number("features", state.server, came)
            state = state._replace(server=answer)
        elif came and phase == TAKE:
            answer = state.client
        elif came and phase != TEST:
            new = came[0][1] if self.kind == "turns" else self.number("average", came)
            state = state._replace(client=new, last_turn=came[0][0] if self.kind == "turns" else None)
            answer = new
        left = tuple(it for it in state.came if it[0] not in action.clients)
        computed = tuple((client, answer) for client in action.clients)
        return state._replace(came=left, computed=computed, asked=action.asks_part_of), ev.Computed()

    # -- The clients. ----------------------------------------------------------------------------------------------

    def _client_of(self, line):
        return line % len(self.everyone)

    def _send(self, state, line, *message):
        """To a client, which answers at once; its answer takes a while."""
        client = self._client_of(line)
        process = state.processes[client]
        return state if process.line != line else self._with(state, client, self._hear(client, process, *message))

    @staticmethod
    def _with(state, client, process):
        processes = list(state.processes)
        processes[client] = process
        return state._replace(processes=tuple(processes))

    @staticmethod
    def _put(process, *message):
        return process._replace(up=(*process.up, (process.line, *message)))

    def _done(self, client, process):
        return process.generation > 0 and process.at == len(self.own[client])

    def _ask(self, client, process):
        """Sends the request where it is, if there is one."""
        if process.generation == 0 or self._done(client, process):
            return process
        if process.request is None:
            exchange = self.own[client][process.at]
            if exchange.key[1] == FEATURES and self.kind == "parallel":
                process = process.save(exchange.step)
            request = (process.generation, exchange.key, process.asked, process.weights)
            process = process._replace(request=request, asked=False)
        return self._put(process, "request", *process.request)

    def _go_to(self, client, process, at):
        process = process._replace(at=at, request=None)
        return process.save(self.steps) if self._done(client, process) else process

    def _end(self, process, why):
        return self._put(process, "left")._replace(ended=why, line=None)

    def _hear(self, client, process, kind, *rest):
        match kind, *rest:
            case ["welcome"]:
                return self._put(process, "ready", max((step for step, _ in process.disk), default=0))
            case "start", generation, step, part:
                return self._start(client, process, generation, step, part)
            case "answer", generation, key, answer, asked, saved_step:
                if process.request is None or process.request[:2] != (generation, key):
                    return process
                if key[1] == FEATURES:
                    process = process._replace(weights=self.number("step", process.weights, client, answer))
                elif key[1] == TAKE or key[1] == AVERAGE:
                    process = process._replace(weights=answer, lacks_part=process.lacks_part and key[1] != TAKE)
                disk = tuple(it for it in process.disk if it[0] >= saved_step)
                process = self._go_to(client, process._replace(disk=disk, asked=asked), process.at + 1)
                return self._ask(client, process)
            case "end", keeps, dropped, over:
                return self._hear_end(client, process, keeps, dropped, over)
            case "close", fault:
                assert not fault, f"client {client}: {fault}"
                return process._replace(line=None)
        raise AssertionError(kind)

    def _start(self, client, process, generation, step, part):
        knows = generation == process.generation and part is None
        if knows and (self._done(client, process) or step <= self.own[client][process.at].step):
            return self._ask(client, process)
        disk = dict(process.disk)
        lacks = part is None and step > 0 and step not in disk
        process = process._replace(generation=generation, lacks_part=lacks, asked=False)
        if part is not None:
            process = process._replace(weights=part)
        elif step in disk:
            process = process._replace(weights=disk[step])
        elif step and self.kind == "parallel":
            return self._end(process, f"has no checkpoint of step {step}")
        else:
            process = process._replace(weights=0)
        disk = tuple((saved, it) for saved, it in disk.items() if saved <= step - (part is not None))
        at = next((i for i, e in enumerate(self.own[client]) if e.step >= step), len(self.own[client]))
        return self._ask(client, self._go_to(client, process._replace(disk=disk), at))

    def _hear_end(self, client, process, keeps, dropped, over):
        done = self._done(client, process)
        if keeps and process.lacks_part:
            return self._end(process, "was away, and its part is not the trained one")
        if dropped and keeps and done:
            return self._end(process, "was away, and all have gone back since")
        if done:
            process = process._replace(kept=(process.generation, process.weights))
            return self._end(process, "well") if over else self._put(process, "goodbye", process.generation)
        if dropped or over:
            return self._end(process, "was away at the end")
        return self._ask(client, process)

    # -- What may happen. ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[tuple[str, Any]]:
        """Yields what may happen next, and a function that returns the state that it leads to."""
        less = state._replace(faults=state.faults - 1)
        lines = zip(state.membership.clients, state.processes, strict=True)
        missed = {c for c, (it, process) in enumerate(lines) if it.session and it.session.name != process.line}
        for client, process in enumerate(state.processes):
            if process.up:
                yield f"{process.up[0][1]} of {client} comes", lambda c=client: self.deliver(state, c)
            if not process.ended and process.line is None:
                yield f"{client} connects", lambda c=client: self.connect(state, c)
            if client in missed and not process.up:
                name = state.membership.clients[client].session.name
                yield f"{client} is missed", lambda c=client, name=name: self.say(state, ev.Left(c, name))
            if state.faults and not process.ended:
                anew = Process(process.instance + 1, names=process.names, disk=process.disk, kept=process.kept)
                faults = {"dies": anew, "dies once it has sent": anew._replace(up=process.up)}
                if process.line is not None:
                    faults["is cut off"] = process._replace(line=None, up=())
                    faults["hears no more"] = process._replace(line=None)
                for what, left in faults.items():
                    yield f"{client} {what}", lambda c=client, it=left: self._with(less, c, it)
        if state.ticks and state.membership.wake_at is not None and not missed:  # dead lines are found out long before
            yield "a deadline passes", lambda: self.tick(state._replace(ticks=state.ticks - 1))
        if state.faults and state.kills:
            yield "the server dies", lambda: self._kill(less._replace(kills=state.kills - 1))

    def deliver(self, state: State, client: int) -> State:
        """Lets the next message of a client come."""
        process = state.processes[client]
        (line, kind, *rest), *up = process.up
        state = self._with(state, client, process._replace(up=tuple(up)))
        if kind == "join":
            return self.say(state, ev.Joined(client, line, rest[0], "here", rest[1]))
        if state.membership.session_of(client, line) is None:
            return state
        match kind:
            case "left":
                return self.say(state, ev.Left(client, line))
            case "ready":
                return self.say(state, ev.SaidReady(client, line, *rest))
            case "goodbye":
                return self.say(state, ev.SaidGoodbye(client, line, *rest))
        generation, key, brings, weights = rest
        event = ev.Requested(client, line, generation, key, brings and state.membership.donor == client)
        if state.membership.verdict(event) is Verdict.NEW:
            others = tuple(it for it in state.came if it[0] != client)
            state = state._replace(came=(*others, (client, weights, event.brings_part)))
        return self.say(state, event)

    def connect(self, state: State, client: int) -> State:
        """Over a new line; the server hears of it once it has all that was sent before."""
        process = state.processes[client]
        line = process.names * len(self.everyone) + client
        process = process._replace(line=line, names=process.names + 1)
        state = self._with(state, client, self._put(process, "join", str(process.instance), process.generation))
        return self.deliver(state, client) if len(process.up) == 0 else state

    def tick(self, state: State) -> State:
        """Lets the time of the next deadline come."""
        return self.say(state._replace(now=max(state.now, state.membership.wake_at)), ev.TimePassed())

    def _kill(self, state):
        """The server is started again, on its last checkpoint."""
        generation = state.membership.generation + 1000
        membership = Membership.begin(self.policy, clients=len(self.everyone), generation=generation, now=state.now)
        processes = tuple(process._replace(line=None, up=()) for process in state.processes)
        return state._replace(membership=membership, processes=processes, came=(), answers=(), computed=(), end=None)

    # -- What must hold. -------------------------------------------------------------------------------------------

    def key(self, state: State) -> tuple:
        """What tells states apart: names of lines and processes do so by their order alone, times from now on."""
        clients, processes = [], []
        since = lambda time: None if time is None else time - state.now  # noqa: E731
        for client, process in zip(state.membership.clients, state.processes, strict=True):
            session = client.session
            lines = {process.line, *(it[0] for it in process.up)} | ({session.name} if session else set())
            lines = {line: number for number, line in enumerate(sorted(lines - {None}))}
            names = {str(process.instance), client.process, client.turned_away}
            names |= {it[2] for it in process.up if it[1] == "join"} | ({session.instance} if session else set())
            names = {name: number for number, name in enumerate(sorted(names, key=lambda name: int(name or -1)))}
            up = tuple(
                (lines[line], kind, *((names[rest[0]], rest[1]) if kind == "join" else rest))
                for line, kind, *rest in process.up
            )
            known = {"instance": names[str(process.instance)], "line": lines.get(process.line), "names": 0}
            processes.append(process._replace(**known, up=up))
            if session is not None:
                known = {"name": lines[session.name], "instance": names[session.instance]}
                session = dataclasses.replace(session, **known, ready_by=since(session.ready_by))
            known = {"turned_away": names[client.turned_away], "process": names[client.process]}
            clients.append(dataclasses.replace(client, **known, session=session))
        times = {"deadline": since(state.membership.deadline), "opened_at": 0.0, "first_seconds": ()}
        membership = dataclasses.replace(state.membership, clients=tuple(clients), **times)
        return dataclasses.astuple(membership), state._replace(membership=None, processes=tuple(processes), now=0.0)

    def calm(self, state: State) -> State:
        """Returns how it ends where all that live come, and nothing more goes wrong."""
        keys = []
        for _ in range(100):
            if state.over:
                break
            key = self.key(state._replace(faults=0, kills=0, ticks=0))
            if (known := self._calm.get(key)) is not None:
                state = known
                break
            keys.append(key)
            before = state
            for client in self.everyone:
                process = state.processes[client]
                if not process.ended and process.line is None and not process.up:
                    state = self.connect(state, client)
                while state.processes[client].up and not state.over:
                    state = self.deliver(state, client)
                session = state.membership.clients[client].session
                if not state.over and session is not None and session.name != state.processes[client].line:
                    state = self.say(state, ev.Left(client, session.name))
            if (state.membership, state.processes) == (before.membership, before.processes):
                assert state.membership.wake_at is not None, "nobody has anything left to do"
                state = self.tick(state)
        else:
            raise AssertionError(f"the run does not end: {state.membership.stage}")
        self._calm.update(dict.fromkeys(keys, state))
        return state

    def check_end(self, state: State, *, all_keep: bool) -> None:
        """Of a run that is over: that its trained part is there, and nobody takes another for it."""
        assert state.over == "Finish", state.over
        keepers = self._keepers(state)
        have = [c for c in keepers if state.processes[c].kept == state.end]
        wrong = [c for c in keepers if state.processes[c].ended == "well" and c not in have]
        assert not wrong, f"clients {wrong} have ended well with another part"
        assert have, "nobody has the trained part"
        if all_keep:
            assert len(have) == len(keepers), f"only {have} of {keepers} have the trained part"
            ended = {c: it.ended for c, it in enumerate(state.processes) if it.ended not in ("", "well")}
            assert not ended, f"clients did not end well: {ended}"


def explore(model: Model) -> int:
    """Goes through all that can happen, and checks it; returns the number of states.

    Raises:
      AssertionError: something must not be; it says how it came about, in the fewest steps.
    """
    begin = model.begin()
    came = {model.key(begin): (None, "all are ready")}
    todo = collections.deque([begin])
    while todo:
        state = todo.popleft()
        key = model.key(state)
        try:
            what = "then nothing more goes wrong"
            # Where a deadline passed, or the policy drops them, some may have gone without.
            waits = model.policy.stragglers == "wait" and state.ticks == begin.ticks
            model.check_end(model.calm(state), all_keep=waits)
            for what, move in model.moves(state) if state.faults and not state.over else ():
                new = move()
                if (found := model.key(new)) not in came:
                    came[found] = (key, what)
                    todo.append(new)
        except (AssertionError, ValueError, KeyError) as error:
            steps = [what]
            while key is not None:
                key, what = came[key]
                steps.insert(0, what)
            raise AssertionError(f"{error!r} after: {'; '.join(steps)}") from error
    return len(came)

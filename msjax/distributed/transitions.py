"""How the membership of a run changes: `transition`, and nothing else."""

import copy
import dataclasses
from collections.abc import Sequence

from msjax.distributed import actions as do
from msjax.distributed import events as ev
from msjax.distributed.events import HandsOut
from msjax.distributed.membership import LET_IN_WITHOUT, Client, Membership, Memory, Session, Stage, Tally, Verdict


def transition(state: Membership, event: ev.Event, now: float) -> tuple[Membership, tuple[do.Action, ...]]:
    """Returns the state after an event, and what the caller has to do, in order.

    Raises:
      ValueError: the caller's part of the run is out of order.
    """
    turn = _Transition(state, now, isinstance(event, ev.TimePassed))
    turn.take(event)
    turn.settle()
    return turn.end(), tuple(turn.actions)


class _Transition:
    """One transition under way: `take` notes what has happened, `settle` draws what follows from it and the time."""

    def __init__(self, state: Membership, now: float, judges: bool):
        # A copy of its own, which it changes in place: anew for each change, it would take longest of all.
        self.state, self.now, self.actions = copy.copy(state), now, []
        self._tally = state.tally
        self._judges = judges  # deadlines: only where all is handed in that came before `now`

    def _set(self, **changes):
        vars(self.state).update(changes)

    def _set_client(self, client, **changes):
        if isinstance(self.state.clients, tuple):  # a copy of this turn's own: one, however many clients change
            self._set(clients=list(self.state.clients))
        clients, exchange = self.state.clients, self.state.exchange
        before, clients[client] = clients[client], dataclasses.replace(clients[client], **changes)
        self._tally = self._tally.changed(*(Tally.of(client, it, exchange) for it in (before, clients[client])))

    def _count_anew(self):
        self._tally = Tally.over(self.state.clients, self.state.exchange)

    def end(self) -> Membership:
        """Returns the state as it is now."""
        self._set(clients=tuple(self.state.clients), tally=self._tally)
        return self.state

    def _set_session(self, client, **changes):
        session = dataclasses.replace(self.state.clients[client].session, **changes)
        self._set_client(client, session=session)

    def _do(self, action):
        self.actions.append(action)

    def _later(self):
        return self.now + self.state.policy.deadline_seconds

    def _passed(self, deadline):
        return self._judges and deadline is not None and self.now >= deadline

    # -- What has happened. ----------------------------------------------------------------------------------------

    def take(self, event):
        if self.state.stage is Stage.OVER:
            if isinstance(event, ev.Joined):  # a client that is late; another server may be there at its next try
                if event.generation == self.state.generation:
                    self._do(do.TellOver(event.session))
                self._do(do.CloseSession(event.session))
            return
        match event:
            case ev.Joined():
                self._join(event)
            case ev.SaidReady(client, name, saved_step):
                self._ready(client, name, saved_step)
            case ev.Requested():
                self._request(event)
            case ev.BrokeProtocol(client, name, fault):
                if self.state.session_of(client, name) is not None:
                    self._close(client, fault)
            case ev.SaidGoodbye(client, name, generation):
                self._goodbye(client, name, generation)
            case ev.Left(client, name, why):
                if self.state.session_of(client, name) is not None:
                    self._set_client(client, session=None)
                    self._do(do.Warn(f"client {client} left: {why}") if why else do.Inform(f"client {client} left"))
            case ev.Restored(step, able, back_to):
                self._expect(Stage.RESTORING)
                self._restored(step, able, back_to)
            case ev.Computed():
                self._expect(Stage.ADVANCING)
                self._answer()
            case ev.Opened(exchange):
                self._expect(Stage.ADVANCING)
                self._open(exchange)
            case ev.Ended(step, keepers, back_to, hands_out):
                self._expect(Stage.ADVANCING)
                self._set(stage=Stage.ENDING, step=step, deadline=self._later(), late=False)
                self._set(keepers=keepers, back_to=back_to, hands_out=hands_out)
                for client, it in enumerate(self.state.clients):
                    if it.ready:
                        self._tell_end(client)
            case ev.StopAsked(reason):
                self._set(stop=self.state.stop or reason)
            case ev.Failed(reason):
                self._stop(reason)

    def _expect(self, stage):
        if self.state.stage is not stage:
            raise ValueError(f"stage must be {stage.value} for this event, got {self.state.stage.value}")

    def _join(self, event):
        client, old = event.client, self.state.clients[event.client].session
        if old is not None and old.instance != event.instance:
            # Two processes that take themselves for the same client would undo each other's work, in turns.
            taken = f"client_id must be of one process at a time, got {client}, which another process has"
            self._do(do.RefuseSession(event.session, taken))
            if event.instance != self.state.clients[client].turned_away:  # it will try again and again
                self._do(do.Warn(f"turned {event.peer} away: {taken}, at {old.peer}"))
                self._set_client(client, turned_away=event.instance)
            return
        if old is not None:
            self._do(do.CloseSession(old.name))
        session = Session(event.session, event.instance, event.peer, event.generation, self._later())
        self._set_client(client, session=session)
        self._do(do.Inform(f"client {client} joined from {event.peer}"))
        self._do(do.WelcomeClient(client, event.session))

    def _ready(self, client, name, saved_step):
        session = self.state.session_of(client, name)
        if session is None or session.ready:
            return
        self._set_session(client, ready=True, saved_step=saved_step)
        missing = [c for c, it in enumerate(self.state.clients) if not it.ready]
        if self.state.stage is Stage.GATHERING and (awaited := self._awaited(missing)):
            self._do(do.Inform(f"client {client} is ready; training waits for {awaited}"))
        if self.state.stage is Stage.ENDING:
            self._tell_end(client)
        elif self.state.stage in (Stage.COLLECTING, Stage.ADVANCING):
            self._admit(client)

    def _admit(self, client):
        it, state = self.state.clients[client], self.state
        if not it.active:
            self._set_client(client, alive=True)
        elif it.memory is Memory.OF_CHECKPOINT or (
            it.memory is Memory.OF_ALL and it.session.generation == state.generation
        ):
            # In the second case it stays where it is, and repeats its last message, if it had sent one.
            self._start(client, state.step, afresh=it.memory is Memory.OF_CHECKPOINT)
        elif self._can_enter(client) and (it.memory is Memory.OF_NOTHING or self._is_handed_all()):
            self._enter(client)
        elif state.exchange.turn is not None and client not in state.exchange.turn:
            # It has lost nothing: what it goes on with it is handed when its turn begins.
            self._set_client(client, memory=Memory.OF_NOTHING, message=None)
            self._start(client, state.exchange.step)
        elif self._can_do_without([client]):
            self._drop(client, alive=True)
        elif self._lacks_checkpoint(client):
            have = f"it must have its checkpoint of step {state.exchange.back_to}, to which all would go back with it"
            got = f"got one of step {it.session.saved_step}: start it with the --state folder that it had"
            self._close(client, f"{have}, {got}; or {LET_IN_WITHOUT}")
        else:
            # It was in the run and does not know where: all go back to the last checkpoint.
            self._set(lost_memory=True)

    def _lacks_checkpoint(self, client):
        """Of one that has just said what it has: whether it should have the last checkpoint, and does not."""
        exchange, session = self.state.exchange, self.state.clients[client].session
        should = exchange.able is None or client in exchange.able
        return should and session.saved_step < exchange.back_to

    def _request(self, event):
        client = event.client
        match self.state.verdict(event):
            case Verdict.NEW:
                it = {"memory": Memory.OF_ALL, "message": event.key, "brings_part": event.brings_part}
                process = self.state.session_of(client, event.session).instance
                if process != self.state.clients[client].process:
                    it |= {"process": process, "last_kind": None, "done": frozenset()}
                self._set_client(client, **it)
            case Verdict.REPEAT:
                self._do(do.ResendAnswer(client, event.session))
                if self.state.stage is Stage.ENDING:
                    self._tell_end(client)
            case Verdict.SIGN_OF_LIFE:
                self._set_client(client, alive=True)
            case Verdict.FAULT:
                self._close(client, "a request before the start")

    def _goodbye(self, client, name, generation):
        if self.state.session_of(client, name) is None:
            return
        gone_back = generation != self.state.generation or self.state.stage is Stage.RESTORING
        if gone_back and self.state.stage is not Stage.GATHERING:
            return
        if self.state.stage is Stage.ENDING:
            self._set_client(client, goodbye=True)  # it stays: should another have lost its part, all go back
        else:
            self._close(client, "a goodbye before the end")

    def _restored(self, step, able, back_to):
        if able is not None and not able:
            raise ValueError("clients must be at least one, got none: nobody has the checkpoint")
        clients, can = [], set(range(len(self.state.clients)) if able is None else able)
        # One that is away and was not waited for, as where it has not come yet, is let in when it comes.
        goes_on = {c for c in can if (it := self.state.clients[c]).active or (self.state.begun and it.ready)}
        if able is not None and len(goes_on) < min(self.state.policy.min_clients, len(can)):
            away = sorted(can - goes_on)
            self._do(do.Warn(f"of those who have the checkpoint too few are here: training waits for {_listed(away)}"))
            goes_on = can
        elif self.state.policy.stragglers == "drop" and not self.state.begun:
            # Who has lost its own is let in with another's part. Later on it may have saved since it was ready.
            ready = [c for c in goes_on if self.state.clients[c].ready]
            without = {c for c in ready if self.state.clients[c].session.saved_step < back_to}
            if len(goes_on - without) >= self.state.policy.min_clients:
                goes_on -= without
        for c, client in enumerate(self.state.clients):
            active = c in goes_on
            # A client that was let in after the checkpoint has to be let in again.
            alive = client.ready and (client.active or client.alive)
            known = {"process": client.process, "last_kind": client.last_kind, "done": client.done}
            clients.append(Client(session=client.session, active=active, alive=alive, **known))
        # What was sent in the last one does not count in the next. It ends here: what clients have been told in the
        # event that has led back was of the last one.
        now = {"stage": Stage.ADVANCING, "generation": self.state.generation + self.state.begun, "begun": True}
        self._set(clients=clients, step=step, lost_memory=False, **now)
        self._count_anew()
        for c, client in enumerate(clients):
            if client.active and client.ready:
                self._start(c, step, afresh=True)

    def _answer(self):
        for c in self.state.collected:
            client = self.state.clients[c]
            if client.active:
                admitted = client.session is not None and client.session.admitted
                self._set_client(c, message=None, brings_part=False, answered=self.state.exchange.key)
                # One that has come back since asks again, once it has been told where the run is.
                self._do(do.SendAnswer(c, client.session.name if admitted else None))
        self._set(collected=())

    def _open(self, exchange):
        last = self.state.exchange
        if self.state.collected or (last is not None and exchange.key <= last.key):
            raise ValueError(f"key must be above that of the last exchange, answered, got {exchange.key}")
        self._set(stage=Stage.COLLECTING, exchange=exchange, deadline=None, opened_at=self.now)
        self._set(extended=False, late=False, compiling=False)
        self._count_anew()

    # -- What follows. ---------------------------------------------------------------------------------------------

    def settle(self):
        if self._judges and self._tally.unready:
            self._close_unready()
        match self.state.stage:
            case Stage.GATHERING:
                self._gather()
            case Stage.COLLECTING if self.state.stop is not None:
                self._stop(self.state.stop)
            case Stage.COLLECTING if self.state.lost_memory:
                self._restore()
            case Stage.COLLECTING:
                self._let_in()
                self._collect()
            case Stage.ENDING:
                self._end()

    def _close_unready(self):
        for c, client in enumerate(self.state.clients):
            if client.session is not None and not client.session.ready and self._passed(client.session.ready_by):
                # It keeps its client's place from others. One that loads its data for long comes again with it.
                self._do(do.Warn(f"client {c} at {client.session.peer} was not ready in time: its session is closed"))
                self._close(c)

    def _gather(self):
        missing = [c for c, client in enumerate(self.state.clients) if not client.ready]
        if self.state.stop is not None:
            self._stop(self.state.stop)
        elif not (awaited := self._awaited(missing)):
            for c in missing:
                self._set_client(c, active=False)
            self._restore()
        elif self._passed(self.state.deadline):
            fewer = ", or give policy.start_clients" if self.state.policy.stragglers == "drop" else ""
            self._do(do.Warn(f"training waits for {awaited} to be ready: start those that do not run{fewer}"))
            self._set(deadline=self._later())

    def _awaited(self, missing):
        """Which clients, or how many of them, must be ready before training can begin; None where it can."""
        start, clients = self.state.policy.start_clients, len(self.state.clients)
        late = clients - (clients if start is None else min(start, clients))  # so many may come later
        if len(missing) <= late:
            return None
        return f"{len(missing) - late} of {_listed(missing)}" if late else _listed(missing)

    def _quorum(self):
        """How many of a round's clients must be there."""
        exchange = self.state.exchange
        return min(self.state.policy.min_clients, len(exchange.clients)) if exchange.rounds else 0

    def _restore(self):
        self._set(stage=Stage.RESTORING, exchange=None, donor=None, deadline=None)
        self._count_anew()
        self._do(do.RestoreCheckpoint(again=self.state.begun))

    def _let_in(self):
        exchange = self.state.exchange
        for c in exchange.clients if self._tally.returning else ():
            if self.state.clients[c].returning and self._can_enter(c):
                self._set_client(c, active=True)
                self._do(do.Inform(f"client {c} comes back at step {exchange.step}"))
                self._enter(c)
                if not self.state.extended:  # it has as long as the others; but a client that flaps, not for ever
                    self._set(extended=True, deadline=self._later())

    def _is_handed_all(self):
        """Whether who takes part in the open exchange needs nothing from before it."""
        return self.state.exchange.entrance is ev.Entrance.FREE

    def _can_enter(self, client):
        state, exchange = self.state, self.state.exchange
        if state.stage is not Stage.COLLECTING or client not in exchange.members:
            return False
        if exchange.entrance is ev.Entrance.WITH_PART and state.donor is not None:
            donor = state.clients[state.donor]
            return donor.message == exchange.key and donor.brings_part
        return self._is_handed_all()

    def _enter(self, client):
        exchange = self.state.exchange
        part_from = self.state.donor if exchange.entrance is ev.Entrance.WITH_PART else None
        self._set_client(client, memory=Memory.OF_NOTHING, message=None)
        self._start(client, exchange.step, part_from)

    def _collect(self):
        state, exchange = self.state, self.state.exchange
        waits = self._tally.waited_for > 0 or (self._is_handed_all() and self._lacks_quorum())
        runs = self._clock_runs()
        if waits and not runs:
            self._set(deadline=None, late=False)
            return
        if waits and state.deadline is None:
            self._set(deadline=self._later())
            return
        if waits and not self._passed(state.deadline):
            return
        there = [c for c in exchange.clients if state.clients[c].message == exchange.key]
        if not waits:
            self._learn(there)
            self._advance(there)
            return
        here = set(there)
        missing = [c for c in exchange.clients if state.clients[c].active and c not in here]
        if not self._let_compile(missing):
            self._late(missing, there)

    def _clock_runs(self):
        """Whether the deadline does: not while one of those that are waited for is at work, and nobody waits for it."""
        state, tally = self.state, self._tally
        # Those whose turn is later wait as well, and so does one that has lost its memory meanwhile, and was dropped.
        dropped = state.policy.stragglers == "drop" and state.deadline is not None and tally.returning > 0
        return len(state.exchange.clients) == 1 or tally.waiting > 0 or dropped or tally.at_work == 0

    def _lacks_quorum(self, without=()):
        """Whether too few of a round's clients are active, less these; at its beginning they may still come."""
        quorum, clients = self._quorum(), self.state.clients
        return quorum > 0 and sum(clients[c].active and c not in without for c in self.state.exchange.clients) < quorum

    def _learn(self, there):
        """Notes how long an exchange took that was new to those who took part."""
        if self.state.late:
            return  # that says nothing about compilation
        known = dict(self.state.first_seconds)
        for c in there:
            client = self.state.clients[c]
            known.setdefault((client.last_kind, self.state.exchange.kind), self.now - self.state.opened_at)
        self._set(first_seconds=tuple(known.items()))

    def _let_compile(self, missing):
        """Whether the deadline is moved, once, for those to whom this exchange is new."""
        state, known = self.state, dict(self.state.first_seconds)
        new = {c: state.clients[c].new_to(state.exchange.kind) for c in missing}
        seconds = max((known.get(kinds, 0.0) for kinds in new.values() if kinds is not None), default=0.0)
        if state.compiling or not seconds:
            return False
        who = [c for c, kinds in new.items() if kinds is not None]
        self._do(do.Inform(f"step {state.exchange.step} gives {_listed(who)} up to {seconds:.1f} s more to compile"))
        self._set(compiling=True, deadline=self.now + seconds)
        return True

    def _late(self, missing, there):
        policy, step = self.state.policy, self.state.exchange.step
        if missing:  # none is late where a round lacks its quorum
            self._do(do.CountStragglers(len(missing)))
        if missing and policy.stragglers == "stop":
            why = f"did not answer within {policy.deadline_seconds} s"
            self._stop(f"{_listed(missing)} {why}, and policy.stragglers is stop")
        elif missing and self._can_do_without(missing):
            self._do(do.Warn(f"step {step} goes on without {_listed(missing)}"))
            for c in missing:
                self._drop(c, alive=False)
            self._advance(there)
        elif missing and self._enough_wait_to_be_let_in():
            self._do(do.Warn(f"step {step} cannot go on without {_listed(missing)}, but others could: all go back"))
            self._restore()
        else:
            away = missing or [c for c in self.state.exchange.clients if c not in there]
            why = f", as policy.min_clients is {policy.min_clients}" if policy.stragglers == "drop" else ""
            self._do(do.Warn(f"step {step} waits for {_listed(away)}{why}"))
            self._set(deadline=self._later(), late=True)

    def _enough_wait_to_be_let_in(self):
        """Whether all that are waited for are away, and enough are here that could go on from the last checkpoint."""
        policy, exchange = self.state.policy, self.state.exchange
        if policy.stragglers != "drop" or self._tally.at_work or not self._tally.returning:
            return False
        here = {c for c, it in enumerate(self.state.clients) if (it.active and it.ready) or it.returning}
        here = here if exchange.able is None else here & exchange.able
        return len(here) >= policy.min_clients and len(here & exchange.members) >= self._quorum()

    def _can_do_without(self, clients):
        """Whether enough others are left: of all, and of those of a round that is under way."""
        policy = self.state.policy
        if policy.stragglers != "drop" or len(self.state.active) - len(clients) < policy.min_clients:
            return False
        return self.state.stage is Stage.ENDING or not self._lacks_quorum(clients)

    def _drop(self, client, *, alive):
        self._set_client(client, active=False, alive=alive, message=None, brings_part=False, answered=None)
        if self.state.donor == client:
            self._set(donor=None)

    def _advance(self, there):
        state, exchange = self.state, self.state.exchange
        donor = None if exchange.entrance is ev.Entrance.WITH_PART else state.donor
        asked = None
        if donor is None and self._tally.returning:
            donor = asked = min(set(there) & set(exchange.donors), default=None)
        for c in there:
            it = state.clients[c]
            done = it.done | {(it.last_kind, exchange.kind)}
            self._set_client(c, last_kind=exchange.kind, done=done)
        self._set(stage=Stage.ADVANCING, collected=tuple(there), deadline=None, donor=donor)
        self._do(do.Advance(exchange, tuple(there), asked))

    def _end(self):
        state = self.state
        for c in state.active:  # enough others may have come since
            if self._lacks_part(c) and self._ends_without(c):
                self._tell_end(c)
        lacking = [c for c in state.active if self._lacks_part(c)]
        missing = [c for c in state.active if not state.clients[c].goodbye]
        able = [c for c in state.keepers if state.hands_out or c not in lacking]
        lost = not any(self._keeps(state.clients[c]) for c in able)
        # Whom the server can still give the part may come back, though all others have gone. One that is started again
        # is told so once it is ready: it does not know that it has kept its part.
        waits = bool(missing) or self._tally.unready > 0 or (lost and state.hands_out is not None)
        if missing and state.stop is not None and ((lacking and lost) or not state.late):
            self._stop(state.stop)
        elif lacking and all(state.clients[c].ready for c in state.active):
            self._restore()
        elif not waits or self._passed(state.deadline) or state.stop is not None:
            if waits and lost and state.stop is None and self._goes_on_without_ending(lacking, missing):
                return
            if missing:
                self._do(do.Warn(f"{_listed(missing)} did not say that they have kept their parts"))
            if lost:
                self._do(do.Warn(f"nobody may have the trained part: {_listed(state.keepers)} had it, and went away"))
            for c in lacking:  # it has no checkpoint of that step, and says so where it is not handed the part
                self._start(c, state.step, afresh=True)
            for name in self.state.sessions:
                self._do(do.TellOver(name))
                self._do(do.CloseSession(name))
            self._over(do.Finish())

    def _goes_on_without_ending(self, lacking, missing):
        """Where nobody has the trained part at the deadline: waits for one of those who should, or goes back."""
        state = self.state
        if state.policy.stragglers == "wait":
            who = f"one of {_listed(state.keepers)} to keep the trained part, which nobody else has"
            if lacking:
                away = [c for c in missing if not state.clients[c].ready]
                what = f"start {_listed(away)} again, and all go back; or Ctrl-C, and {LET_IN_WITHOUT}"
            else:
                what = "start it again; Ctrl-C ends the run without it"
            self._do(do.Warn(f"the run waits for {who}: {what}"))
            self._set(deadline=self._later(), late=True)
            return True
        if state.policy.stragglers == "drop" and len(lacking) >= state.policy.min_clients:
            for c in missing:
                if not state.clients[c].ready:
                    self._drop(c, alive=False)
            self._do(do.Warn(f"nobody has kept the trained part: {_listed(lacking)} go back without the others"))
            self._restore()
            return True
        return False

    def _keeps(self, it):
        """Whether a keeper has kept its part, or is there to do so."""
        return it.goodbye or (it.ready and (it.active or self.state.hands_out is not None))

    # -- Parts of both. --------------------------------------------------------------------------------------------

    def _start(self, client, step, part_from=None, *, afresh=False):
        self._set_session(client, admitted=True)
        self._do(do.StartClient(client, self.state.clients[client].session.name, step, part_from, afresh))

    def _tell_end(self, client):
        """One that still waits for an answer does not take this for the end: it gets both once it has asked again."""
        it = self.state.clients[client]
        handed_out = self.state.hands_out is not None and client in self.state.keepers
        lacks, has_own = self._lacks_part(client), it.session.saved_step == self.state.step
        if lacks and not self._ends_without(client):
            return  # until all are there that have to go back with it
        if handed_out and not (it.active and (has_own or self._knows_where_it_is(client))):
            self._start(client, self.state.step, afresh=True)
        elif lacks:
            self._drop(client, alive=True)
            self._do(do.Warn(f"client {client} died before it had kept its part, and is done without"))
        elif it.active and not self._knows_where_it_is(client):
            self._start(client, self.state.step)
        self._set_session(client, admitted=True)
        dropped = not (self.state.clients[client].active or handed_out)
        self._do(do.TellEnd(client, it.session.name, dropped=dropped))

    def _ends_without(self, client):
        """Whether nobody goes back for one that lacks its part: the server has it, or enough others do."""
        state = self.state
        if state.policy.stragglers != "drop":
            return False
        if state.hands_out is not None and client in state.keepers:
            return True
        others = [c for c in state.active if c != client and not self._lacks_part(c)]
        return sum(self._keeps(state.clients[c]) for c in others) >= state.policy.min_clients

    def _knows_where_it_is(self, client):
        session = self.state.clients[client].session
        return session.admitted or session.generation == self.state.generation

    def _lacks_part(self, client):
        """Of one that is there after the last step: whether it died before it had kept its part, which counts."""
        it, state = self.state.clients[client], self.state
        if it.goodbye or (state.hands_out is HandsOut.EXACTLY and client in state.keepers):
            return False
        if not (it.active and it.ready and client in state.keepers) or self._knows_where_it_is(client):
            return False
        return state.back_to <= it.session.saved_step < state.step  # else going back would not help it

    def _close(self, client, fault=""):
        self._do(do.CloseSession(self.state.clients[client].session.name, fault))
        self._set_client(client, session=None)

    def _stop(self, reason):
        for name in self.state.sessions:
            self._do(do.TellFailure(name, reason))
            self._do(do.CloseSession(name))
        self._over(do.StopRun(reason))

    def _over(self, last):
        clients = tuple(dataclasses.replace(client, session=None) for client in self.state.clients)
        self._set(stage=Stage.OVER, clients=clients, deadline=None)
        self._count_anew()
        self._do(last)


def _listed(clients: Sequence[int]) -> str:
    """Names clients, of very many the first."""
    if len(clients) <= 20:
        return f"clients {list(clients)}"
    return f"{len(clients)} clients, the first {list(clients[:10])}"

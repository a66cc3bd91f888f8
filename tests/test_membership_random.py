"""Membership under random events: its promises hold after every one, and once nothing more goes wrong the run ends."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from msjax.distributed import actions as do
from msjax.distributed import events as ev
from msjax.distributed.events import Entrance
from msjax.distributed.membership import Stage

from .membership_run import FEATURES, TAKE, Run, of

STEPS = 4
CLIENTS = st.integers(0, 2)


@dataclasses.dataclass
class Process:
    """A client as it is in truth: what it knows, what it has on its disk, and the line that it listens to."""

    own: list
    """Its exchanges."""
    instance: int = 0
    line: int | None = None
    generation: int = 0
    at: int | None = None
    """Which of its exchanges it is at; None where it does not know."""
    asked: bool = False
    """To bring its part with its next message."""
    disk: set = dataclasses.field(default_factory=lambda: {0})
    told_end: bool = False
    gone: bool = False
    """It was told that the run has ended without it."""

    @property
    def exchange(self):
        return None if self.at is None or self.at == len(self.own) else self.own[self.at]

    @property
    def done(self):
        return self.at == len(self.own)

    def go_to(self, at):
        self.at, self.asked = at, False
        if self.done:
            self.disk.add(STEPS)
        elif self.exchange.key[1] == FEATURES:
            self.disk.add(self.exchange.step)


class Random(RuleBasedStateMachine):
    """Three clients, whose processes die and whose lines are cut, slow, and full of old copies."""

    @initialize(
        kind=st.sampled_from(["parallel", "turns", "rounds"]),
        stragglers=st.sampled_from(["drop", "drop", "wait", "stop"]),
        min_clients=st.integers(1, 3),
        gone=st.sampled_from([None, 0, 1, 2]),
    )
    def begin(self, kind, stragglers, min_clients, gone):
        self.run = Run(kind, 3, STEPS, works=False, stragglers=stragglers, min_clients=min_clients)
        own = [[e for e in self.run.exchanges if c in e.clients] for c in range(3)]
        self.processes = [Process(own[c]) for c in range(3)]
        self.lines: dict[int, list] = {}  # what is under way to clients, by session
        self.live: dict[int, int] = {}  # sessions that were welcomed and not ended, and whose they are
        self.kept: dict[int, tuple] = {}  # the last answers
        self.sent, self.brought = set(), set()  # (client, generation, key) of messages that came
        self.behind: set[int] = set()  # who was left behind and not let in since
        self.next = 0  # the exchange that must be advanced next
        self.asked = None
        self.gone = gone if stragglers == "stop" or (stragglers == "drop" and min_clients < 3) else None
        """Who stays away at the end."""

    # -- What follows from an event. -------------------------------------------------------------------------------

    def say(self, event):
        self.took(self.run.say(event))

    def took(self, said):
        """Checks the actions one by one, and puts messages on the lines."""
        for action in said:
            if (session := getattr(action, "session", None)) is not None and not isinstance(
                action, do.WelcomeClient | do.RefuseSession
            ):
                assert session in self.live or self.run.stage is Stage.OVER, action
            match action:
                case do.WelcomeClient(client, session):
                    assert client not in self.live.values()  # at most one live session a client
                    self.live[session] = client
                case do.CloseSession(session, fault):
                    assert not fault
                    self.live.pop(session, None)
                case do.RefuseSession():
                    pass
                case do.StartClient():
                    self.check_start(action)
                    self.lines[action.session].append((action, self.run.state.generation))
                case do.Advance():
                    self.check_advance(action)
                case do.SendAnswer(client, session):
                    self.kept[client] = (self.run.state.generation, self.answering, self.asked == client)
                    if session is not None:
                        self.lines[session].append(("answer", *self.kept[client]))
                case do.ResendAnswer(client, session):
                    self.lines[session].append(("answer", *self.kept[client]))
                case do.TellEnd(client, session, dropped):
                    assert dropped or client not in self.behind  # nobody takes an untrained part for the result
                    self.lines[session].append((action, None))
                case do.TellOver(session):
                    self.lines[session].append((action, None))
                case do.RestoreCheckpoint():
                    step = self.run.checkpoint[0]
                    self.next = next(i for i, e in enumerate(self.run.exchanges) if e.step == step)
                    self.behind = set(self.everyone) - set(self.run.checkpoint[1] or self.everyone)

    def check_start(self, start):
        state, client = self.run.state, start.client
        if start.step == STEPS:
            return  # the end; a client that has no checkpoint of it finds out
        if start.part_from is not None:
            assert (start.part_from, state.generation, state.exchange.key) in self.brought
            self.behind.discard(client)
        elif client in self.behind:
            assert state.exchange.entrance is Entrance.FREE and start.step == state.exchange.step
            self.behind.discard(client)

    def check_advance(self, advance):
        exchange, state = advance.exchange, self.run.state
        assert exchange.key == self.run.exchanges[self.next].key  # in order, each once a generation
        self.next += 1
        for client in advance.clients:
            assert client not in self.behind  # the messages of dropped clients never count
            assert (client, state.generation, exchange.key) in self.sent
        if exchange.rounds:
            least = min(self.run.policy.min_clients, 2) if self.run.policy.stragglers == "drop" else 2
            assert len(advance.clients) >= least
        self.behind |= set(exchange.clients) - set(advance.clients)
        self.answering, self.asked = exchange.key, advance.asks_part_of
        if self.asked is not None:
            assert self.asked in advance.clients and exchange.step + 1 < STEPS
        if exchange.key[1] == FEATURES and self.run.exchanges[0].entrance is Entrance.WITH_PART:
            self.run.checkpoint = exchange.step, advance.clients
        elif exchange.key[1] == TAKE:
            self.run.checkpoint = exchange.step, None

    @property
    def everyone(self):
        return range(3)

    # -- What clients do. ------------------------------------------------------------------------------------------

    @rule(client=CLIENTS)
    def connect(self, client):
        """Anew, whether or not the server has noticed that the last line is dead."""
        it = self.processes[client]
        if it.gone:
            return
        state, old = self.run.state, self.run.session(client)
        welcome = old is None or old.instance == str(it.instance)
        self.run.names += 1
        it.line, self.lines[self.run.names] = self.run.names, []
        if old is not None and welcome:
            assert state.stage is not Stage.OVER
        self.say(ev.Joined(client, it.line, str(it.instance), "here", it.generation))
        if not (welcome and it.line in self.live):
            it.line = None
            assert self.run.session(client) == old  # one that is refused changes nothing

    @rule(client=CLIENTS)
    def get_ready(self, client):
        if self.processes[client].line is not None:
            it = self.processes[client]
            self.say(ev.SaidReady(client, it.line, max(it.disk)))

    @rule(client=CLIENTS, brings=st.sampled_from([True, True, False]))
    def send(self, client, brings=True):
        """Its message for the exchange where it is, once it has been told to start or to go on."""
        it = self.processes[client]
        session = self.run.session(client)
        if it.line is None or it.exchange is None or session is None or not session.admitted:
            return
        where, brings = (client, it.generation, it.exchange.key), brings and it.asked
        if session.name == it.line:
            self.sent.add(where)
            if brings:
                self.brought.add(where)
        self.say(ev.Requested(client, it.line, *where[1:], brings))

    @rule(data=st.data())
    def old_copy(self, data):
        """Of any message ever sent, over its client's line or one that is dead."""
        if not self.sent or self.run.stage is Stage.GATHERING:
            return
        client, generation, key = data.draw(st.sampled_from(sorted(self.sent)))
        line = self.processes[client].line or data.draw(st.sampled_from(sorted(self.lines)))
        self.say(ev.Requested(client, line, generation, key))

    @precondition(lambda self: self.run.state.exchange is not None)
    @rule(client=CLIENTS)
    def copy_of_the_generation_before(self, client):
        """Of its message for the exchange that is open now."""
        line, state = self.processes[client].line, self.run.state
        if line is not None:
            self.say(ev.Requested(client, line, state.generation - 1, state.exchange.key))

    @rule(client=CLIENTS, count=st.integers(1, 4))
    def hear(self, client, count):
        """What is next on its line."""
        it = self.processes[client]
        for _ in range(count):
            if it.line is not None and self.lines[it.line]:
                self.take(it, *self.lines[it.line].pop(0))

    def take(self, it, message, *rest):
        match message:
            case do.StartClient(client, _, step, part_from):
                known = rest == (it.generation,) and it.at is not None and part_from is None
                if known and (it.done or step <= it.exchange.step):
                    return
                at = next((i for i, e in enumerate(it.own) if e.step >= step), len(it.own))
                if part_from is None and self.run.exchanges[0].entrance is Entrance.WITH_PART:
                    if step == STEPS and step not in it.disk:
                        it.gone = True  # it died before it had its last answer, and others have gone
                        return
                    assert step in it.disk, f"client {client} cannot go on from step {step}"
                it.generation, it.told_end = rest[0], False
                it.disk = {saved for saved in it.disk if saved <= step}
                it.go_to(at)
            case do.TellEnd(_, _, dropped):
                it.told_end, it.gone = it.done, dropped
            case do.TellOver():
                it.gone = True
            case "answer":
                generation, key, asked = rest
                if it.exchange is not None and (generation, key) == (it.generation, it.exchange.key):
                    it.go_to(it.at + 1)
                    it.asked = asked

    @rule(client=CLIENTS)
    def say_goodbye(self, client):
        it = self.processes[client]
        if it.told_end and it.line is not None:
            self.say(ev.SaidGoodbye(client, it.line, it.generation))

    # -- What goes wrong. ------------------------------------------------------------------------------------------

    @rule(client=CLIENTS, noticed=st.booleans())
    def cut(self, client, noticed):
        it = self.processes[client]
        if it.line is not None:
            self.lines[it.line].clear()
            if noticed:
                self.end_session(client, it.line)
            it.line = None

    @rule(client=CLIENTS, noticed=st.booleans())
    def crash(self, client, noticed):
        """The process dies and is started again; its disk is kept."""
        self.cut(client, noticed)
        it = self.processes[client]
        it.instance, it.generation, it.at, it.told_end = it.instance + 1, 0, None, False

    @rule(client=CLIENTS)
    def notice(self, client):
        """The server finds out that a line is dead."""
        session = self.run.session(client)
        if session is not None and session.name != self.processes[client].line:
            self.end_session(client, session.name)

    def end_session(self, client, name):
        self.live.pop(name, None)
        self.say(ev.Left(client, name))

    @rule(client=CLIENTS)
    def second_process(self, client):
        """With the same client_id, by mistake."""
        before = self.run.session(client)
        if before is None or self.run.stage is Stage.OVER:
            return
        self.run.names += 1
        said = self.run.say(ev.Joined(client, self.run.names, "mistake", "elsewhere"))
        assert of(said, do.RefuseSession) and self.run.session(client) == before
        self.took(said)

    # -- Time, and the server's own work. --------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 10.0]))
    def pass_time(self, seconds):
        self.run.now += seconds
        self.say(ev.TimePassed())

    @precondition(lambda self: self.run.todo)
    @rule()
    def work(self):
        while self.run.todo:
            self.took(self.run.work())

    @rule(chance=st.integers(0, 40))
    def stop(self, chance):
        if chance == 0:
            before = self.run.stage
            self.say(ev.StopAsked("enough"))
            assert self.run.stage is (before if before in (Stage.RESTORING, Stage.ADVANCING) else Stage.OVER)

    @rule()
    def everyone_takes_part(self):
        """A while in which nothing goes wrong: the run gets on."""
        self.fair_round()

    def fair_round(self, gone=None):
        present = [client for client in self.everyone if client != gone]
        for client in present:
            it = self.processes[client]
            if it.line is None or self.run.session_is_not(client, it.line):
                self.notice(client)
                self.connect(client)
            self.get_ready(client)
        if self.run.todo:
            self.work()
        for client in present:
            self.hear(client, 100)
            self.send(client)
            self.say_goodbye(client)
        if self.run.todo:
            self.work()

    # -- Promises about states. ------------------------------------------------------------------------------------

    @invariant()
    def sessions_are_those_that_live(self):
        if hasattr(self, "run") and self.run.stage is not Stage.OVER:
            assert set(self.run.state.sessions) == set(self.live)

    @invariant()
    def enough_clients_are_active(self):
        if hasattr(self, "run"):
            policy = self.run.policy
            least = policy.min_clients if policy.stragglers == "drop" else 3
            assert len(self.run.state.active) >= least

    @invariant()
    def nobody_waits_for_ever(self):
        if not hasattr(self, "run") or self.run.stage is not Stage.COLLECTING:
            return
        state = self.run.state
        waiting = [c for c in state.clients if c.message is not None]
        missing = [c for c in state.exchange.clients if state.clients[c].active]
        missing = [c for c in missing if state.clients[c].message != state.exchange.key]
        there = len([c for c in state.exchange.clients if state.clients[c].active]) - len(missing)
        lacks_quorum = state.exchange.rounds and there < min(self.run.policy.min_clients, 2)
        assert missing or lacks_quorum  # else the exchange had been advanced
        away = not any(state.clients[c].ready for c in missing)
        if waiting or away or len(state.exchange.clients) == 1:
            assert state.deadline is not None and state.deadline > self.run.now

    def teardown(self):
        """Once nothing more goes wrong, the run ends; it does so without one that stays away, where the policy says so.

        But not where too few others can go on from the checkpoint, or training has not begun.
        """
        if not hasattr(self, "run"):
            return
        if self.gone is not None:
            self.cut(self.gone, noticed=False)
            self.notice(self.gone)
        for _ in range(100):
            if self.run.stage is Stage.OVER:
                assert len(of(self.run.log, do.Finish, do.StopRun)) == 1 and not self.live
                return
            others = set(self.run.checkpoint[1] or self.everyone) - {self.gone}
            fewest = len(others) - self.run.exchanges[0].rounds  # of a round
            if fewest < self.run.policy.min_clients or self.run.stage is Stage.GATHERING:
                self.gone = None
            before = self.run.state
            self.fair_round(self.gone)
            if self.run.state == before and before.wake_at is not None:
                self.pass_time(max(0.0, before.wake_at - self.run.now))
        raise AssertionError(f"the run does not end: {self.run.state}")


Random.TestCase.settings = hypothesis.settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
TestRandom = Random.TestCase

"""A run as its membership sees it, for tests: a script of exchanges, and a caller that does the server's work."""

import dataclasses

from msjax.distributed import actions as do
from msjax.distributed import events as ev
from msjax.distributed.events import Entrance, ExchangeInfo, HandsOut
from msjax.distributed.membership import Membership, Policy, Stage, Tally
from msjax.distributed.transitions import transition

TAKE, FEATURES, AVERAGE, GIVE, TEST = range(1, 6)


def script(kind, clients, steps):
    """The exchanges of a run: `parallel` with a test by the first two clients after odd steps; in `turns`; or in
    `rounds` of all clients but one.
    """
    everyone, out = tuple(range(clients)), []
    for step in range(steps):
        if kind == "turns":
            now, last = (step % clients,), ((step - 1) % clients,) if step else ()
            out.append(ExchangeInfo((step, TAKE), step, now, Entrance.FREE, turn=now + last))
            out += [ExchangeInfo((step, phase), step, now, turn=now + last) for phase in (FEATURES, GIVE)]
            continue
        if kind == "rounds":
            now = tuple(c for c in everyone if c != step % clients)
            fields = {"rounds": True, "turn": now}
            out.append(ExchangeInfo((step, TAKE), step, now, Entrance.FREE, **fields))
            out += [ExchangeInfo((step, phase), step, now, **fields) for phase in (FEATURES, AVERAGE)]
            continue
        tests = step % 2 == 1
        donors = () if step == steps - 1 else everyone
        out.append(ExchangeInfo((step, FEATURES), step, everyone, Entrance.WITH_PART))
        out.append(ExchangeInfo((step, AVERAGE), step, everyone, donors=donors[2:] if tests else donors))
        if tests:
            out.append(ExchangeInfo((step, TEST), step, everyone[:2], donors=donors[:2]))
    return out


class Run:
    """Events in, actions out; every method returns the actions that followed.

    Args:
      works: whether the server's work is done as soon as it is asked for.
      policy: the fields of the policy; deadlines are of 10 seconds.
    """

    def __init__(self, kind="parallel", clients=3, steps=4, *, works=True, checkpoint=(0, None), **policy):
        self.exchanges, self.steps = script(kind, clients, steps), steps
        self.keepers = tuple(range(clients)) if kind == "parallel" else self.exchanges[-1].clients
        self.policy = Policy(**{"deadline_seconds": 10.0, **policy})
        self.now, self.works, self.checkpoint = 0.0, works, checkpoint
        self.hands_out = None if kind == "parallel" else HandsOut.EXACTLY
        self.state = Membership.begin(self.policy, clients=clients, generation=7, now=self.now)
        self.log, self.todo, self.names = [], [], 0

    @property
    def stage(self) -> Stage:
        return self.state.stage

    @property
    def back_to(self):
        return 0 if self.exchanges[0].entrance is Entrance.FREE else self.checkpoint[0]

    @property
    def everyone(self):
        return range(len(self.state.clients))

    def say(self, event):
        self.state, actions = transition(self.state, event, self.now)
        assert self.state.tally == Tally.over(self.state.clients, self.state.exchange)
        self.log += actions
        self.todo += [a for a in actions if isinstance(a, do.RestoreCheckpoint | do.Advance)]
        said = list(actions)
        while self.works and self.todo:
            said += self.work()
        return said

    def work(self):
        """Does what the server has to do next."""
        works, self.works = self.works, False
        match self.todo.pop(0):
            case do.RestoreCheckpoint():
                step, clients = self.checkpoint
                said = self.say(ev.Restored(step, clients, self.back_to))
                said += self._open(next((e for e in self.exchanges if e.step == step), None))
            case do.Advance(exchange):
                said = self.say(ev.Computed())
                at = [e.key for e in self.exchanges].index(exchange.key) + 1
                said += self._open(self.exchanges[at] if at < len(self.exchanges) else None)
        self.works = works
        return said

    def _open(self, exchange):
        if exchange is None:
            return self.say(ev.Ended(self.steps, self.keepers, self.back_to, self.hands_out))
        step, clients = self.checkpoint
        able = None if clients is None or not step else frozenset(clients)
        return self.say(ev.Opened(dataclasses.replace(exchange, able=able, back_to=self.back_to)))

    def session(self, client):
        return self.state.clients[client].session

    def session_is_not(self, client, name):
        return self.state.session_of(client, name) is None

    def join(self, client, instance="", generation=0):
        self.names += 1
        return self.say(ev.Joined(client, self.names, instance or f"process {client}", f"host {client}", generation))

    def ready(self, client, saved_step=0):
        return self.say(ev.SaidReady(client, self.session(client).name, saved_step))

    def come(self, client, saved_step=0, **fields):
        return self.join(client, **fields) + self.ready(client, saved_step)

    def reconnect(self, client):
        """With its memory."""
        return self.come(client, generation=self.state.generation)

    def crash(self, client, saved_step=0):
        """The process of a client dies, and is there again with no memory."""
        said = self.leave(client)
        return said + self.come(client, saved_step, instance=f"another of {client}, {self.names}")

    def leave(self, client):
        return self.say(ev.Left(client, self.session(client).name))

    def send(self, *clients, key=None, part=False, generation=None):
        """The messages of these clients for the open exchange, or that of `key`."""
        said = []
        for client in clients:
            fields = generation or self.state.generation, key or self.state.exchange.key, part
            said += self.say(ev.Requested(client, self.session(client).name, *fields))
        return said

    def goodbye(self, client):
        return self.say(ev.SaidGoodbye(client, self.session(client).name, self.state.generation))

    def wait(self, seconds):
        self.now += seconds
        return self.say(ev.TimePassed())

    def begin(self):
        """All come and are ready."""
        for client in self.everyone:
            self.come(client)
        return self

    def go_to(self, key):
        """Everyone active does its part until the exchange of `key` is open."""
        while self.state.exchange.key != key:
            self.do_exchange()
        return self

    def go_to_end(self):
        while self.stage is Stage.COLLECTING:
            self.do_exchange()
        return self

    def do_exchange(self):
        """Everyone active does its part in the open exchange."""
        before = self.state.exchange
        self.send(*[c for c in before.clients if self.state.clients[c].active])
        assert self.state.exchange != before or self.stage is Stage.ENDING


def of(actions, *kinds):
    """Those actions that are of these kinds."""
    return [a for a in actions if isinstance(a, kinds)]

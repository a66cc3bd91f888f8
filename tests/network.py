"""A server and clients in one thread, over lines in memory, on a clock of their own; and what may go wrong there."""

import collections
import contextlib
import copy
import itertools
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from msjax import build, data
from msjax.distributed import agreement, messages
from msjax.distributed.coordinator import Coordinator
from msjax.distributed.membership import Policy
from msjax.distributed.metrics import Metrics
from msjax.distributed.session import ClientSession, Own
from msjax.distributed.stores import ClientStore, ServerStore
from msjax.split import parties
from msjax.split.metrics import MetricSums
from msjax.split.schedule import Phase

from .memory_network import Clock, Loop, MemoryNetwork
from .setups import dataset, make_parties

RUN = "0" * 31 + "1"
HOURS = 24 * 3600.0  # of the run's clock: who waits that long waits for ever


def through_bytes(message):
    """What arrives is what was written, and no object that the sender may still change."""
    return type(message).FromString(message.SerializeToString())


class MemoryStore:
    """Checkpoints as `stores` keeps them, in a dict that outlives the party; `full` makes them fail.

    With `slow` they are not complete before `wait`: what was begun is gone where the party dies before.
    """

    def __init__(self, saved, progress=None):
        self.saved, self._progress, self.full = saved, progress, False
        self.slow, self.begun = False, {}

    def steps(self):
        return sorted(self.saved)

    def latest(self):
        return max(self.saved, default=None)

    def save(self, step, party, **more):
        if self.full:
            raise OSError(28, "No space left on device")
        self.wait()
        if more:
            progress = party[-1][0]
            progress.update(more)
        if step not in self.saved:
            self.begun[step] = party if self._progress is not None else jax.tree.map(np.array, party)
        if not self.slow:
            self.wait()

    def hold(self, party):
        kept = copy.deepcopy((self._progress, party.train, party.test))
        state, memory = jax.tree.map(np.array, (party.state, party.memory))
        return state, memory, party.part_in_transit, kept

    def check(self):
        pass

    def wait(self):
        self.saved |= self.begun
        if self._progress is not None and self.begun:
            self.prune([max(self.begun)])
        self.begun.clear()

    def restore(self, step, like):
        if self._progress is None:
            return self.saved[step]
        like.state, like.memory, like.part_in_transit, kept = self.saved[step]
        progress, like.train, like.test = copy.deepcopy(kept)
        self._progress.clear()
        self._progress.update(progress)
        return None

    def forget(self, party):
        party.train = party.test = MetricSums()
        self._progress.clear()

    def prune(self, kept):
        for step in [step for step in self.saved if step not in kept]:
            del self.saved[step]

    def drop_after(self, step):
        for newer in [it for it in self.saved if it > step]:
            del self.saved[newer]

    def close(self):
        pass


class Net:
    """A run whose parties have folders of their own under `path`, kept when they die.

    Args:
      latency: seconds that a message takes; nothing else takes any time.
      disk: whether checkpoints are files; by default they are in memory, which is quicker.
      policy: the fields of the policy.
    """

    def __init__(self, path: pathlib.Path, cfg, *, checkpoint_steps=2, run=RUN, latency=0.01, disk=False, **policy):
        self.path, self.cfg, self.checkpoint_steps, self.run_name = path, cfg, checkpoint_steps, run
        self.policy, self.latency, self.disk = Policy(**policy), latency, disk
        self.saved = {}
        self.clock = Clock()
        self.network = MemoryNetwork(self.clock, through_bytes)
        self.network.faults = self._faults
        self.loop = Loop(self.network, self.clock)
        self.rules: list[Callable] = []
        self.stores, self.finals, self.instances = {}, {}, {}
        self.metrics = Metrics()
        self.own_tests = False
        self.tests = []
        """What each epoch's test has summed."""
        self.step = 0
        """Which the server has begun."""
        self.order: list[tuple] = []
        """Generations and exchanges as the server did them."""
        self.start_server()

    # -- Parties. --------------------------------------------------------------------------------------------------

    def start_server(self, **options):
        self.progress = {}
        self.stores["server"] = self.store("server", self.progress)
        self.server = Coordinator(
            self.cfg,
            self.build,
            self.stores["server"],
            self.policy,
            self.metrics,
            run=self.run_name,
            progress=self.progress,
            checkpoint_steps=self.checkpoint_steps,
            on_exchange=self._count,
            clock=self.clock,
            **options,
        )
        self.loop.start_server(self.server)

    def store(self, name, progress=None):
        """Checkpoints of a party, as it left them."""
        if not self.disk:
            return MemoryStore(self.saved.setdefault(name, {}), progress)
        return ClientStore(self.path / name) if progress is None else ServerStore(self.path / name, progress)

    def build(self, samples, test_samples, description):
        """The server's."""
        run = self.built(samples, test_samples, agreement.summary_of(description))
        return run.spec, lambda: run.server

    def built(self, samples, test_samples, summary):
        counts = {"samples": samples, "test_samples": test_samples, "own_tests": self.own_tests}
        return build.build(self.cfg, summary, **counts)

    def start_client(self, client, name=None, **options):
        """A new process of a client; `name` where there is one already."""
        instance = self.instances[client] = self.instances.get(client, 0) + 1

        name = client if name is None else name

        def open_store(run):
            self.stores[name] = self.store(f"client{client}/{run}")
            return self.stores[name]

        self.loop.add(
            ClientSession(
                client,
                lambda cfg: self.load(client, cfg),
                lambda cfg, samples, test_samples: self.party(client, cfg, samples, test_samples),
                open_store,
                on_end=lambda party: self.finals.__setitem__(client, party),
                clock=self.clock,
                instance=f"{client}.{instance}",
                draw=lambda: 1.0,
                **{"answer_seconds": 20.0, **options},
            ),
            name,
        )

    def start_clients(self):
        for client in range(self.cfg.clients):
            self.start_client(client)
        return self

    def own_data(self, client, cfg):
        """This client's training samples, and how many it draws in an epoch."""
        ds = dataset()
        indices, samples = build.divide(ds, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed)
        return data.Arrays(*ds.train.fetch(indices[client])), samples

    def test_data(self, client):
        return dataset().test

    def load(self, client, cfg):
        _, samples = self.own_data(client, cfg)
        summary, tests = build.DataSummary.of(dataset()), len(self.test_data(client))
        return Own(samples, tests, agreement.describe(self.built(samples, tests, summary).spec, summary))

    def party(self, client, cfg, samples, test_samples):
        own, _ = self.own_data(client, cfg)
        run = self.built(samples, test_samples, build.DataSummary.of(dataset()))
        return parties.Client(client, run.spec, run.client, parties.ClientData(own, self.test_data(client)), cfg.seed)

    def _count(self, exchange):
        """As a program would: an epoch's record at its end, which the checkpoints keep."""
        run = self.server.run
        self.step = max(self.step, exchange.step)
        self.order.append((self.server.membership.generation, exchange.position))
        position = run.schedule.position(exchange.step)
        if position.epoch_ends and exchange == list(run.schedule.step_exchanges(exchange.step))[-1]:
            self.progress.setdefault("history", []).append(position.epoch + 1)
            self.tests.append(run.party.test)
            run.party.train = run.party.test = MetricSums()

    @property
    def epochs(self):
        """Those that the server has recorded."""
        return self.progress["history"]

    # -- Time. -----------------------------------------------------------------------------------------------------

    def run(self, *clients, seconds=HOURS):
        """Until all are done, or these clients."""
        until = (lambda: not any(c in self.loop.clients for c in clients)) if clients else None
        self.loop.run(until, seconds=seconds)

    def run_to(self, step):
        """Until the server has done an exchange of this step."""
        self.loop.run(lambda: self.step >= step, seconds=HOURS)
        assert not self.failures, self.failures

    @property
    def failures(self):
        return self.loop.failures

    def counted(self, name):
        """One of the server's counters."""
        return getattr(self.metrics, name)._value.get()

    # -- Faults. ---------------------------------------------------------------------------------------------------

    def kill(self, client):
        """Its process dies: nothing is said or saved."""
        self.loop.kill(client)
        if client in self.stores:
            self.stores.pop(client).close()

    def restart(self, client, **options):
        self.kill(client)
        self.start_client(client, **options)

    def kill_server(self):
        self.loop.kill_server()
        self.stores.pop("server").close()

    def cut(self, *clients, **when):
        for client in clients or range(self.cfg.clients):
            self.network.cut(client, **when)

    def disturb(self, rule):
        """`rule(direction, client, message)` returns the delays of its copies, or None to leave it to others."""
        self.rules.append(rule)

    def delay(self, client, seconds, *, step, phase=None):
        """A client's first request of a step, or of a phase of it, is late; what it says after that waits behind."""
        late = []

        def rule(direction, who, message):
            key = message.request.position if direction == "up" and message.WhichOneof("kind") == "request" else None
            if key is None or who != client or key.step != step or phase not in (None, key.phase) or late:
                return None
            late.append(key)
            return (seconds,)

        self.disturb(rule)

    def silence(self, client, *, step):
        """A client's requests do not arrive from a step on, but its line stays open."""

        def rule(direction, who, message):
            if direction == "up" and who == client and message.WhichOneof("kind") == "request":
                return () if message.request.position.step >= step else None
            return None

        self.disturb(rule)

    def _faults(self, direction, client, message):
        found = (rule(direction, client, message) for rule in self.rules)
        return next((delays for delays in found if delays is not None), (self.latency,))

    # -- The result. -----------------------------------------------------------------------------------------------

    def assert_equal_to_program(self, clients=None):
        """The server and these clients, by default all, end with the same bits as in one program without a network."""
        assert not self.failures, self.failures
        server, alone = make_parties(self.cfg)
        sent = count_messages(server)
        for _ in parties.run(server, alone):
            pass
        if clients is None:  # what was done again is counted once
            found, spec = self.server.run.coded_bytes(), server.spec
            assert found.items() <= sent.items()
            codecs = (spec.codec, spec.grad_codec, spec.update_codec)
            assert bool(found) == any(codec.entropy_coded for codec in codecs)
        other = self.server.run.party
        pairs = [(server.state, other.state), (server.memory, other.memory)]
        for n in range(self.cfg.clients) if clients is None else clients:
            own, other = alone[n], self.finals[n]
            pairs.append((own.state, other.state))
            if own.needs_state(own.schedule.total_steps):
                pairs.append((own.memory, other.memory))
                if self.cfg.cut_seconds is None:  # else its aim follows what it has measured
                    pairs.append((own.up_bits, other.up_bits))
        for ours, theirs in pairs:
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)

    def close(self):
        for store in self.stores.values():
            store.close()


def count_messages(server):
    """Counts the bytes of a server's messages of training, by their names in a record, while it answers."""
    sent, answer = collections.Counter(), server.handle

    def handle(exchange, came):
        answers = answer(exchange, came)
        if exchange.phase not in (Phase.TEST, Phase.RESULT):
            kind = "" if exchange.phase in (Phase.FEATURES, Phase.GRADIENT) else "_synchronization"
            for way, spec, each in (("up", server.spec.up, came), ("down", server.spec.down, answers)):
                encoded = [messages.encode(m.payload, spec(exchange), None) for m in each.values()]
                sent[f"coded_{way}link{kind}_bytes"] += sum(map(len, itertools.chain(*encoded)))
        return answers

    server.handle = handle
    return sent


@contextlib.contextmanager
def net(path, cfg, **options):
    """A `Net` that is closed at the end."""
    it = Net(path, cfg, **options)
    try:
        yield it
    finally:
        it.close()

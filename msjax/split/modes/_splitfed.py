"""Every client has a part of its own; the parts are averaged now and then."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from msjax.checks import integer, number
from msjax.split import averages, fused, programs
from msjax.split.averages import Memory, no_error
from msjax.split.modes._mode import AveragingMode, decoded_part, encoded_part, handed_on
from msjax.split.payloads import payload_vector, vector_payload
from msjax.split.schedule import Exchange, Phase


@dataclasses.dataclass(frozen=True)
class SplitFed(AveragingMode):
    """Every client updates a part of its own; weights and statistics are averaged every `average_steps` steps.

    There is an average at the end of an epoch in any case. Momenta stay each client's own, and so does whatever else an
    optimizer keeps in its state: one that keeps weights there, as `optax.contrib.schedule_free` does, is not for this
    mode without a `client_fraction`. The server has one part, which takes a step with the mean gradient of all clients,
    unlike both versions of SplitFed learning (arXiv 2004.12088). The server sees features, labels and every client's
    part at each average.

    With a `client_fraction` C below 1, only C·K of the clients (rounded, at least one) take part in a round, which is
    what lies between two averages, as in FedAvg (arXiv 1602.05629). Which ones is drawn anew for each round from `seed`
    and the round's number, so that every party knows it. They begin with the last average, which the server hands them,
    and keep nothing from round to round: momenta are averaged with the weights (as in arXiv 1905.03817), so that who
    was not in the last round goes on with them, too.

    Args:
      average_steps: steps of a round.
      client_fraction: above 0 and at most 1.
      seed: of the draws; None for the run's, and for 0 where all take part and nothing is drawn.

    Raises:
      ValueError: an argument is out of range.
    """

    average_steps: int = 10
    client_fraction: float = 1.0
    seed: int | None = None

    own_parts = True

    def __post_init__(self):
        object.__setattr__(self, "average_steps", integer("average_steps", self.average_steps, 1))
        rule = "above 0 and at most 1"
        fraction = number("client_fraction", self.client_fraction, rule, lambda value: 0 < value <= 1)
        object.__setattr__(self, "client_fraction", fraction)
        if self.seed is not None:
            object.__setattr__(self, "seed", integer("seed", self.seed, 0))

    def seeded(self, seed):
        # Without draws runs of several seeds are one to the compiler.
        own = seed if self.client_fraction < 1 else 0
        return self if self.seed is not None else dataclasses.replace(self, seed=own)

    # -- Who takes part. --------------------------------------------------------------------------------------------

    def clients_per_step(self, schedule):
        return max(1, round(self.client_fraction * schedule.clients))

    def hands_parts_on(self, schedule):
        return self.clients_per_step(schedule) < schedule.clients

    def _participants(self, schedule, step):
        epoch, within = divmod(step, schedule.epoch_steps)
        rounds = math.ceil(schedule.epoch_steps / self.average_steps)  # of an epoch
        number = epoch * rounds + within // self.average_steps
        return _drawn(self.seed or 0, number, schedule.clients, self.clients_per_step(schedule))

    def position(self, schedule, step):
        found = super().position(schedule, step)
        if not self.hands_parts_on(schedule):
            return found
        starts = self.turn_starts(schedule, step)
        ends = bool(self._after(step, schedule.epoch_steps))
        return found._replace(clients=self._participants(schedule, step), turn_starts=starts, turn_ends=ends)

    def turn_length(self, schedule):
        return min(self.average_steps, schedule.epoch_steps)

    def turn_starts(self, schedule, step):
        return step % schedule.epoch_steps % self.average_steps == 0

    def test_clients(self, schedule, epoch):
        return self.position(schedule, (epoch + 1) * schedule.epoch_steps - 1).clients

    def exchanges(self, schedule, step):
        position = self.position(schedule, step)
        if position.turn_starts:  # of those who take part in a round; where all do, they have it already
            yield Exchange(step, Phase.FETCH_PART, position.clients)
        yield from super().exchanges(schedule, step)

    # -- The average. -----------------------------------------------------------------------------------------------

    def averages_after(self, schedule, step):
        return schedule.clients > 1 and bool(self._after(step, schedule.epoch_steps))

    def _after(self, step, epoch_steps):
        within = step % epoch_steps + 1
        return (within % self.average_steps == 0) | (within == epoch_steps)

    def up(self, spec, exchange):
        if not self.hands_parts_on(spec.schedule):
            return super().up(spec, exchange)
        return spec.handed_payload() if exchange.phase == Phase.AVERAGE else None

    def down(self, spec, exchange):
        if not self.hands_parts_on(spec.schedule):
            return super().down(spec, exchange)
        if exchange.phase == Phase.FETCH_PART:
            return spec.handed_payload() if exchange.step > 0 else None  # no part before there was an average
        # Whoever is in the next round fetches it there. Tests come before that.
        ends = spec.schedule.position(exchange.step).epoch_ends
        return spec.handed_payload() if exchange.phase == Phase.AVERAGE and ends else None

    def server_answer(self, server, exchange, payloads):
        spec = server.spec
        if not self.hands_parts_on(spec.schedule):
            return super().server_answer(server, exchange, payloads)
        if exchange.phase == Phase.AVERAGE:
            parts = [payload_vector(decoded_part(spec, payload)) for payload in payloads]
            server.part_in_transit = np.asarray(programs.mean_vectors(parts))
        part = server.part_in_transit
        answers = part is not None and self.down(spec, exchange) is not None
        return [encoded_part(spec, vector_payload(part)) if answers else None] * len(payloads)

    def client_memory(self, spec, state):
        if not spec.compresses_updates:
            return ()
        return Memory(no_error(spec), averages.reference_of(state))

    def client_send(self, client, exchange):
        if self.hands_parts_on(client.schedule):
            return encoded_part(client.spec, client.part()) if exchange.phase == Phase.AVERAGE else None
        if client.spec.compresses_updates:
            args = (client.state, client.memory, client.key(exchange))
            payload, client.memory = programs.encode_part(client.spec, *args)
            return payload
        return vector_payload(programs.to_vector((client.state.params, client.state.stats)))

    def client_receive(self, client, exchange, payload):
        if self.hands_parts_on(client.schedule):
            if payload is not None:
                ended = exchange.phase == Phase.AVERAGE
                client.adopt(decoded_part(client.spec, payload), exchange.step + ended, new_turn=not ended)
            return
        if client.spec.compresses_updates:
            client.state, client.memory = programs.decode_part(client.spec, payload, client.state, client.memory)
            return
        params, stats = programs.from_vector(payload_vector(payload), (client.state.params, client.state.stats))
        client.state = client.state._replace(params=params, stats=stats)

    def spread(self, spec, state):
        clients = self.clients_per_step(spec.schedule)

        def to_all(part):
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), part)

        return _with_own(spec, state, to_all)

    def gather(self, spec, state):
        return _with_own(spec, state, lambda part: jax.tree.map(lambda leaf: leaf[0], part))

    def after_fused_step(self, spec, state, metrics, keys, *, axis_name=None, mesh=None, clients_at_once=None):
        if spec.compresses_updates:
            return self._average(spec, state, metrics, keys, axis_name, mesh, clients_at_once)
        now = self._after(state.step - 1, spec.schedule.epoch_steps)

        def average(part):
            momenta = self.hands_parts_on(spec.schedule)
            mean = fused.average_parts(handed_on(spec, part), axis_name=axis_name, momenta=momenta)
            mean = handed_on(spec, mean)  # to those of the next round, and to those who test
            return jax.tree.map(lambda mean, own: jnp.where(now, mean, own), mean, part)

        return _with_own(spec, state, average), metrics

    def _average(self, spec, state, metrics, keys, axis_name, mesh, clients_at_once):
        """The average through the codec, in the steps that have one."""
        now = self._after(state.step - 1, spec.schedule.epoch_steps)
        own = state.client.without(spec.client_constants)
        client, memory, sent = averages.average_parts(
            spec, now, own, state.memory, keys, axis_name, clients_at_once=clients_at_once, mesh=mesh
        )
        metrics = fused.with_average_bytes(metrics, sent, axis_name)
        client = client.with_constants_of(state.client, spec.client_constants)
        return state._replace(client=client, memory=memory), metrics


def _with_own(spec, state, change):
    """The state with what each client has of its own as `change` makes it, and what never changes as it is."""
    client = change(state.client.without(spec.client_constants))
    return state._replace(client=client.with_constants_of(state.client, spec.client_constants))


_ROUND = 1 << 20
"""Tells these draws from others with the same seed."""


@functools.lru_cache(maxsize=64)
def _drawn(seed, round_, clients, count):
    """The numbers of those that take part in a round, in ascending order."""
    order = np.random.default_rng([_ROUND, seed, round_]).permutation(clients)
    return tuple(sorted(order[:count].tolist()))

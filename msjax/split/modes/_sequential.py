"""One client after another trains with the server and hands its part on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from msjax.checks import integer
from msjax.split.modes._mode import Mode, decoded_part, encoded_part, handed_on
from msjax.split.payloads import payload_vector, vector_payload
from msjax.split.schedule import Exchange, Phase, StepPosition


@dataclasses.dataclass(frozen=True)
class Sequential(Mode):
    """One client after another trains for `turn_steps` steps and hands its part on by way of the server.

    By default a turn is a client's whole share of an epoch. Source: Gupta and Raskar, arXiv 1810.06060. The server sees
    features, labels and the part that is handed on.

    Raises:
      ValueError: `turn_steps` is below 1.
    """

    turn_steps: int | None = None

    one_at_a_time = True

    def __post_init__(self):
        if self.turn_steps is not None:
            object.__setattr__(self, "turn_steps", integer("turn_steps", self.turn_steps, 1))

    def epoch_steps(self, schedule):
        return schedule.client_steps * schedule.clients

    def position(self, schedule, step):
        epoch, within = divmod(step, schedule.epoch_steps)
        before, client, at, length = self._turn(schedule, within)
        start = (before + at) * schedule.batch_size
        stop = min(start + schedule.batch_size, schedule.samples)
        ends = within == schedule.epoch_steps - 1
        return StepPosition(epoch, start, stop, (client,), at == 0, at == length - 1, ends)

    def _turn(self, schedule, within, minimum=min):
        """(batches of each client before this round, whose turn, step in the turn, its length), at a step of an epoch.

        With `jnp.minimum` also of a step that is traced.
        """
        steps, turn = schedule.client_steps, self.turn_length(schedule)
        round_, rest = within // (turn * schedule.clients), within % (turn * schedule.clients)
        # The last round of an epoch may be shorter.
        length = minimum(turn, steps - round_ * turn)
        return round_ * turn, rest // length, rest % length, length

    def turn_length(self, schedule):
        return min(self.turn_steps or schedule.client_steps, schedule.client_steps)

    def turn_starts(self, schedule, step):
        _, _, at, _ = self._turn(schedule, step % schedule.epoch_steps, jnp.minimum)
        return at == 0

    def exchanges(self, schedule, step):
        position = self.position(schedule, step)
        relayed = schedule.clients > 1
        if relayed and position.turn_starts:
            yield Exchange(step, Phase.FETCH_PART, position.clients)
        yield from self.passes(schedule, step)
        if relayed and position.turn_ends:
            yield Exchange(step, Phase.RETURN_PART, position.clients)

    def test_clients(self, schedule, epoch):
        return (schedule.clients - 1,)

    def up(self, spec, exchange):
        return spec.handed_payload() if exchange.phase == Phase.RETURN_PART else None

    def down(self, spec, exchange):
        # No part is handed on before one was returned.
        fetched = exchange.phase == Phase.FETCH_PART and exchange.step > 0
        return spec.handed_payload() if fetched else None

    def client_send(self, client, exchange):
        return encoded_part(client.spec, client.part()) if exchange.phase == Phase.RETURN_PART else None

    def client_receive(self, client, exchange, payload):
        if exchange.phase == Phase.FETCH_PART and payload is not None:
            client.adopt(decoded_part(client.spec, payload), exchange.step)

    def server_answer(self, server, exchange, payloads):
        if exchange.phase == Phase.RETURN_PART:
            server.part_in_transit = np.asarray(payload_vector(decoded_part(server.spec, payloads[0])))
            return [None]
        part = server.part_in_transit
        return [None if part is None else encoded_part(server.spec, vector_payload(part))]

    def fused_step(self, spec, state, x, y, keys, **where):
        if spec.compresses_parts:
            # A client begins its turn with what the one before has handed on.
            now = self.turn_starts(spec.schedule, state.step) & (state.step > 0)
            handed = functools.partial(handed_on, spec)
            client = jax.lax.cond(now, handed, lambda client: client, state.client)
            state = state._replace(client=client)
        return super().fused_step(spec, state, x, y, keys, **where)

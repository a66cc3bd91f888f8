"""One client after another trains with the server and hands its part on."""

import dataclasses

import numpy as np

from msjax.split.modes._mode import Mode
from msjax.split.payloads import PayloadSpec, payload_vector, vector_payload
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
        if self.turn_steps is not None and self.turn_steps < 1:
            raise ValueError(f"turn_steps must be at least 1, got {self.turn_steps}")

    def epoch_steps(self, schedule):
        return schedule.client_steps * schedule.clients

    def position(self, schedule, step):
        epoch, within = divmod(step, schedule.epoch_steps)
        steps = schedule.client_steps
        turn = min(self.turn_steps or steps, steps)
        round_, rest = divmod(within, turn * schedule.clients)
        # The last round of an epoch may be shorter.
        turn_length = min(turn, steps - round_ * turn)
        client, at = divmod(rest, turn_length)
        start = (round_ * turn + at) * schedule.batch_size
        stop = min(start + schedule.batch_size, schedule.samples)
        ends = within == schedule.epoch_steps - 1
        return StepPosition(epoch, start, stop, (client,), at == 0, at == turn_length - 1, ends)

    def exchanges(self, schedule, step):
        position = self.position(schedule, step)
        relayed = schedule.clients > 1
        if relayed and position.turn_starts:
            yield Exchange(step, Phase.FETCH_PART, position.clients)
        yield from self.passes(schedule, step)
        if relayed and position.turn_ends:
            yield Exchange(step, Phase.RETURN_PART, position.clients)

    def test_clients(self, schedule):
        return (schedule.clients - 1,)

    def may_checkpoint(self, schedule, step, every):
        # Where a turn begins the server holds the part that goes round, so no client has to have saved anything.
        return self.position(schedule, step).turn_starts if schedule.clients > 1 else step % every == 0

    def keeps_state(self, schedule):
        return schedule.clients == 1

    def up(self, spec, exchange):
        return PayloadSpec.of_vector(spec.client_state_values) if exchange.phase == Phase.RETURN_PART else None

    def down(self, spec, exchange):
        # No part is handed on before one was returned.
        fetched = exchange.phase == Phase.FETCH_PART and exchange.step > 0
        return PayloadSpec.of_vector(spec.client_state_values) if fetched else None

    def client_send(self, client, exchange):
        return client.part() if exchange.phase == Phase.RETURN_PART else None

    def client_receive(self, client, exchange, payload):
        if exchange.phase == Phase.FETCH_PART and payload is not None:
            client.adopt(payload, exchange.step)

    def server_answer(self, server, exchange, payloads):
        if exchange.phase == Phase.RETURN_PART:
            server.part_in_transit = np.asarray(payload_vector(payloads[0]))
            return [None]
        return [None if server.part_in_transit is None else vector_payload(server.part_in_transit)]

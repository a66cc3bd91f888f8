"""All clients step together and share one part: the paper's split learning."""

import dataclasses

from msjax.split import programs
from msjax.split.modes._mode import Mode
from msjax.split.payloads import PayloadSpec, payload_vector, vector_payload
from msjax.split.schedule import Phase


@dataclasses.dataclass(frozen=True)
class Parallel(Mode):
    """In every step all clients' gradients and batch statistics are averaged, so that their parts stay equal.

    Source: arXiv 2408.13787, section 2. The server sees features, labels and every client's gradients.
    """

    def averages_after(self, schedule, step):
        return schedule.clients > 1

    def up(self, spec, exchange):
        return PayloadSpec.of_vector(spec.client_update_values) if exchange.phase == Phase.AVERAGE else None

    down = up

    def client_finish(self, client, exchange, update):
        if self.averages_after(client.schedule, exchange.step):
            client.pending_update = update
        else:
            client.update(update)

    def client_send(self, client, exchange):
        return vector_payload(programs.to_vector(client.pending_update))

    def client_receive(self, client, exchange, payload):
        client.update(programs.from_vector(payload_vector(payload), client.pending_update))
        client.pending_update = None

    def server_answer(self, server, exchange, payloads):
        return [vector_payload(programs.mean_vectors(list(map(payload_vector, payloads))))] * len(payloads)

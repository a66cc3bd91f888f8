"""All clients step together and share one part: the paper's split learning."""

import dataclasses

from msjax.split import programs
from msjax.split.averages import Memory, no_error
from msjax.split.modes._mode import AveragingMode
from msjax.split.payloads import payload_vector, vector_payload


@dataclasses.dataclass(frozen=True)
class Parallel(AveragingMode):
    """In every step all clients' gradients and batch statistics are averaged, so that their parts stay equal.

    Source: arXiv 2408.13787, section 2. The server sees features, labels and every client's gradients.
    """

    def averages_after(self, schedule, step):
        return schedule.clients > 1

    def client_finish(self, client, exchange, update):
        if self.averages_after(client.schedule, exchange.step):
            client.pending_update = update
        else:
            client.update(update)

    def client_memory(self, spec, state):
        return Memory(no_error(spec)) if spec.compresses_updates else ()

    def client_send(self, client, exchange):
        if not client.spec.compresses_updates:
            return vector_payload(programs.to_vector(client.pending_update))
        args = (client.pending_update, client.state.stats, client.memory, client.key(exchange))
        payload, client.memory = programs.encode_update(client.spec, *args)
        return payload

    def client_receive(self, client, exchange, payload):
        update, client.pending_update = client.pending_update, None
        if client.spec.compresses_updates:
            client.update(programs.decode_update(client.spec, payload, update, client.state.stats))
        else:
            client.update(programs.from_vector(payload_vector(payload), update))

"""Every client has a part of its own; the parts are averaged now and then."""

import dataclasses

import jax
import jax.numpy as jnp

from msjax.split import fused, programs
from msjax.split.modes._mode import Mode
from msjax.split.payloads import PayloadSpec, payload_vector, vector_payload
from msjax.split.schedule import Phase


@dataclasses.dataclass(frozen=True)
class SplitFed(Mode):
    """Every client updates a part of its own; weights and statistics are averaged every `average_steps` steps.

    There is an average at the end of an epoch in any case. Momenta stay each client's own. Source: SplitFed learning,
    arXiv 2004.12088. The server sees features, labels and every client's part at each average.

    Raises:
      ValueError: `average_steps` is below 1.
    """

    average_steps: int = 10

    own_parts = True

    def __post_init__(self):
        if self.average_steps < 1:
            raise ValueError(f"average_steps must be at least 1, got {self.average_steps}")

    def averages_after(self, schedule, step):
        return schedule.clients > 1 and bool(self._after(step, schedule.epoch_steps))

    def _after(self, step, epoch_steps):
        within = step % epoch_steps + 1
        return (within % self.average_steps == 0) | (within == epoch_steps)

    def up(self, spec, exchange):
        return PayloadSpec.of_vector(spec.client_update_values) if exchange.phase == Phase.AVERAGE else None

    down = up

    def client_send(self, client, exchange):
        return vector_payload(programs.to_vector((client.state.params, client.state.stats)))

    def client_receive(self, client, exchange, payload):
        params, stats = programs.from_vector(payload_vector(payload), (client.state.params, client.state.stats))
        client.state = client.state._replace(params=params, stats=stats)

    def server_answer(self, server, exchange, payloads):
        return [vector_payload(programs.mean_vectors(list(map(payload_vector, payloads))))] * len(payloads)

    def spread(self, state, clients):
        client = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), state.client)
        return state._replace(client=client)

    def gather(self, state):
        return state._replace(client=jax.tree.map(lambda leaf: leaf[0], state.client))

    def fused_step(self, spec, state, x, y, keys, *, axis_name=None):
        state, metrics = super().fused_step(spec, state, x, y, keys, axis_name=axis_name)
        mean = fused.average_parts(state.client, axis_name=axis_name)
        now = self._after(state.step - 1, spec.schedule.epoch_steps)
        client = jax.tree.map(lambda mean, own: jnp.where(now, mean, own), mean, state.client)
        return state._replace(client=client), metrics

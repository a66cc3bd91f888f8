"""Every client has a part of its own; the parts are averaged now and then."""

import dataclasses

import jax
import jax.numpy as jnp

from msjax.split import averages, fused, programs
from msjax.split.averages import Memory, no_error
from msjax.split.modes._mode import AveragingMode
from msjax.split.payloads import payload_vector, vector_payload


@dataclasses.dataclass(frozen=True)
class SplitFed(AveragingMode):
    """Every client updates a part of its own; weights and statistics are averaged every `average_steps` steps.

    There is an average at the end of an epoch in any case. Momenta stay each client's own. Source: SplitFed learning,
    arXiv 2004.12088. The server sees features, labels and every client's part at each average.

    Raises:
      ValueError: `average_steps` is below 1.
    """

    average_steps: int = 10

    own_parts = averages_parts = True

    def __post_init__(self):
        if self.average_steps < 1:
            raise ValueError(f"average_steps must be at least 1, got {self.average_steps}")

    def averages_after(self, schedule, step):
        return schedule.clients > 1 and bool(self._after(step, schedule.epoch_steps))

    def _after(self, step, epoch_steps):
        within = step % epoch_steps + 1
        return (within % self.average_steps == 0) | (within == epoch_steps)

    def client_memory(self, spec, state):
        if not spec.compresses_updates:
            return ()
        return Memory(no_error(spec), averages.to_vectors(state.params, state.stats))

    def client_send(self, client, exchange):
        if client.spec.compresses_updates:
            args = (client.state, client.memory, client.key(exchange))
            payload, client.memory = programs.encode_part(client.spec, *args)
            return payload
        return vector_payload(programs.to_vector((client.state.params, client.state.stats)))

    def client_receive(self, client, exchange, payload):
        if client.spec.compresses_updates:
            client.state, client.memory = programs.decode_part(client.spec, payload, client.state, client.memory)
            return
        params, stats = programs.from_vector(payload_vector(payload), (client.state.params, client.state.stats))
        client.state = client.state._replace(params=params, stats=stats)

    def spread(self, spec, state):
        def to_all(part):
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (spec.schedule.clients, *leaf.shape)), part)

        return _with_own(spec, state, to_all)

    def gather(self, spec, state):
        return _with_own(spec, state, lambda part: jax.tree.map(lambda leaf: leaf[0], part))

    def after_fused_step(self, spec, state, metrics, keys, *, axis_name=None, mesh=None, clients_at_once=None):
        if spec.compresses_updates:
            return self._average(spec, state, metrics, keys, axis_name, mesh, clients_at_once)
        now = self._after(state.step - 1, spec.schedule.epoch_steps)

        def average(part):
            mean = fused.average_parts(part, axis_name=axis_name)
            return jax.tree.map(lambda mean, own: jnp.where(now, mean, own), mean, part)

        return _with_own(spec, state, average), metrics

    def _average(self, spec, state, metrics, keys, axis_name, mesh, clients_at_once):
        """The average through the codec, in the steps that have one."""

        def average(client, memory):
            args = (spec, client, memory, keys, axis_name)
            return averages.average_parts(*args, clients_at_once=clients_at_once, mesh=mesh)

        def nothing(client, memory):
            return client, memory, (jnp.float32(0), jnp.float32(0))

        now = self._after(state.step - 1, spec.schedule.epoch_steps)
        own = state.client.without(spec.client_constants)
        client, memory, sent = jax.lax.cond(now, average, nothing, own, state.memory)
        metrics = fused.with_average_bytes(metrics, sent, axis_name)
        client = client.with_constants_of(state.client, spec.client_constants)
        return state._replace(client=client, memory=memory), metrics


def _with_own(spec, state, change):
    """The state with what each client has of its own as `change` makes it, and what never changes as it is."""
    client = change(state.client.without(spec.client_constants))
    return state._replace(client=client.with_constants_of(state.client, spec.client_constants))

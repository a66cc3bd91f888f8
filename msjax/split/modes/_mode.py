"""What every mode has to say, with what most of them say."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from msjax.split import fused
from msjax.split.averages import Memory, no_error
from msjax.split.payloads import Payload, PayloadSpec, payload_vector, vector_payload
from msjax.split.schedule import Exchange, Phase, Schedule, StepPosition
from msjax.split.state import PartState, TrainState
from msjax.split.step import StepMetrics
from msjax.split.trees import is_float

if TYPE_CHECKING:
    from msjax.split.parties import Client, Server
    from msjax.split.spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Mode:
    """How the clients work together. Its fields are its whole configuration; equal modes are equal by value."""

    own_parts: ClassVar[bool] = False
    """Whether every client has a part of its own that differs from the others' within a run; weights are then averaged,
    rather than gradients."""
    one_at_a_time: ClassVar[bool] = False
    """Whether a step is one client's, and the part goes from client to client by the server."""

    def seeded(self, seed: int) -> "Mode":
        """Returns the mode with `seed`, that of the run, where it draws and has no seed of its own."""
        return self

    # -- The order of exchanges. ------------------------------------------------------------------------------------

    def epoch_steps(self, schedule: Schedule) -> int:
        """Returns the steps of an epoch."""
        return schedule.client_steps

    def position(self, schedule: Schedule, step: int) -> StepPosition:
        """Returns where in the data a step is: here the same batch of every client's share."""
        epoch, within = divmod(step, self.epoch_steps(schedule))
        start = within * schedule.batch_size
        stop = min(start + schedule.batch_size, schedule.samples)
        return StepPosition(
            epoch, start, stop, everyone(schedule.clients), False, False, within == schedule.epoch_steps - 1
        )

    def exchanges(self, schedule: Schedule, step: int) -> Iterator[Exchange]:
        """Yields the exchanges of a training step."""
        yield from self.passes(schedule, step)
        if self.averages_after(schedule, step):
            yield Exchange(step, Phase.AVERAGE, self.position(schedule, step).clients)

    def passes(self, schedule: Schedule, step: int) -> Iterator[Exchange]:
        """Yields those of the passes forward and backward, which all modes have."""
        clients = self.position(schedule, step).clients
        yield Exchange(step, Phase.FEATURES, clients)
        if schedule.u_shaped:
            yield Exchange(step, Phase.GRADIENT, clients)

    def averages_after(self, schedule: Schedule, step: int) -> bool:
        """Whether the clients average after a step."""
        return False

    def test_clients(self, schedule: Schedule, epoch: int) -> tuple[int, ...]:
        """Returns the clients that have the trained part after an epoch, as many after each: they test, and keep it."""
        return everyone(schedule.clients)

    def may_checkpoint(self, schedule: Schedule, step: int, every: int) -> bool:
        """Whether the state before a step is saved."""
        if not self.hands_parts_on(schedule):
            return step % every == 0
        # Where a turn begins the server has the part that all go on with, so no client has to have saved anything: in
        # the first steps behind a multiple of `every`, as many as a turn has.
        return self.position(schedule, step).turn_starts and step % every < self.turn_length(schedule)

    def hands_parts_on(self, schedule: Schedule) -> bool:
        """Whether others take part from step to step, and go on with the part that the server has of those before.

        Of such a part only half precision is an `update_codec`: errors, and what changes are counted from, would have
        to be kept for clients that may never come again.
        """
        return self.one_at_a_time and schedule.clients > 1

    def arriving_part(self, server: "Server") -> Payload | None:
        """Returns the part that the server holds between two clients, as it arrives at one; None where it has none."""
        part = server.part_in_transit
        return None if part is None else decoded_part(server.spec, encoded_part(server.spec, vector_payload(part)))

    def turn_length(self, schedule: Schedule) -> int:
        """Returns the most steps of a turn; only where it hands parts on."""
        raise NotImplementedError

    def turn_starts(self, schedule: Schedule, step: Any) -> Any:
        """Returns whether a client begins its turn with a step, which may be traced; only where it hands parts on."""
        return False

    # -- What the parties do with exchanges of this mode's own. -----------------------------------------------------

    def up(self, spec: "RunSpec", exchange: Exchange) -> PayloadSpec | None:
        """Returns what a client sends in an exchange that is not a pass."""
        return None

    def down(self, spec: "RunSpec", exchange: Exchange) -> PayloadSpec | None:
        """Returns what the server answers there."""
        return None

    def client_send(self, client: "Client", exchange: Exchange) -> Any:
        """Returns a client's payload in such an exchange, or None."""
        return None

    def client_receive(self, client: "Client", exchange: Exchange, payload: Any) -> None:
        """Goes on with the server's answer in such an exchange."""

    def server_answer(self, server: "Server", exchange: Exchange, payloads: list[Any]) -> list[Any]:
        """Returns the server's answer to each client in such an exchange."""
        return [None] * len(payloads)

    def client_finish(self, client: "Client", exchange: Exchange, update: Any) -> None:
        """Does with a client's gradients what the mode wants behind the backward pass: here, updates its part."""
        client.update(update)

    def client_memory(self, spec: "RunSpec", state: PartState) -> Any:
        """Returns what a client remembers of averages before the first step; () where nothing."""
        return ()

    def server_memory(self, spec: "RunSpec") -> Any:
        """Returns what the server remembers of averages before the first step; () where nothing."""
        return ()

    # -- The same in one program. -----------------------------------------------------------------------------------

    def clients_per_step(self, schedule: Schedule) -> int:
        """Returns how many clients take a step together."""
        return 1 if self.one_at_a_time else schedule.clients

    def spread(self, spec: "RunSpec", state: TrainState) -> TrainState:
        """Returns the state in one program: here, all clients share one part."""
        return state

    def gather(self, spec: "RunSpec", state: TrainState) -> TrainState:
        """Returns the state with one client part, as it is at the end of an epoch: the inverse of `spread`."""
        return state

    def fused_step(
        self,
        spec: "RunSpec",
        state: TrainState,
        x: Any,
        y: Any,
        keys: jax.Array,
        *,
        axis_name: str | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        """Takes the step in one program; see `fused.fused_step`."""
        where = {"axis_name": axis_name, "mesh": mesh}
        state, metrics = fused.fused_step(spec, state, x, y, keys, **where)
        return self.after_fused_step(spec, state, metrics, keys, **where)

    def after_fused_step(
        self,
        spec: "RunSpec",
        state: TrainState,
        metrics: StepMetrics,
        keys: jax.Array,
        *,
        axis_name: str | None = None,
        mesh: Mesh | None = None,
        clients_at_once: int | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        """Returns state and metrics with what the mode does behind a step in one program: here, nothing.

        Args:
          clients_at_once: for how many clients it is computed at the same time; None for all.
        """
        return state, metrics


def encoded_part(spec: "RunSpec", payload: Any) -> Any:
    """Returns a part that is handed on, as `RunSpec.handed_payload` describes it, of the payload of its vector."""
    return spec.handed_payload().encode([jnp.asarray(payload_vector(payload))]) if spec.compresses_parts else payload


def decoded_part(spec: "RunSpec", payload: Any) -> Any:
    """Returns the payload of the vector of a part that was handed on."""
    return vector_payload(spec.handed_payload().decode(payload)[0]) if spec.compresses_parts else payload


def handed_on(spec: "RunSpec", tree: Any) -> Any:
    """Returns what arrives of a part that is handed on, or of several, in one program."""
    if not spec.compresses_parts:
        return tree

    def arrived(leaf):
        return spec.update_codec.roundtrip(leaf.astype(jnp.float32)).astype(leaf.dtype) if is_float(leaf) else leaf

    return jax.tree.map(arrived, tree)


@functools.lru_cache(maxsize=16)
def everyone(clients: int) -> tuple[int, ...]:
    """Returns the numbers of all clients; made once, as there may be a thousand."""
    return tuple(range(clients))


class AveragingMode(Mode):
    """A mode in which the clients average, in exchanges of phase AVERAGE, and all get the same answer."""

    def up(self, spec, exchange):
        return spec.average_payload if exchange.phase == Phase.AVERAGE else None

    down = up

    def server_memory(self, spec):
        return Memory(no_error(spec)) if spec.compresses_updates else ()

    def server_answer(self, server, exchange, payloads):
        return [server.mean(exchange, payloads)] * len(payloads)

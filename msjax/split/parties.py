"""The parties of split learning as they are apart: what a client and the server do in each exchange.

No network is in here: `run` lets all of them talk in one program, `msjax.distributed` over a network. Both call the
same jitted functions on the same arrays, so they compute the same bits. What `fused` computes in one program agrees
with them to float32 rounding.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from msjax import data
from msjax.split import budget, programs, shards
from msjax.split.metrics import MetricSums, sums_of, total
from msjax.split.payloads import Payload, payload_vector, vector_payload
from msjax.split.reads import ClientBatches
from msjax.split.schedule import Exchange, Phase, Schedule
from msjax.split.spec import RunSpec
from msjax.split.state import PartState, with_update_count, without_constants
from msjax.split.step import PartUpdate, with_payload
from msjax.split.trees import is_float, named_leaves, stack, unstack


class Message(NamedTuple):
    """What one party tells the other in an exchange; what an exchange has no use for is None."""

    payload: Payload | None = None
    """As `RunSpec.up` and `RunSpec.down` say."""
    labels: Any = None
    """(B, …), as the data set has them."""
    metrics: MetricSums | None = None
    """Where the labels are the client's: loss and metrics of its batch, or of all its test batches."""
    grad_bits: Any = None
    """With features whose budget follows the client's link: float32 (), the most bits that a value of their gradients
    may take."""


class ClientData(NamedTuple):
    """What a client has."""

    train: data.Split
    test: data.Split


class Client:
    """One client: its data, its part of the network, and what it does in every exchange.

    Args:
      client_id: its number, from 0.
      spec: the run.
      state: its part before the first step.
      own: its data; random crops and orders are drawn from `seed`.
      numpy_encoder: whether it encodes by NumPy, to the same bits, and not within the jitted functions.
      workers: how many processes read data that are not in memory, see `data.Reader`.

    Raises:
      ValueError: `numpy_encoder` with a codec that has none.
    """

    def __init__(
        self,
        client_id: int,
        spec: RunSpec,
        state: PartState,
        own: ClientData,
        seed: int,
        *,
        numpy_encoder: bool = False,
        workers: int | None = None,
    ):
        self.client_id, self.spec, self.state = client_id, spec, state
        self.memory = spec.mode.client_memory(spec, state)
        """What it remembers of averages; see `averages.Memory`."""
        self.up_bits = budget.first_up_bits(spec)
        """Where there is a budget for the cut, what it aims its features at; else None."""
        self.bytes_per_second = budget.first_bytes_per_second(spec)
        """Where the budget follows its link, the speed that it takes that to have, 0 for what is not known; else None.
        """
        check_travels(spec, state.stats)
        self._batches = ClientBatches(spec.schedule, client_id, own.train, own.test, seed, workers=workers)
        self._seed, self._numpy = seed, numpy_encoder
        if numpy_encoder:
            for codec in (*spec.codec.all, *spec.test_codec.all, *(spec.grad_codec.all if spec.u_shaped else ())):
                codec.encode_numpy(np.zeros((1, 1), np.float32))  # raises where it cannot
        self.keeps_result = client_id in spec.schedule.test_clients
        """Whether it has the trained part at the end, as far as it knows; a server may know better."""
        self.begin()

    @property
    def schedule(self) -> Schedule:
        """The order of exchanges."""
        return self.spec.schedule

    @property
    def keeps_state(self) -> bool:
        """Whether its state outlives a turn; if not it is handed one when its turn begins."""
        return not self.spec.mode.hands_parts_on(self.schedule)

    def needs_state(self, at: int) -> bool:
        """Whether the part that it has before step `at` counts."""
        return self.keeps_result if at == self.schedule.total_steps else self.keeps_state

    def exchanges(self, start: int = 0) -> Iterator[Exchange]:
        """Yields this client's exchanges from step `start` on."""
        return (exchange for exchange in self.schedule.exchanges(start) if self.client_id in exchange.clients)

    def begin(self) -> None:
        """Forgets an exchange under way, to begin at another step."""
        self._pending = self._outgoing = self._tail_update = None
        self.pending_update: PartUpdate | None = None
        """What this client contributes to an average, where its mode has one."""
        self._prepared: tuple[Exchange, Any] | None = None
        self._tested: list[MetricSums] = []

    def may_checkpoint(self, exchange: Exchange, every: int) -> bool:
        """Whether the state before this exchange is to be saved."""
        if exchange.phase != Phase.FEATURES or not self.keeps_state:
            return False
        return self.schedule.may_checkpoint(exchange.step, every)

    def checkpoint(self) -> Any:
        """Returns all that it has to go on from here with, as a tree of arrays; not what never changes."""
        state = self.state.without(self.spec.client_constants)
        if self.spec.cut_seconds is not None:
            return state, self.memory, self.up_bits, self.bytes_per_second
        if self.spec.cut_bits is not None:
            return state, self.memory, self.up_bits
        return (state, self.memory) if self.memory else state

    def go_back(self, checkpoint: Any) -> None:
        """Goes on from such a checkpoint."""
        if self.spec.cut_seconds is not None:
            state, self.memory, self.up_bits, speed = checkpoint
            self.bytes_per_second = np.float32(speed)
        elif self.spec.cut_bits is not None:
            state, self.memory, self.up_bits = checkpoint
        else:
            state, self.memory = checkpoint if self.memory else (checkpoint, ())
        self.state = state.with_constants_of(self.state, self.spec.client_constants)

    def part(self) -> Payload:
        """Returns its part with the optimizer's state, as `RunSpec.part_payload` describes it."""
        reference = self.memory.reference if self.memory else ()
        return vector_payload(programs.to_vector((self.state, reference)))

    def adopt(self, payload: Payload, at: int, *, new_turn: bool = True) -> None:
        """Goes on with the part of another client, as it is before step `at`; in a new turn its aim begins anew."""
        fresh = self.spec.mode.client_memory(self.spec, self.state)
        reference = fresh.reference if fresh else ()
        state, reference = programs.from_vector(payload_vector(payload), (self.state, reference))
        self.state = with_update_count(state, at)
        self.memory = fresh._replace(reference=reference) if fresh else ()
        if new_turn:
            # Its link is its own, whosever part it goes on with.
            self.up_bits = budget.first_up_bits(self.spec, self.bytes_per_second)

    def update(self, update: PartUpdate) -> None:
        """Takes the optimizer's step on its part."""
        self.state = programs.update_part(self.spec, self.state, update)

    def prepare(self, exchange: Exchange) -> None:
        """Does in advance what of a coming exchange does not depend on the state: the batch of a training step."""
        if exchange.phase == Phase.FEATURES and (self._prepared is None or self._prepared[0] != exchange):
            inputs, labels = self._batches[exchange]
            key = self.key(exchange)
            self._prepared = exchange, (*programs.augmented(self.spec, inputs, labels, key), key)

    def send(self, exchange: Exchange) -> Message:
        """Returns this client's message in an exchange that it takes part in."""
        spec = self.spec
        match exchange.phase:
            case Phase.FEATURES:
                self.prepare(exchange)
                x, labels, key = self._prepared[1]
                if self._numpy:
                    h, self._pending = programs.client_features(spec, self.state, x, key)
                    payload = spec.up(exchange).encode_numpy(jax.tree.leaves(h))
                    self._pending = with_payload(spec, self._pending, payload)
                else:
                    payload, self._pending = programs.client_forward(spec, self.state, x, key, self.up_bits)
                grad_bits = budget.grad_bits(spec, self.bytes_per_second)
                return Message(payload, labels if spec.sends_labels else None, grad_bits=grad_bits)
            case Phase.GRADIENT:
                return self._outgoing
            case Phase.TEST:
                inputs, labels = self._batches[exchange]
                if self._numpy:
                    h = programs.client_test_features(spec, self.state, inputs)
                    payload = spec.up(exchange).encode_numpy(jax.tree.leaves(h))
                else:
                    payload = programs.client_test_payload(spec, self.state, inputs, self.key(exchange), self.up_bits)
                return Message(payload, labels if spec.sends_labels else None)
            case Phase.RESULT:
                tested, self._tested = self._tested, []
                return Message(metrics=total(tested))
        return Message(spec.mode.client_send(self, exchange))

    def receive(self, exchange: Exchange, message: Message, *, bytes_per_second: float | None = None) -> None:
        """Goes on with the server's answer.

        Args:
          bytes_per_second: the speed of this client's link in this exchange, where it was measured.
        """
        spec = self.spec
        match exchange.phase:
            case Phase.FEATURES if spec.u_shaped:
                self._outgoing = self._tail_gradient(exchange, message.payload)
            case Phase.FEATURES | Phase.GRADIENT:
                tail = {} if self._tail_update is None else {"tail": self._tail_update}
                batch_size = self.schedule.batch_size_of(exchange)
                pending, self._pending, self._tail_update = self._pending, None, None
                if spec.cut_bits is not None:
                    args = (spec, self.up_bits, pending, message.payload, self._budgets(bytes_per_second))
                    self.up_bits = programs.next_up_bits(*args, batch_size=batch_size)
                update = programs.client_backward(spec, pending, message.payload, batch_size=batch_size, **tail)
                spec.mode.client_finish(self, exchange, update)
            case Phase.TEST if spec.u_shaped:
                _, labels = self._batches[exchange]
                batch_size = self.schedule.batch_size_of(exchange)
                found = programs.client_test_score(spec, self.state, message.payload, labels, batch_size=batch_size)
                self._tested.append(sums_of(found, batch_size))
            case Phase.TEST | Phase.RESULT:
                pass
            case _:
                spec.mode.client_receive(self, exchange, message.payload)

    def _budgets(self, measured):
        """The budgets of this step and of the next, where they follow the link, of which this is now the speed."""
        if self.spec.cut_seconds is None:
            return None
        now = budget.budget_bits(self.spec, self.bytes_per_second)
        self.bytes_per_second = budget.next_bytes_per_second(self.bytes_per_second, measured)
        return now, budget.budget_bits(self.spec, self.bytes_per_second)

    def _tail_gradient(self, exchange, payload):
        """The message of the tail's gradient; its update waits for that of the layers before the cut."""
        _, labels, key = self._prepared[1]
        batch_size = self.schedule.batch_size_of(exchange)
        args = (self.spec, self.state, payload, labels, key)
        if self._numpy:
            g, self._tail_update, found = programs.client_tail_gradient(*args, batch_size=batch_size)
            out = self.spec.tail_gradient_payload(batch_size).encode_numpy(g)
        else:
            out, self._tail_update, found = programs.client_tail(*args, batch_size=batch_size)
        return Message(out, metrics=sums_of(found, batch_size))

    def key(self, exchange: Exchange) -> jax.Array:
        """Returns this client's random key of an exchange."""
        testing = exchange.phase == Phase.TEST
        at = np.int32(exchange.test_round if testing else exchange.step)
        return programs.key(self._seed, testing, at, np.int32(self.client_id))

    def close(self) -> None:
        """Ends what reads its data ahead, where they are not in memory."""
        self._batches.close()


def check_travels(spec: RunSpec, stats: Any) -> None:
    """Raises ValueError for a client's statistics that would stay behind where parts are handed on."""
    changing = without_constants(stats, spec.client_constants) if spec.mode.hands_parts_on(spec.schedule) else {}
    for where, leaf in named_leaves(changing):
        if not is_float(leaf):
            raise ValueError(
                "a client's statistics must be floats where parts are handed on, as only these are sent, got "
                f"{leaf.dtype} at {where!r}"
            )


class Server:
    """The server: its part, what it is handed to pass on, and the sums of the epoch under way.

    Args:
      mesh: over whose devices its part is sharded and a step's batch spread, see `shards`; None for one device.

    Attributes:
      part_in_transit: a client's part with its optimizer state, float32 (n,), between two clients' turns.
      memory: what it remembers of averages; see `averages.Memory`.
      train, test: loss and metrics since they were last reset.
      losses: each client's mean loss in the last training step, by number.
    """

    def __init__(self, spec: RunSpec, state: PartState, seed: int, *, mesh: Mesh | None = None):
        self.spec, self.state = spec, shards.place(mesh, state)
        self.part_in_transit: np.ndarray | None = None
        self.memory = spec.mode.server_memory(spec)
        self.train = self.test = MetricSums()
        self.losses: dict[int, float] = {}
        self._seed, self._mesh, self._pending = seed, mesh, None

    def handle(self, exchange: Exchange, messages: dict[int, Message]) -> dict[int, Message]:
        """Returns the answer to each client in `messages`: all of the exchange's, or those that came in time."""
        clients = tuple(sorted(messages))
        answers = self._answers(exchange, clients, [messages[client] for client in clients])
        return dict(zip(clients, answers, strict=True))

    def mean(self, exchange: Exchange, payloads: list[Payload]) -> Payload:
        """Returns the mean of what clients send to be averaged, as all of them get it."""
        if not self.spec.compresses_updates:
            return vector_payload(programs.mean_vectors(list(map(payload_vector, payloads))))
        key = self._keys(exchange, exchange.clients[:1])[0]
        answer, self.memory = programs.encode_mean(self.spec, stack(payloads), self.memory, key)
        return answer

    def _answers(self, exchange, clients, messages):
        spec = self.spec
        match exchange.phase:
            case Phase.FEATURES:
                batch_size = spec.schedule.batch_size_of(exchange)
                keys, payloads = self._keys(exchange, clients), stack([m.payload for m in messages])
                grad_bits = None if spec.cut_seconds is None else np.stack([m.grad_bits for m in messages])
                if spec.u_shaped:
                    args = (spec, self.state, payloads, keys)
                    answers, pending = programs.server_forward(*args, batch_size=batch_size, mesh=self._mesh)
                    self._pending = pending, clients, grad_bits
                else:
                    args = (spec, self.state, payloads, stack([m.labels for m in messages]), keys, grad_bits)
                    options = {"batch_size": batch_size, "mesh": self._mesh}
                    self.state, answers, found = programs.server_step(*args, **options)
                    self.train += sums_of(found, batch_size * len(clients))
                    self.losses = dict(zip(clients, np.asarray(found.losses).tolist(), strict=True))
                return [Message(answer) for answer in unstack(answers, len(clients))]
            case Phase.GRADIENT:
                return self._backward(exchange, clients, messages)
            case Phase.TEST:
                return [self._test(exchange, client, m) for client, m in zip(clients, messages, strict=True)]
            case Phase.RESULT:
                self.test = total([self.test, *(m.metrics for m in messages)])
                return [Message()] * len(messages)
        return [Message(p) for p in spec.mode.server_answer(self, exchange, [m.payload for m in messages])]

    def _backward(self, exchange, clients, messages):
        """U-shaped: the answers to the tails' gradients."""
        (pending, everyone, grad_bits), self._pending = self._pending, None
        # Of those who sent features some may have been dropped since: theirs is anyone's payload, masked.
        present, came = np.isin(everyone, clients), dict(zip(clients, messages, strict=True))
        payloads = stack([came.get(client, messages[0]).payload for client in everyone])
        args = (self.spec, self.state, pending, payloads, self._keys(exchange, everyone), present, grad_bits)
        batch_size = self.spec.schedule.batch_size_of(exchange)
        self.state, answers = programs.server_backward(*args, batch_size=batch_size, mesh=self._mesh)
        self.train = total([self.train, *(m.metrics for m in messages)])
        self.losses = {c: m.metrics.loss / max(m.metrics.samples, 1) for c, m in zip(clients, messages, strict=True)}
        answers = dict(zip(everyone, unstack(answers, len(everyone)), strict=True))
        return [Message(answers[client]) for client in clients]

    def _test(self, exchange, client, message):
        batch_size = self.spec.schedule.batch_size_of(exchange)
        key = programs.key(self._seed, True, np.int32(exchange.test_round), np.int32(client))
        args = (self.spec, self.state, message.payload, key)
        out = programs.server_test_outputs(*args, batch_size=batch_size, mesh=self._mesh)
        if self.spec.u_shaped:
            return Message(out)
        self.test += sums_of(programs.score(self.spec, out, message.labels), batch_size)
        return Message()

    def _keys(self, exchange, clients):
        return programs.keys(self._seed, False, np.int32(exchange.step), np.asarray(clients, np.int32))


def run(server: Server, clients: list[Client], *, start: int = 0) -> Iterator[Exchange]:
    """Lets the parties talk in one program; yields every exchange after it is done."""
    for exchange in server.spec.schedule.exchanges(start):
        messages = {client_id: clients[client_id].send(exchange) for client_id in exchange.clients}
        for client_id, answer in server.handle(exchange, messages).items():
            clients[client_id].receive(exchange, answer)
        yield exchange

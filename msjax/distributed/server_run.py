"""What the server itself does in a run: its part of the network, its checkpoints, and the schedule of exchanges."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from msjax.distributed.events import Entrance, ExchangeInfo, HandsOut, Key
from msjax.distributed.rpc import split_pb2 as pb
from msjax.split import parties
from msjax.split.finite import check_losses
from msjax.split.schedule import Exchange, Phase, Schedule
from msjax.split.spec import RunSpec
from msjax.split.state import PartState
from msjax.split.traffic import Traffic, exchange_traffic, traffic_before

log = logging.getLogger("msjax.server")

CHECKPOINT_CLIENTS = "checkpoint_clients"
"""In the progress that goes with a checkpoint: the clients that can go on from it by themselves."""
_EXCHANGED = "exchanged"
_MESSAGES = "messages"
_LAST_TURN = "last_turn"


_CUT = {way: f"coded_{way}_bytes" for way in ("uplink", "downlink")}
_SYNCHRONIZATION = {way: f"coded_{way}_synchronization_bytes" for way in ("uplink", "downlink")}


class Came(NamedTuple):
    """A client's message of an exchange: as it came, and what it says."""

    exchange: Exchange
    request: pb.Request
    message: parties.Message


class _Held(NamedTuple):
    """A checkpoint that is not written before the clients' own are complete."""

    step: int
    content: Any
    clients: set[int]
    """That can go on from it."""
    waits_for: set[int]


class ServerRun:
    """Made when all clients are ready; `restore` comes first.

    Args:
      make_state: makes the server's part as it is before the first step.
      store: of checkpoints: `latest()`, `hold(server)`, `save(step, held, **more)`, `check()`, `wait()`,
        `restore(step, server)`, `forget(server)`.
      progress: what the store saves with each checkpoint and brings back.
      failed_save: called where a checkpoint could not be written.
      allow_nonfinite: whether to go on where a loss is not finite.
      mesh: over whose devices the server's part is sharded; None for one device.
    """

    def __init__(
        self,
        spec: RunSpec,
        make_state: Callable[[], PartState],
        seed: int,
        store: Any,
        progress: dict[str, Any],
        *,
        checkpoint_steps: int,
        failed_save: Callable[[], None],
        allow_nonfinite: bool = False,
        mesh: Mesh | None = None,
    ):
        self.spec, self._make_state, self._seed = spec, make_state, seed
        self._initial: PartState | None = None  # until there is a checkpoint
        self._store, self._progress, self._failed_save = store, progress, failed_save
        self._checkpoint_steps, self._start_step = checkpoint_steps, 0
        self._allow_nonfinite, self._mesh = allow_nonfinite, mesh
        self._exchanges: Iterator[Exchange] = iter(())
        self._held: _Held | None = None
        self._clients_of: dict[int, list[int] | None] = {}  # by the step of a checkpoint who has it, too; None for all
        self.party: parties.Server | None = None
        self.exchange: Exchange | None = None
        """The last that was opened."""
        self._info: ExchangeInfo | None = None

    def restore(self) -> tuple[int, tuple[int, ...] | None]:
        """Goes to the last checkpoint, or the beginning.

        Returns:
          The step, and which clients can go on from there by themselves; None for all.
        """
        self._held = None  # nobody can be told any more that it is there
        self._checked(self._store.wait)
        step = self._store.latest()
        if self.party is None:
            self._initial = self._make_state()
        state = self.party.state if self._initial is None else self._initial
        party = parties.Server(self.spec, state, self._seed, mesh=self._mesh)
        if step is None:
            self._store.forget(party)
        else:
            self._store.restore(step, party)
        if _EXCHANGED not in self._progress:  # at the beginning, or saved by a version that did not count
            self._count(traffic_before(self.spec, step or 0))
            self._progress[_MESSAGES] = None if step else {}
        self.party, self._start_step = party, step or 0
        self._exchanges = self.schedule.exchanges(self._start_step)
        self._clients_of = {self._start_step: self._progress.get(CHECKPOINT_CLIENTS)}
        able = self._able(self._start_step)
        return self._start_step, None if able is None else tuple(sorted(able))

    def _able(self, step):
        """Who can go on by themselves from the last checkpoint, of this step; None for all."""
        clients = self._clients_of.get(step)
        return None if clients is None or self._alone(step) else frozenset(clients)

    @property
    def keepers(self) -> tuple[int, ...]:
        """The clients whose parts are the result: in sequential mode the one that has handed the last one on."""
        last = self._progress.get(_LAST_TURN)
        return self.schedule.test_clients if last is None else (last,)

    @property
    def back_to(self) -> int:
        """The step of which clients would need a checkpoint, should all go back; 0 where they need none."""
        return self._back_to(self.saved_step)

    @property
    def hands_out(self) -> HandsOut | None:
        """Whether the server has the part of those who keep the result, to give it to them at the end."""
        if self.party.part_in_transit is None:
            return None
        about = self.spec.compresses_parts or self.spec.cut_bits is not None
        return HandsOut.ABOUT if about else HandsOut.EXACTLY

    def part_for(self, client: int, step: int) -> parties.Payload | None:
        """Returns the part that a client would keep as it is before a step, where the server has it; else None.

        In turns that is the client that has handed the last one on: it goes on with that, should nobody else do so.
        """
        if step == self.schedule.total_steps:
            has_it = client in self.keepers
        else:
            has_it = client == self._progress.get(_LAST_TURN)
        return self.spec.mode.arriving_part(self.party) if has_it else None

    def _alone(self, step):
        """Whether the server has all that clients need to go on before this step."""
        return step == 0 or self.spec.mode.hands_parts_on(self.schedule)

    def _back_to(self, saved):
        """The step that clients would go back to, where the server's last checkpoint is of this one."""
        return 0 if self._alone(saved) else saved

    def next_exchange(self) -> ExchangeInfo | None:
        """Opens the next exchange; None where none is left."""
        self.exchange = next(self._exchanges, None)
        last = self._progress.get(_LAST_TURN)
        saved = self.saved_step  # once: another thread completes the writing
        from_ = {"able": self._able(saved), "back_to": self._back_to(saved)}
        self._info = None if self.exchange is None else _info(self.schedule, self.exchange, last, **from_)
        return self._info

    def exchange_of(self, client: int, position: Key) -> Exchange | None:
        """Returns the open exchange, if it has this position and the client takes part in it."""
        open_here = self.exchange is not None and position == self.exchange.position and client in self._info.members
        return self.exchange if open_here else None

    def answer(self, came: dict[int, Came]) -> dict[int, parties.Message]:
        """The answers of the open exchange to the clients whose messages came.

        Raises:
          NonFiniteError: a client's loss is NaN or infinite.
        """
        if not came:
            return {}  # everyone who should have taken part was dropped
        self._checked(self._store.check)
        if self._initial is not None and self._store.latest() is not None:
            self._initial = None
        self._write_held(came)
        self._hold(came)
        self._write_held(came)
        answers = self.party.handle(self.exchange, {client: it.message for client, it in came.items()})
        if self.exchange.phase == Phase.RETURN_PART and self.schedule.mode.one_at_a_time:
            (self._progress[_LAST_TURN],) = came
        took_part = self.exchange._replace(clients=tuple(came))
        self._count(self.traffic + exchange_traffic(self.spec, [took_part]))
        for it in came.values():
            self._count_message("uplink", it.request.payload)
        if not self._allow_nonfinite and self.exchange.phase in (Phase.FEATURES, Phase.GRADIENT):
            losses = self.party.losses
            check_losses(np.asarray([list(losses.values())]), list(losses), self.exchange.step)
        return answers

    @property
    def traffic(self) -> Traffic:
        """The bytes of the exchanges that have led here, of those clients alone that took part in them.

        What was done again from a checkpoint is in it once.
        """
        return Traffic(**self._progress[_EXCHANGED])

    def coded_bytes(self) -> dict[str, int]:
        """Returns the bytes of messages beside those of `traffic`, where they are coded without loss: headers and all.

        Named as in a record: of features and gradients together, and of what keeps the clients equal. Empty where an
        earlier version, which did not count them, has done a part of the run.
        """
        counts, exact, spec = self._progress.get(_MESSAGES), self.traffic, self.spec
        if counts is None:
            return {}
        found: dict[str, int] = {}
        for names, entropy_coded, kinds in (
            (_CUT, spec.cut_is_coded, ("feature", "gradient")),
            (_SYNCHRONIZATION, spec.update_codec.entropy_coded, ("synchronization",)),
        ):
            sent = {name: counts.get(name, 0) for name in names.values()}
            plain = {name: sum(getattr(exact, f"{way}_{kind}_bytes") for kind in kinds) for way, name in names.items()}
            if entropy_coded or any(sent[name] < plain[name] for name in sent):  # as where messages are Huffman-coded
                found |= sent
        return found

    def count_answer(self, payload: Iterable[bytes]) -> None:
        """Counts the bytes of an answer of the open exchange, once for each client that it goes to."""
        self._count_message("downlink", payload)

    def _count_message(self, way, payload):
        phase, counts = self.exchange.phase, self._progress.get(_MESSAGES)
        if counts is None or phase in (Phase.TEST, Phase.RESULT):
            return
        name = (_CUT if phase in (Phase.FEATURES, Phase.GRADIENT) else _SYNCHRONIZATION)[way]
        counts[name] = counts.get(name, 0) + sum(map(len, payload))

    def _count(self, traffic):
        self._progress[_EXCHANGED] = dataclasses.asdict(traffic)

    @property
    def schedule(self) -> Schedule:
        """The order of exchanges."""
        return self.spec.schedule

    @property
    def saved_step(self) -> int:
        """That of the last checkpoint."""
        return self._store.latest() or 0

    def _hold(self, came):
        """Keeps what is to be saved where the schedule allows and every client saves, too."""
        exchange, schedule = self.exchange, self.schedule
        handed_on = self.spec.mode.hands_parts_on(schedule)
        # The server then holds the part that goes round when a turn begins, and no client has to save anything.
        if exchange.phase != (Phase.FETCH_PART if handed_on else Phase.FEATURES):
            return
        if not schedule.may_checkpoint(exchange.step, self._checkpoint_steps) or exchange.step == self._start_step:
            return
        if handed_on and self.party.part_in_transit is None:  # all whose turn it was were dropped before they gave one
            self._missed(exchange.step, "no client has handed a part on yet", "")
            return
        if self._held is not None:
            late = _names(self._held.waits_for)
            self._missed(self._held.step, f"{late} could not save, or not before the next was due")
            self._held = None
        if not handed_on and (failed := [c for c, it in came.items() if not it.request.saved]):
            self._missed(exchange.step, f"{_names(failed)} could not save")
            return
        self._held = _Held(exchange.step, self._store.hold(self.party), set(came), set() if handed_on else set(came))

    def _write_held(self, came):
        """Begins to write what is held, once every client has said that its own of this step is complete.

        So the last that is on disk is never newer than the clients', whoever dies when.
        """
        if (held := self._held) is None:
            return
        # Who should have come, and has not, was dropped, and comes back with the part of another.
        dropped = held.waits_for.intersection(self.exchange.clients) - came.keys()
        held.clients.difference_update(dropped)
        if not held.clients:
            self._missed(held.step, f"{_names(dropped)} could not save before being dropped")
            self._held = None
            return
        held.waits_for.difference_update(dropped, (c for c, it in came.items() if it.request.saved_step == held.step))
        if not held.waits_for:
            self._held = None
            last, clients = self.saved_step, sorted(held.clients)  # until the new one is written, an older one counts
            self._clients_of = {step: it for step, it in self._clients_of.items() if step >= last} | {
                held.step: clients
            }
            self._checked(self._store.save, held.step, held.content, **{CHECKPOINT_CLIENTS: clients})

    def _checked(self, save, *args, **options):
        try:
            save(*args, **options)
        except OSError as error:
            # Training goes on; what is lost, should the server die, is the time since the last checkpoint.
            log.error("no checkpoint: %s", error)
            self._failed_save()

    def _missed(self, step, why, more="; the clients' own logs say why"):
        log.warning("no checkpoint at step %d: %s%s", step, why, more)
        self._failed_save()
        # Clients keep theirs of the last two that were due, and that which they are told is complete here: without a
        # next save, which would wait for the one before, that could be of longer ago, and they would not know.
        self._checked(self._store.wait)


def _names(clients):
    return ("client " if len(clients) == 1 else "clients ") + ", ".join(map(str, sorted(clients)))


def _info(schedule, exchange, last_turn=None, **last_checkpoint):
    """What membership has to know of an exchange; `last_turn` is the client that handed the last part on, if any."""
    handed_on = schedule.mode.hands_parts_on(schedule)  # a part goes from client to client, by way of the server
    entrance, donors = Entrance.CLOSED, ()
    if exchange.phase == (Phase.FETCH_PART if handed_on else Phase.FEATURES):
        entrance = Entrance.FREE if handed_on else Entrance.WITH_PART
    if not handed_on and exchange.step + 1 < schedule.total_steps:
        later = (e.clients for e in schedule.step_exchanges(exchange.step) if e.position > exchange.position)
        busy = frozenset().union(*later)
        donors = tuple(c for c in exchange.clients if c not in busy)
    computed_by = int(exchange.phase), schedule.batch_size_of(exchange)
    rounds = handed_on and not schedule.mode.one_at_a_time
    rounds = rounds and exchange.phase not in (Phase.TEST, Phase.RESULT)
    turn = None
    if handed_on:  # whoever handed the last part on has the result, should the others be dropped
        turn = schedule.position(exchange.step).clients + (() if last_turn is None else (last_turn,))
    args = (exchange.position, exchange.step, exchange.clients, entrance, computed_by, donors)
    return ExchangeInfo(*args, rounds, turn, **last_checkpoint)

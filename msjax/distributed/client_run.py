"""What a client itself does in a run: its part of the network, its checkpoints, and the request it is at."""

import logging
from collections.abc import Iterator
from typing import Any

from msjax.distributed import messages
from msjax.distributed.membership import LET_IN_WITHOUT
from msjax.distributed.rpc import split_pb2 as pb
from msjax.split.parties import Client, Message
from msjax.split.schedule import Exchange, Phase

log = logging.getLogger("msjax.client")


class Refused(Exception):
    """The server turned this client away, or it is not fit to take part."""


class Interrupted(Refused):
    """The run ended before its time, or began anew: it goes on where this client is started again."""


class ClientRun:
    """A client from when it is first told to start.

    Args:
      party: the client as it is before the first step.
      store: of checkpoints, with `steps()`, `save(step, checkpoint)`, `check()`, `wait()`, `restore(step, like)`,
        `prune(kept)`, `drop_after(step)`.
      compression: of the requests' bytes, as `msjax.wire` takes it.
    """

    def __init__(self, party: Client, store: Any, compression: str | None = None):
        self.party, self._store, self._compression = party, store, compression
        self._initial: Any = party.checkpoint()  # until the server has a checkpoint
        self.generation = 0
        self.checkpoint_steps = 0
        self._kept = {0}  # what the last `prune` has left
        self._due, self._due_before = 0, 0  # the steps of the last two checkpoints of this generation
        self.exchange: Exchange | None = None
        """Where it is; None at the end."""
        self.request: pb.FromClient | None = None
        """What it says there, until it is answered."""
        self._following: Exchange | None = None
        self._early: pb.FromClient | None = None  # the following request, where it could be made already
        self._exchanges: Iterator[Exchange] = iter(())
        self._brings_part = False
        self.lacks_part = False
        """Whether it has begun where another's part counts, and was not handed that yet."""

    @property
    def done(self) -> bool:
        """Whether it is at the end, with all its answers."""
        return self.generation > 0 and self.exchange is None

    def start(self, start: pb.Start) -> None:
        """Goes to where the server says, unless it has been there already.

        Raises:
          Refused: it has no checkpoint of this step, and cannot go on without.
        """
        known = start.generation == self.generation and not start.part
        if known and (self.exchange is None or start.step <= self.exchange.step):
            return
        self._without_failing(self._store.wait)
        self.generation, self._due, self._due_before = start.generation, 0, 0
        party = self.party
        party.begin()
        self.lacks_part = not start.part and start.step > 0 and start.step not in self._store.steps()
        if start.part:
            party.adopt(messages.decode_part(start.part, party.spec), start.step)
        elif start.step in self._store.steps():
            party.go_back(self._store.restore(start.step, party.checkpoint()))
        elif self._initial is not None and (start.step == 0 or not party.needs_state(start.step)):
            party.go_back(self._initial)
        elif start.step == 0 or party.needs_state(start.step):
            if start.step == party.schedule.total_steps:
                what = "the run has ended, and this client has no checkpoint of its last step"
                helps = (
                    "the others ended without it" if self._store.steps() else "start it with the --state folder it had"
                )
                raise Refused(f"{what}: {helps}")
            what = f"this client has no checkpoint of step {start.step}, where the run is"
            raise Refused(f"{what}: start it with the --state folder that it had; or {LET_IN_WITHOUT}")
        # What follows may go another way than it went before, as where a client was dropped; and another's part is not
        # what this client has kept of the same step.
        self._without_failing(self._store.drop_after, start.step - bool(start.part))
        if start.part:  # the server may be writing one that this client has, and has said so before it was dropped
            self._due_before, self._due = [0, 0, *self._store.steps()][-2:]
        self._exchanges = party.exchanges(start.step)
        self._following = next(self._exchanges, None)
        self._brings_part, self._early = False, None
        self._next()

    def take(self, answer: pb.Answer, bytes_per_second: float | None = None) -> Exchange | None:
        """Goes on with an answer; returns the exchange that it ends, None where it is a repeated one.

        Args:
          bytes_per_second: of the link in this exchange, where it was measured.
        """
        request = self.request and self.request.request
        if request is None or answer.generation != self.generation or answer.position != request.position:
            return None
        exchange = self.exchange
        spec = self.party.spec.down(exchange)
        # No part is handed on before one was returned: not even later, if those whose turn it was were dropped.
        payload = messages.decode(list(answer.payload), spec, optional=exchange.phase == Phase.FETCH_PART)
        self.party.receive(exchange, Message(payload), bytes_per_second=bytes_per_second)
        if exchange.phase == Phase.FETCH_PART:
            self.lacks_part = False
        self._prune(answer.saved_step)
        if answer.saved_step:  # nobody goes back to the beginning any more
            self._initial = None
        self._brings_part = answer.send_part
        self._next()
        return exchange

    def prepare(self) -> None:
        """While the request is on its way: does what can be done of the exchange behind it without its answer."""
        following = self._following
        if following is None or self._early is not None:
            return
        if following.phase == self.exchange.phase == Phase.TEST:  # the part does not change in a test
            self._early = self._make(following)
        else:
            self.party.prepare(following)

    def has_trained(self) -> bool:
        """Whether nothing but tests are left; to be asked once, at the end."""
        left = (self.exchange, self._following, *self._exchanges)
        return self.generation > 0 and all(e is None or e.phase in (Phase.TEST, Phase.RESULT) for e in left)

    def _next(self):
        """Goes on to the next exchange and makes its request."""
        self.exchange, self._following = self._following, next(self._exchanges, None)
        self.request, self._early = self._early, None
        if self.exchange is None:
            # Should this process die before it has written its part.
            self._save_at(self.party.schedule.total_steps)
            self._without_failing(self._store.wait)
        elif self.request is None:
            self.request = self._make(self.exchange)

    def _make(self, exchange):
        party = self.party
        fields = {"generation": self.generation, "saved": self._save(exchange), "saved_step": self._saved_step()}
        fields["compression"] = self._compression
        if self._brings_part:
            fields["part"] = messages.encode_part(party.part(), party.spec, self._compression)
            self._brings_part = False
        return messages.to_request(party.send(exchange), exchange, party.spec, **fields)

    def _save(self, exchange):
        """Whether a checkpoint of the state before this step is there or begun, where there should be one."""
        self._without_failing(self._store.check)
        return self.party.may_checkpoint(exchange, self.checkpoint_steps) and self._save_at(exchange.step)

    def _save_at(self, step):
        if step != self._due:
            self._due, self._due_before = step, self._due
        return step in self._store.steps() or self._without_failing(self._store.save, step, self.party.checkpoint())

    def _saved_step(self):
        """That of the last checkpoint that was due, or of the one before, where that is complete; else 0.

        To begin a save waits for the one before. Where steps are quick, that is when it becomes complete.
        """
        saved = self._store.steps()
        return next((step for step in (self._due, self._due_before) if step in saved), 0)

    def _prune(self, saved_step):
        """Deletes what nobody goes back to: the server has this one, and is at most writing one of the last two."""
        kept = {saved_step, *(step for step in (self._due_before, self._due) if step > saved_step)}
        if kept == self._kept:
            return
        self._kept = kept
        try:
            self._store.prune(kept)
        except OSError as error:
            log.error(
                "checkpoints other than of steps %s cannot be deleted: %s", ", ".join(map(str, sorted(kept))), error
            )

    def _without_failing(self, save, *args):
        """Whether the store did it; training goes on without."""
        try:
            save(*args)
        except OSError as error:
            log.error("no checkpoint at step %d: %s", self._due, error)
            return False
        return True

"""Who takes part in a run, and what its server does next: a pure state machine.

`transitions.transition(state, event, now)` returns the next state and the actions that follow from it (`events`,
`actions`). There is no clock in here, no thread, no network and no payload. The caller hands in what happens, in order,
carries the actions out, in order, and hands in `TimePassed` at `Membership.wake_at`. Its own work are two actions that
events answer: `RestoreCheckpoint` with `Restored`, and `Advance` with `Computed`; after either, `Opened` names the next
exchange, or `Ended` says that none is left.

    GATHERING  --enough ready-->  RESTORING  -->  ADVANCING  <-->  COLLECTING
                                   ^               |                '--- a client has lost its memory ---.
                                   |               '--no exchange left-->  ENDING  -->  OVER             |
                                   |                                       '--- or its part -------------|
                                   '---------------------------------------------------------------------'

A reason to stop leads from every stage to OVER, from those in which the caller works once it has done so.

A client is active or dropped. Exchanges wait for those that are active; the messages of one that is dropped never
count. It comes back at an exchange that is an entrance, if it has shown since that it is alive.

A client has one session at a time. Its process may replace its own session; another process is refused for as long as
the session lives. A session that does not say that it is ready within the policy's deadline is closed, so that it does
not keep others out; until then, and without one, its client counts as absent.

A process compiles its programs where it first needs them, so an exchange of a kind that is new to it takes longer: at
the start for all. One that comes later, when the others have compiled theirs, is given as long beyond the deadline as
that exchange took when it was first waited for. A server that is started again is told what an earlier one has learned
of that, since its clients may have compiled before it came.

What nobody can do anything about is waited for, with a warning after every deadline: clients that have not come yet,
and more absent ones than `min_clients` allows. There is no deadline at all while nobody waits and at least one of those
that are waited for is there, and silent: it computes.

A client whose process died is dropped where enough others are left, since it may come back with their part. Should
these not come back themselves, while enough others are there that have the last checkpoint, all go back to it.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Literal, NamedTuple

from msjax.distributed.events import ExchangeInfo, HandsOut, Key, Requested

LET_IN_WITHOUT = (
    "give msjax serve --resume the options --policy.stragglers drop and --policy.start-clients, and start the client "
    "once the others train: it is then let in with another's part"
)
"""What helps where a client has lost its checkpoint."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What the server does about clients that are late."""

    deadline_seconds: float = 300.0
    """How long an exchange waits for a client, from when the first of the others has come, or from when all that it
    waits for are away; the end for all to hear of it; and a new session for its client to be ready. A process that does
    what it has not done before is given longer, by what that took at first."""
    stragglers: Literal["wait", "drop", "stop"] = "wait"
    """After that: wait on, and say so; drop those that have not come, until they come back; or stop the run."""
    min_clients: int = 1
    """drop: where fewer than these would be left, wait all the same. Where a share of the clients takes part in each
    round, so many of those must be there, too (or all, where there are fewer)."""
    start_clients: int | None = None
    """Training begins when so many are ready; by default, all. Those that come later are let in like those that had
    been dropped."""

    def __post_init__(self):
        if not self.deadline_seconds > 0:
            raise ValueError(f"deadline_seconds must be above 0, got {self.deadline_seconds}")
        if self.min_clients < 1:
            raise ValueError(f"min_clients must be at least 1, got {self.min_clients}")
        if self.start_clients is not None and self.start_clients < 1:
            raise ValueError(f"start_clients must be at least 1, or None, got {self.start_clients}")
        if self.stragglers not in ("wait", "drop", "stop"):
            raise ValueError(f"stragglers must be wait, drop or stop, got {self.stragglers!r}")


class Stage(enum.Enum):
    """Where a run is."""

    GATHERING = "gathering"
    """Until all clients are ready, or as many as the policy asks for."""
    RESTORING = "restoring"
    """The caller makes the server's state. Once it has, a new generation begins."""
    COLLECTING = "collecting"
    """Messages of an exchange are waited for."""
    ADVANCING = "advancing"
    """The caller answers an exchange, or opens the next."""
    ENDING = "ending"
    """All steps are done, and clients hear of it. They stay until all have kept their parts: should one have died
    before that, all go back."""
    OVER = "over"


class Memory(enum.Enum):
    """What a client must have kept to go on with the generation under way, should its session be lost."""

    OF_CHECKPOINT = "of checkpoint"
    """It has sent nothing yet: what it has on its disk will do."""
    OF_NOTHING = "of nothing"
    """It was let in at the open exchange, or waits for its turn, and has sent nothing yet: it can be let in again."""
    OF_ALL = "of all"
    """It has sent something, and what follows from that is known to itself alone."""


class Verdict(enum.Enum):
    """What becomes of a client's message."""

    NEW = "new"
    REPEAT = "repeat"
    """It has been answered: the answer was lost."""
    SIGN_OF_LIFE = "sign of life"
    """It does not count, but the client is there again."""
    IGNORED = "ignored"
    """A late copy, or of a generation or a session that is over."""
    FAULT = "fault"
    """A client may not send that."""


@dataclasses.dataclass(frozen=True)
class Session:
    """A connection of a client that is alive, as far as is known."""

    name: int
    instance: str
    peer: str
    generation: int
    ready_by: float
    ready: bool = False
    saved_step: int = 0
    """As it says when it is ready."""
    admitted: bool = False
    """Whether the client has been told, in this session and generation, where the run is."""


Kinds = tuple[tuple[int, ...] | None, tuple[int, ...]]
"""Those of a client's last exchange and of this one: what a process computes between their two messages."""


@dataclasses.dataclass(frozen=True)
class Client:
    """What is known of a client."""

    session: Session | None = None
    active: bool = True
    alive: bool = False
    """Of one that is not active: whether it has said something since it was dropped."""
    memory: Memory = Memory.OF_CHECKPOINT
    message: Key | None = None
    """Of which exchange its message is that waits for an answer."""
    brings_part: bool = False
    answered: Key | None = None
    goodbye: bool = False
    turned_away: str = ""
    """The last process that was, as another had its place."""
    process: str = ""
    """The instance whose message came last."""
    last_kind: tuple[int, ...] | None = None
    """Of the last exchange that this process took part in."""
    done: frozenset[Kinds] = frozenset()
    """What this process has done before."""

    @property
    def ready(self) -> bool:
        """Whether it has a session in which it has said that it is ready."""
        return self.session is not None and self.session.ready

    @property
    def returning(self) -> bool:
        """Whether it waits to be let in."""
        return self.ready and not self.active and self.alive

    def new_to(self, kind: tuple[int, ...]) -> Kinds | None:
        """What its process has to compile for an exchange of this kind; None where it has, or there is no process."""
        if self.session is None:
            return None
        if self.session.instance != self.process:
            return None, kind
        return None if (self.last_kind, kind) in self.done else (self.last_kind, kind)


class Tally(NamedTuple):
    """How many clients there are of a kind; kept up to date, so that a message costs no more with a thousand."""

    connected: int = 0
    unready: int = 0
    """Those with a session in which they have not yet said that they are ready."""
    returning: int = 0
    waiting: int = 0
    """Those with a message that is not answered."""
    waited_for: int = 0
    """Those whose messages the open exchange still lacks."""
    at_work: int = 0
    """Those of them that are there."""

    @classmethod
    def of(cls, number: int, client: Client, exchange: ExchangeInfo | None) -> "Tally":
        """Returns what one client counts for."""
        connected = client.session is not None
        waited_for = exchange is not None and client.active and client.message != exchange.key
        waited_for = waited_for and number in exchange.members
        return cls(
            connected,
            connected and not client.session.ready,
            client.returning,
            client.message is not None,
            waited_for,
            waited_for and client.ready,
        )

    @classmethod
    def over(cls, clients: Sequence[Client], exchange: ExchangeInfo | None) -> "Tally":
        """Returns that of all clients."""
        return cls(*map(sum, zip(*(cls.of(c, client, exchange) for c, client in enumerate(clients)), strict=True)))

    def changed(self, before: "Tally", after: "Tally") -> "Tally":
        """Returns it once a client counts for `after` in place of `before`."""
        return Tally(*(n - b + a for n, b, a in zip(self, before, after, strict=True)))


@dataclasses.dataclass(frozen=True)
class Membership:
    """The state of a run's membership; begin with `Membership.begin`."""

    policy: Policy
    clients: Sequence[Client]
    generation: int
    deadline: float | None
    stage: Stage = Stage.GATHERING
    step: int = 0
    """Where the generation began; once the run has ended, its number of steps."""
    exchange: ExchangeInfo | None = None
    """The last that was opened in this generation."""
    collected: tuple[int, ...] = ()
    """Whose messages are being answered."""
    donor: int | None = None
    """Who was asked to bring its part to the next entrance."""
    extended: bool = False
    """Whether the deadline has been moved for those that were let in at this exchange."""
    opened_at: float = 0.0
    """When the exchange was."""
    late: bool = False
    """Whether its deadline has passed, and it is still waited for."""
    compiling: bool = False
    """Whether its deadline has been moved for those to whom it is new."""
    first_seconds: tuple[tuple[Kinds, float], ...] = ()
    """How long exchanges took when they were first waited for."""
    keepers: tuple[int, ...] = ()
    """Once the run has ended: the clients whose parts are the result."""
    back_to: int = 0
    """Once the run has ended: the step of which clients would need a checkpoint to go back."""
    hands_out: HandsOut | None = None
    """Once the run has ended: whether the server has the keepers' part, for those that come without."""
    lost_memory: bool = False
    """Whether a client that is needed does not know where it was."""
    begun: bool = False
    """Whether training has."""
    stop: str | None = None
    tally: Tally = Tally()
    """Of `clients` and `exchange`."""

    @classmethod
    def begin(
        cls,
        policy: Policy,
        *,
        clients: int,
        generation: int,
        now: float,
        first_seconds: tuple[tuple[Kinds, float], ...] = (),
    ) -> "Membership":
        """Nobody has come yet.

        Args:
          generation: the first one, above 0, and unlike those of another process that served this run.
          first_seconds: what such a process has learned, if there was one.

        Raises:
          ValueError: an argument is out of range.
        """
        if clients < 1:
            raise ValueError(f"clients must be at least 1, got {clients}")
        if generation < 1:
            raise ValueError(f"generation must be at least 1, got {generation}")
        deadline = now + policy.deadline_seconds
        return cls(policy, (Client(),) * clients, generation, deadline, first_seconds=first_seconds)

    @property
    def active(self) -> tuple[int, ...]:
        """The clients that exchanges wait for."""
        return tuple(c for c, client in enumerate(self.clients) if client.active)

    @property
    def sessions(self) -> tuple[int, ...]:
        """The names of those that are alive."""
        return tuple(client.session.name for client in self.clients if client.session is not None)

    @property
    def wake_at(self) -> float | None:
        """When `TimePassed` is due; None where nothing is waited for with a deadline."""
        times = []
        if self.tally.unready:
            times = [c.session.ready_by for c in self.clients if c.session is not None and not c.session.ready]
        return min(times + ([] if self.deadline is None else [self.deadline]), default=None)

    def session_of(self, client: int, name: int) -> Session | None:
        """The client's session, if it is still this one."""
        session = self.clients[client].session
        return session if session is not None and session.name == name else None

    def verdict(self, request: Requested) -> Verdict:
        """What `transition` will do with a message; asked before the caller decodes the payload."""
        client, session = self.clients[request.client], self.session_of(request.client, request.session)
        if session is None:
            return Verdict.IGNORED
        if self.stage is Stage.GATHERING:
            return Verdict.FAULT
        if not client.active and session.ready:
            return Verdict.SIGN_OF_LIFE
        if request.generation != self.generation or not session.admitted:
            return Verdict.IGNORED
        if request.key == client.answered:
            return Verdict.REPEAT
        if self.stage not in (Stage.COLLECTING, Stage.ADVANCING):
            return Verdict.IGNORED
        if self.exchange is not None and request.key < self.exchange.key:
            return Verdict.IGNORED  # a duplicate of long ago
        return Verdict.NEW

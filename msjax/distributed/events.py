"""What happens to a run, as its membership hears of it.

Sessions are named by the caller: one name for each connection, never used again. Times are seconds on the caller's
clock. Payloads are the caller's: here is only whose they are.
"""

import dataclasses
import enum
import functools

Key = tuple[int, ...]
"""What tells an exchange from the others of its run; keys increase along the run."""


class Entrance(enum.Enum):
    """Whether a client that was dropped may come back with an exchange."""

    CLOSED = "closed"
    FREE = "free"
    """It needs nothing: the exchange itself hands it what it goes on with."""
    WITH_PART = "with part"
    """It goes on with the model part that another client brings in this exchange."""


class HandsOut(enum.Enum):
    """What the server has of the part that clients are to keep."""

    EXACTLY = "exactly"
    ABOUT = "about"
    """Rounded where parts are compressed, and without what a client has learned of its budget."""


@dataclasses.dataclass(frozen=True)
class ExchangeInfo:
    """What membership has to know of an exchange."""

    key: Key
    step: int
    clients: tuple[int, ...]
    """Who takes part, unless dropped."""
    entrance: Entrance = Entrance.CLOSED
    kind: tuple[int, ...] = ()
    """Exchanges of one kind are computed by the same compiled programs."""
    donors: tuple[int, ...] = ()
    """Those of `clients` whose next exchange is an entrance `WITH_PART`: its answer may ask one to bring its part."""
    rounds: bool = False
    """Whether `clients` are a share that was drawn for a round: the policy's `min_clients` then counts among them."""

    turn: tuple[int, ...] | None = None
    """Where parts are handed on: those in whose turn or round it is, or who had the last. Nobody else has anything that
    counts. None: all have."""

    able: frozenset[int] | None = None
    """Those who could go on from the last checkpoint by themselves; None for all."""

    back_to: int = 0
    """The step of the checkpoint that clients would need to go back from here; 0 where they need none of their own."""

    @functools.cached_property
    def members(self) -> frozenset[int]:
        """`clients` as a set: there may be a thousand."""
        return frozenset(self.clients)


# -- Events: what the clients do. ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Joined:
    """A client has opened a session."""

    client: int
    session: int
    instance: str
    """Names the client's process: one that is started again has another."""
    peer: str
    """Its address, for people to read."""
    generation: int = 0
    """The generation in which the client knows where it is; 0 for none."""


@dataclasses.dataclass(frozen=True)
class SaidReady:
    """A client has its data and can start."""

    client: int
    session: int
    saved_step: int = 0
    """Of its newest checkpoint of this run; 0 for none."""


@dataclasses.dataclass(frozen=True)
class Requested:
    """A client's message of an exchange has come."""

    client: int
    session: int
    generation: int
    key: Key
    brings_part: bool = False


@dataclasses.dataclass(frozen=True)
class BrokeProtocol:
    """A client has sent what it may not."""

    client: int
    session: int
    fault: str


@dataclasses.dataclass(frozen=True)
class SaidGoodbye:
    """A client has heard of the end, has all its answers, and has kept its part."""

    client: int
    session: int
    generation: int
    """Whose end that is."""


@dataclasses.dataclass(frozen=True)
class Left:
    """A session has ended, whoever ended it."""

    client: int
    session: int
    why: str = ""
    """As the client says, if it does."""


# -- Events: what the caller does. ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TimePassed:
    """A deadline may have passed, and all that came before has been handed in.

    Deadlines are judged at this event alone: what has waited while the server was at work did not come late.
    """


@dataclasses.dataclass(frozen=True)
class Restored:
    """After `RestoreCheckpoint`: the server is as it was before step `step`."""

    step: int
    clients: tuple[int, ...] | None = None
    """Who can go on from there by themselves; None for all."""
    back_to: int = 0
    """The step of the checkpoint that these need; 0 where they need none of their own."""


@dataclasses.dataclass(frozen=True)
class Computed:
    """After `Advance`: the answers are known."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """The next exchange of the run; comes after `Restored` and after `Computed`."""

    exchange: ExchangeInfo


@dataclasses.dataclass(frozen=True)
class Ended:
    """Instead of `Opened`, where no exchange is left: the state is that after all `step` steps."""

    step: int
    keepers: tuple[int, ...] = ()
    """The clients whose parts are the result."""
    back_to: int = 0
    """The step of the checkpoint that clients would need to go back from here; 0 where they need none of their own."""
    hands_out: HandsOut | None = None
    """Where the server has the keepers' part, and gives it to those that come without: how well that is theirs."""


@dataclasses.dataclass(frozen=True)
class StopAsked:
    """The run is to stop at the next opportunity."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The server cannot go on."""

    reason: str


Event = (
    Joined
    | SaidReady
    | Requested
    | BrokeProtocol
    | SaidGoodbye
    | Left
    | TimePassed
    | Restored
    | Computed
    | Opened
    | Ended
    | StopAsked
    | Failed
)

"""What the server does about what happens: membership decides, the caller carries out, in order."""

import dataclasses

from msjax.distributed.events import ExchangeInfo


@dataclasses.dataclass(frozen=True)
class WelcomeClient:
    """Tell a client what the run is."""

    client: int
    session: int


@dataclasses.dataclass(frozen=True)
class RefuseSession:
    """Turn a session away that never was one; a later try may succeed."""

    session: int
    reason: str


@dataclasses.dataclass(frozen=True)
class CloseSession:
    """End a session, after what was sent; with a `fault` the client is to blame and must not try again."""

    session: int
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class RestoreCheckpoint:
    """Make the server's state from its last checkpoint, or new where there is none; then say `Restored`."""

    again: bool
    """Whether the run had begun: somebody has lost its memory."""


@dataclasses.dataclass(frozen=True)
class StartClient:
    """Tell a client to go on before step `step`, with the part that `part_from` has brought where that is given."""

    client: int
    session: int
    step: int
    part_from: int | None = None
    afresh: bool = False
    """Whether it has sent nothing yet, or has lost what it had: the part is then the server's, where that has one which
    this client is to keep."""


@dataclasses.dataclass(frozen=True)
class Advance:
    """Answer an exchange to the messages of `clients`, then say `Computed`, and what comes next.

    There may be none: all who take part were dropped.
    """

    exchange: ExchangeInfo
    clients: tuple[int, ...]
    asks_part_of: int | None
    """The answer of this client asks it to bring its part with its next message."""


@dataclasses.dataclass(frozen=True)
class SendAnswer:
    """Keep the new answer of a client, and send it where it has a session."""

    client: int
    session: int | None


@dataclasses.dataclass(frozen=True)
class ResendAnswer:
    """Send the kept answer of a client again."""

    client: int
    session: int


@dataclasses.dataclass(frozen=True)
class TellEnd:
    """Tell a client that training has ended; one that was `dropped` has no trained part."""

    client: int
    session: int
    dropped: bool


@dataclasses.dataclass(frozen=True)
class TellOver:
    """Tell a client that it may leave: nobody goes back any more."""

    session: int


@dataclasses.dataclass(frozen=True)
class TellFailure:
    """Tell a client that the run has ended before its time."""

    session: int
    reason: str


@dataclasses.dataclass(frozen=True)
class CountStragglers:
    """So many clients have missed a deadline."""

    count: int


@dataclasses.dataclass(frozen=True)
class Inform:
    """For the log."""

    text: str


@dataclasses.dataclass(frozen=True)
class Warn:
    """For the log, as a warning."""

    text: str


@dataclasses.dataclass(frozen=True)
class Finish:
    """All is done."""


@dataclasses.dataclass(frozen=True)
class StopRun:
    """All is over, before its time."""

    reason: str


Action = (
    WelcomeClient
    | RefuseSession
    | CloseSession
    | RestoreCheckpoint
    | StartClient
    | Advance
    | SendAnswer
    | ResendAnswer
    | TellEnd
    | TellOver
    | TellFailure
    | CountStragglers
    | Inform
    | Warn
    | Finish
    | StopRun
)

"""How long a client waits: for an answer, and for its server to be there again."""

import logging
from collections.abc import Callable

log = logging.getLogger("msjax.client")

TELL_SECONDS = 60.0
"""How often a client says that the server is still away."""

STEADY_SECONDS = 60.0
"""A connection that stood so long, or as long as an answer may take, was not at fault: the server waits for others."""


class Patience:
    """When a client gives a connection up, when it tries again, and when it has tried for long enough.

    Args:
      answer_seconds, retry_seconds, clock, draw: see `ClientSession`.
    """

    def __init__(
        self, answer_seconds: float, retry_seconds: float, clock: Callable[[], float], draw: Callable[[], float]
    ):
        self._answer_seconds, self._retry_seconds, self._clock, self._draw = answer_seconds, retry_seconds, clock, draw
        self.next_deadline: float | None = clock()  # at once
        """Connected: when to give the connection up, None for never. Not connected: when to connect."""
        self._got_on_at = self._connected_at = clock()
        self._heard = False  # anything over this connection
        self._heard_since = False  # anything since this client got on
        self._asked: int | None = None  # the bytes of a request over this connection
        self._received = False  # that a request has come, since the last answer and over this connection
        self._in_vain = False  # whether the last connection stood until the answer was late, and nothing was said of it
        self._pause, self._told, self._told_at = 0.1, "", 0.0

    def connected(self) -> None:
        """There is a new connection."""
        self._heard, self._asked, self._received = False, None, False
        self._connected_at = self._clock()

    def heard(self) -> None:
        """Something has come."""
        self._heard = self._heard_since = True

    def asked(self, nbytes: int | None) -> None:
        """A request of so many bytes was sent, or none is left."""
        self._asked = nbytes

    def received(self) -> None:
        """The server says that the request has come."""
        self._received, self._in_vain = True, False

    def answered(self) -> None:
        """There is a new answer."""
        self.got_on()
        self._received = self._in_vain = False

    def got_on(self) -> None:
        """From now on counts for how long the server has been away."""
        self._got_on_at, self._heard_since = self._clock(), False

    def wait(self, *, has_request: bool) -> None:
        """Sets the deadline of what is waited for now.

        Before a client may ask, and after training, the server waits for others, however long they take.
        """
        late = self._asked is not None or (has_request and not self._heard)
        self.next_deadline = self._clock() + self._answer_seconds if late else None

    def lost(self, why: str) -> str | None:
        """The connection is lost, or was not to be had: sets when to try again.

        Returns:
          Why not to, where this client has not got on for too long; else None.
        """
        now = self._clock()
        why += self._of_upload(now)
        if self._heard and now - self._connected_at >= min(STEADY_SECONDS, self._answer_seconds):
            unheard = self._asked is not None and not self._received
            if not (unheard and self._in_vain):
                self.got_on()
            self._in_vain = unheard
        self._heard = False
        away = now - self._got_on_at
        if away > self._retry_seconds:
            if self._heard_since:
                what = "the server takes this client's connections, but no new answer has come for"
            else:
                what = "the server has been away, or turned this client away, for"
            return f"{why} ({what} {away:.0f} s, all of retry_seconds)"
        self._pause = 0.1 if away < 1 else min(10.0, self._pause * 2)
        if why != self._told or now - self._told_at >= TELL_SECONDS:
            log.warning("%s; trying again for up to %.0f s", why, self._retry_seconds - away)
            self._told, self._told_at = why, now
        self.next_deadline = now + self._pause * self._draw()
        return None

    def _of_upload(self, now):
        """What is to be said of a request that may not have come in all the time that an answer may take.

        It begins anew over the next connection, and may be too large for the link each time.
        """
        if self._asked is None or self._received or now - self._connected_at < self._answer_seconds:
            return ""
        speed = self._asked / self._answer_seconds
        return (
            f": the server has not said that the request of {self._asked / 1e6:,.1f} MB has come; if the link takes "
            f"less than {speed / 1e6:.3g} MB/s, answer_seconds must be larger"
        )

"""What becomes of lines that somebody else could make long, or many."""

import logging
import threading
import time
from collections.abc import Callable

MOST_CHARACTERS = 2000


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """Returns a text as it is, or its beginning and end where it has more characters than `most`."""
    if len(text) <= most:
        return text
    kept = most // 2
    return f"{text[:kept]} … {len(text) - 2 * kept:,} characters … {text[-kept:]}"


class ShortLines(logging.Formatter):
    """Formats records as single lines that are not long; a traceback has several, and may be longer."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line = super().format(record)
        if record.exc_info:
            return shorten(line, 10 * MOST_CHARACTERS)
        # What a client says may be part of it: it is to make no line of its own, and no colours.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shorten(line))


class Seldom:
    """Says that something has happened, once in `seconds`: at the first time, and then how often since.

    Args:
      say: takes how often it happened, and what was given the last time.
    """

    def __init__(
        self, say: Callable[[int, str], None], seconds: float = 60.0, clock: Callable[[], float] = time.monotonic
    ):
        self._say, self._seconds, self._clock = say, seconds, clock
        self._count, self._next, self._last, self._lock = 0, clock(), "", threading.Lock()

    def __call__(self, what: str) -> None:
        """It has happened; from any thread."""
        with self._lock:
            self._count, self._last = self._count + 1, what
            is_early = self._clock() < self._next
        if not is_early:
            self.flush()

    def flush(self) -> None:
        """Says what is not said yet, as at the end of a program."""
        with self._lock:
            count, self._count, self._next = self._count, 0, self._clock() + self._seconds
            what = self._last
        if count:
            self._say(count, what)

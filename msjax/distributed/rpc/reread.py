"""What a server reads from files, and reads anew where they were replaced while it runs."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger("msjax.server")

SECONDS_BETWEEN_LOOKS = 1.0
"""At messages of a thousand clients, and at files that may be on another machine."""

T = TypeVar("T")


class Reread(Generic[T]):
    """A value that follows from files. It is asked for in any thread, and read anew where a file was changed since.

    Where a file is gone then, or wrong, what was read before stays, and the log says so.

    Args:
      name: what the log calls it.
      paths: of the files.
      read: makes the value; raises ValueError where a file is gone or wrong, now and later.
    """

    def __init__(self, name: str, paths: list[str], read: Callable[[], T]):
        self._name, self._paths, self._read = name, paths, read
        self._lock = threading.Lock()
        self._stamp, self._value, self._next_look = self._stamp_now(), read(), 0.0
        self.version = 0
        """How often it was read anew."""

    def __call__(self) -> T:
        """Returns the value as the files have it now, or had it within the last second."""
        if (now := time.monotonic()) < self._next_look:
            return self._value
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        if (stamp := self._stamp_now()) != self._stamp:
            with self._lock:
                if stamp != self._stamp:
                    self._again(stamp)
        return self._value

    def _again(self, stamp):
        self._stamp = stamp  # of before it was read: what is written meanwhile makes it be read once more
        try:
            self._value = self._read()
        except ValueError as error:
            log.error("what was read of %s before stays: %s", self._name, error)
            return
        self.version += 1
        log.info("%s was changed, and read anew: %s", self._name, ", ".join(self._paths))

    def _stamp_now(self):
        return [_stamp(path) for path in self._paths]


def _stamp(path):
    """Of a file: another one once it was written or replaced; None where it is not there."""
    try:
        found = os.stat(os.path.expanduser(path))
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino

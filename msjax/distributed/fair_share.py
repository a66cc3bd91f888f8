"""What callers hold of a server, within limits that nobody can use up alone."""

import collections
import threading
from collections.abc import Callable
from typing import NamedTuple


class _Held(NamedTuple):
    nbytes: int
    evict: Callable[[], None]
    caller: str


class FairShare:
    """What is open on a server: at most so many, of at most so many bytes.

    Who has most makes room for a new one: of the caller with the most, or with the most bytes where these are short,
    the one that was idle for longest is evicted. So nobody who has few loses them to somebody with many.

    Args:
      most: how many there may be.
      most_bytes: what they may take in all.
    """

    def __init__(self, most: int, most_bytes: int = 0):
        self._most, self._most_bytes, self._lock = most, most_bytes, threading.Lock()
        self._open: collections.OrderedDict[object, _Held] = collections.OrderedDict()

    def open(self, evict: Callable[[], None], caller: str = "", nbytes: int = 0) -> tuple[object, int]:
        """Returns a new one, and how many others were evicted for it: `evict` was called of each.

        Args:
          caller: whose it is.
          nbytes: what it takes, at most `most_bytes`.
        """
        one, evicted = object(), []
        with self._lock:
            while len(self._open) >= self._most:
                evicted.append(self._pop(caller, lambda _: 1, 1))
            while sum(held.nbytes for held in self._open.values()) + nbytes > self._most_bytes:
                evicted.append(self._pop(caller, lambda held: held.nbytes, nbytes))
            self._open[one] = _Held(nbytes, evict, caller)
        for held in evicted:
            held.evict()
        return one, len(evicted)

    def use(self, one: object) -> None:
        """Notes that one is not idle."""
        with self._lock:
            if one in self._open:
                self._open.move_to_end(one)

    def close(self, one: object) -> None:
        """Forgets one; what was evicted is forgotten already."""
        with self._lock:
            self._open.pop(one, None)

    def __len__(self):
        return len(self._open)

    def _pop(self, caller, size, more):
        """Takes away the one that was idle for longest of who holds most, with what `caller` asks for."""
        sizes = collections.Counter()
        for held in self._open.values():
            sizes[held.caller] += size(held)
        if caller in sizes:  # who has nothing yet cannot make room
            sizes[caller] += more
        most = max(sizes.values())
        return self._open.pop(next(one for one, held in self._open.items() if sizes[held.caller] == most))

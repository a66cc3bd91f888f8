"""A bound on the programs that a server compiles for whatever its clients send."""

import threading
from collections.abc import Callable, Hashable


class CompiledPrograms:
    """Counts programs by what they were compiled for; a new one beyond `most` lets go of all, by `clear`."""

    def __init__(self, most: int, clear: Callable[[], None]):
        self._most, self._clear = most, clear
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()

    def use(self, program: Hashable) -> None:
        """Notes that a program is used."""
        with self._lock:
            if program not in self._seen and len(self._seen) >= self._most:
                self._seen.clear()
                self._clear()
            self._seen.add(program)

"""A bound on the programs that a server compiles for whatever its clients send."""

import threading
from collections.abc import Hashable

import jax


class CompiledPrograms:
    """Counts programs by what they were compiled for; a new one beyond `most` lets go of all."""

    def __init__(self, most: int):
        self._most = most
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()

    def use(self, program: Hashable) -> None:
        """Notes that a program is used."""
        with self._lock:
            if program not in self._seen and len(self._seen) >= self._most:
                self._seen.clear()
                jax.clear_caches()
            self._seen.add(program)

"""SIGINT and SIGTERM as a wish to stop."""

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM call `stop`; a second one acts as usual.

    Only the main thread may set handlers; elsewhere signals act as usual. `stop` is called within the handler, so it
    must not take a lock that the interrupted code may hold.
    """
    old = {}

    def handler(number, frame):
        signal.signal(number, old[number])
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is None:  # of a program that Python is embedded in, and could not be set again
            continue
        with contextlib.suppress(ValueError):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)

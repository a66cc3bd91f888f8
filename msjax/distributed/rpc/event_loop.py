"""The asyncio loop of gRPC, in a thread of its own: of a training server, and of clients."""

import asyncio
import functools
import logging
import threading
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("msjax.server")


_lock = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """Returns the loop, which runs until the program ends.

    There is one a program, as gRPC's asyncio has one poller a program. It carries messages and computes nothing:
    whatever JAX does in other threads, streams are opened, read and written meanwhile. Pings are answered by threads of
    gRPC's own.
    """
    with _lock:  # the cache alone would let threads that come at once make a loop each
        return _event_loop()


@functools.cache
def _event_loop():
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_tell)
    threading.Thread(target=loop.run_forever, name="rpc", daemon=True).start()
    return loop


def run(coroutine: Coroutine) -> Any:
    """Returns what a coroutine returns in the loop, from another thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, event_loop()).result()


def _tell(loop, context):
    # Where a program has loops of its own for gRPC, another may have read what woke this one: nothing is lost.
    if not isinstance(context.get("exception"), BlockingIOError):
        log.error("%s", context.get("message"), exc_info=context.get("exception"))

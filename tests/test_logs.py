"""Lines that somebody else could make long, or many."""

import logging

from msjax.distributed.messages import ProtocolError
from msjax.logs import Seldom, ShortLines, shorten

from .memory_network import Clock


def test_long_texts_are_cut_in_the_middle():
    assert shorten("short") == "short" and shorten("x" * 10, 10) == "x" * 10
    assert shorten("ab" + "x" * 1000 + "yz", 4) == "ab … 1,000 characters … yz"
    assert len(str(ProtocolError(f"shape must be small, got {(1,) * 100_000}"))) < 2100


def test_log_lines_are_short():
    formatter = ShortLines("%(name)s: %(message)s")
    record = logging.LogRecord("msjax", logging.WARNING, "", 0, "%s", ("x" * 300_000,), None)
    assert len(formatter.format(record)) < 2100
    # Nor does what a client says make a line of its own.
    record = logging.LogRecord(
        "msjax", logging.WARNING, "", 0, "client 0: %s", ("got \nclient 1 joined \x1b[31mé",), None
    )
    assert formatter.format(record) == "msjax: client 0: got \\nclient 1 joined \\x1b[31mé"
    try:
        raise ValueError("x" * 300_000)
    except ValueError as error:
        exc_info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("msjax", logging.WARNING, "", 0, "client 0", (), exc_info)
    assert "Traceback" in formatter.format(record) and len(formatter.format(record)) < 21_000


def test_what_happens_often_is_said_seldom():
    said, clock = [], Clock()
    seldom = Seldom(lambda count, what: said.append((clock(), count, what)), 60.0, clock)
    for second in range(121):
        clock.now = float(second)
        seldom(f"peer {second}")
        seldom(f"peer {second} again")
    assert said == [(0.0, 1, "peer 0"), (60.0, 120, "peer 60"), (120.0, 120, "peer 120")]
    seldom.flush()
    assert said[3:] == [(120.0, 1, "peer 120 again")]
    seldom.flush()
    assert len(said) == 4

"""The slow link of `benchmarks.link` carries every byte and no faster than it says; the measurement on it adds up."""

import argparse
import contextlib
import json
import socket
import struct
import threading
import time

import pytest

pytest.importorskip("grpc", reason="needs the extra `net`")
from benchmarks import link, proxy
from msjax import config
from msjax.split import parties

from .helpers import free_port

SECONDS = 60  # after which a test gives up


@contextlib.contextmanager
def line(**options):
    """(connect, accept, proxy): makes a connection through a proxy, takes its other end."""
    with socket.create_server(("localhost", 0)) as listener:
        listener.settimeout(SECONDS)
        with contextlib.ExitStack() as ends, proxy.Proxy(f"localhost:{listener.getsockname()[1]}", **options) as link:

            def connect():
                return ends.enter_context(socket.create_connection(("localhost", link.port), SECONDS))

            def accept():
                end, _ = listener.accept()
                end.settimeout(SECONDS)
                return ends.enter_context(end)

            yield connect, accept, link


def push(end, data):
    """Sends in a thread of its own, then half-closes."""

    def run():
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def read_all(end):
    return b"".join(iter(lambda: end.recv(1 << 16), b""))


def test_rate_is_shared_by_all_connections_and_each_direction_has_its_own():
    data, megabits = bytes(range(256)) * 4000, 40.0
    with line(megabits=megabits) as (connect, accept, link):
        pairs = [(connect(), accept()) for _ in range(2)]
        start = time.monotonic()
        threads = [push(end, data) for pair in pairs for end in pair]
        arrived = {}
        for pair in pairs:
            for end in pair:
                threads.append(threading.Thread(target=lambda end=end: arrived.update({end: read_all(end)})))
                threads[-1].start()
        for thread in threads:
            thread.join(SECONDS)
        seconds = time.monotonic() - start
        assert list(arrived.values()) == [data] * 4  # half-closed: what comes the other way still comes
        assert link.counts() == proxy.Counts(2 * len(data), 2 * len(data), 2)
    ideal = 2 * len(data) * 8 / (megabits * 1e6)
    assert seconds >= 0.95 * ideal  # a burst's worth less; what a busy machine adds has no limit


def test_rate_of_each_connection_and_without_one():
    data = bytes(1 << 20)
    with line(megabits=40.0, per_connection=True) as (connect, accept, link):
        for shaped in (True, False):
            link.shape(40.0 if shaped else None)
            near, far = connect(), accept()
            start = time.monotonic()
            push(near, data)
            assert read_all(far) == data
            seconds = time.monotonic() - start
            if shaped:
                assert seconds >= 0.9 * len(data) * 8 / 40e6
        assert link.counts() == proxy.Counts(2 * len(data), 0, 2)


def test_delay():
    with line(megabits=None, delay_ms=50.0) as (connect, accept, _):
        near, far = connect(), accept()
        start = time.monotonic()
        near.sendall(b"ping")
        assert far.recv(4) == b"ping"
        far.sendall(b"pong")
        assert near.recv(4) == b"pong"
        assert time.monotonic() - start >= 0.1


def test_sender_feels_that_nobody_reads():
    with line(megabits=None) as (connect, accept, link):
        near, far = connect(), accept()
        thread = push(near, bytes(64 << 20))
        counts = None
        while counts != (counts := link.counts()) or not counts.up:
            time.sleep(0.3)
        assert thread.is_alive() and counts.up < 32 << 20
        assert len(read_all(far)) == 64 << 20


@pytest.mark.parametrize("side", ["near", "far"])
def test_reset_is_passed_on(side):
    with line(megabits=None) as (connect, accept, link):
        near, far = connect(), accept()
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        broken, other = (near, far) if side == "near" else (far, near)
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        broken.close()
        with pytest.raises(ConnectionResetError):
            other.recv(1)
        # The others are not disturbed.
        near, far = connect(), accept()
        near.sendall(b"y")
        assert far.recv(1) == b"y" and link.counts().connections == 2


def test_nobody_behind_it():
    with (
        proxy.Proxy(f"localhost:{free_port()}") as link,
        socket.create_connection(("localhost", link.port), SECONDS) as end,
        pytest.raises(ConnectionResetError),
    ):
        end.recv(1)


def options(**changes):
    """Of the smallest network that there is."""
    base = {
        "model_name": "convnet",
        "model_width": 1.0,
        "clients": 2,
        "batch": 25,
        "grad_codec": "Identity()",
        "megabits": 20.0,
        "delay_ms": 0.0,
        "per_connection": False,
        "lockstep": True,
        "warmup": 1,
        "repeats": 2,
        "seed": 0,
    }
    return argparse.Namespace(**base | changes)


@pytest.mark.slow
def test_on_link():
    row = link.on_link(options(), "medium", **link.CODECS["MS"])
    # gRPC adds frame headers and pings, and protobuf and msjax.wire theirs: under 2 % even of these small messages.
    for way in ("uplink", "downlink"):
        nominal, message, socket_bytes = (row[f"{way}_{kind}_bytes"] for kind in ("nominal", "message", "socket"))
        assert 0 < nominal < message < socket_bytes < 1.02 * nominal + 1000
    assert row["uplink_feature_bytes"] < row["uplink_nominal_bytes"] < row["downlink_nominal_bytes"]
    # Each of two exchanges may begin with a burst, both ways; how much later it ends depends on the machine.
    ideal = row["ideal_wire_seconds"] - 4 * proxy.BURST_BYTES * 8 / 20e6
    assert min(step["exchange_seconds"] for step in row["steps"]["slow"]) > ideal > 0
    row |= {"kind": "link", "cut": "medium", "name": "MS"}
    record = {
        "config": config.to_json(link.Case.of(options(), "medium", steps=1, **link.CODECS["MS"]).cfg),
        "history": [{"step": 10, "test": {"top1_percent": 80.0}}, {"step": 20, "test": {"top1_percent": 90.0}}],
    }
    hours = link.accuracy_hours([row], [record], options(accuracy=85.0))
    assert hours == {("medium", "MS"): pytest.approx(20 * row["step_seconds"] / 3600)}
    assert link.accuracy_hours([row], [record], options(accuracy=95.0)) == {}
    assert link.accuracy_hours([row], [record], options(accuracy=85.0, batch=50)) == {}
    assert len(link.table([row], hours).splitlines()) == 3
    everything = link.on_link(options(), "medium", **link.CODECS["EntropyMask, everything"])
    assert everything["uplink_socket_bytes"] < everything["uplink_nominal_bytes"]  # of entropy-coded codecs not coded
    assert everything["downlink_socket_bytes"] < row["downlink_socket_bytes"] / 4
    assert row["codec"] != "Identity()" == str(link.Case.of(options(), "medium", steps=1).cfg.codec)
    everything |= {"kind": "link", "cut": "medium", "name": "EntropyMask, everything"}
    assert link.accuracy_hours([everything], [record], options(accuracy=85.0)) == {}
    earlier = {name: value for name, value in row.items() if name not in (*link._RECORDED, "entropy_coded")}
    earlier |= {"codec": row["codec"]}  # all that rows said at first
    assert link.accuracy_hours([earlier], [record], options(accuracy=85.0)) == hours
    assert len(link.table([earlier], {}).splitlines()) == 3
    assert " – " in link.table([row, everything], {}).splitlines()[3]


@pytest.mark.slow
def test_party_that_fails_ends_the_measurement(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(parties.Client, "receive", fail)
    with pytest.raises(RuntimeError, match="broken"):
        link.on_link(options(), "medium")


@pytest.mark.slow
def test_finished_rows_are_not_repeated(tmp_path, monkeypatch, capsys):
    """And gRPC computes the same bits as one program, which `beside_program` checks."""
    arguments = ["link", "--model.name", "convnet", "--model.width", "1", "--clients", "2", "--only", "transport"]
    arguments += ["--tiny-repeats", "2", "--warmup", "1", "--out", str(tmp_path / "x")]
    monkeypatch.setattr("sys.argv", arguments)
    assert link.main() == 0
    first = json.loads((tmp_path / "x.json").read_text())
    assert [row["clients"] for row in first["rows"]] == [1, 2]
    table = capsys.readouterr().out
    monkeypatch.setattr(link, "beside_program", None)
    assert link.main() == 0
    assert capsys.readouterr().out == table and json.loads((tmp_path / "x.json").read_text()) == first
    monkeypatch.setattr("sys.argv", [*arguments, "--seed", "1"])
    with pytest.raises(SystemExit):
        link.main()
    assert "same options" in capsys.readouterr().err

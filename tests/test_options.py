"""What the network's ends refuse before they open anything: addresses, ports, tokens, files of TLS."""

import contextlib
import re
import socket

import pytest

from msjax.distributed import inference
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.rpc.addresses import parse_address
from msjax.distributed.rpc.security import TlsFiles, check_plaintext
from msjax.distributed.rpc.server import Endpoint


def test_plaintext_only_at_home():
    for text in ("localhost:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:1"):
        check_plaintext(parse_address("server", text), TlsFiles(), False)
    for text in ("0.0.0.0:1", "[::]:1", "example.org:1", "10.0.0.1:1", "localhost.example.org:1"):
        address = parse_address("server", text)
        assert str(address) == text
        with pytest.raises(ValueError, match="or insecure to send everything in the open"):
            check_plaintext(address, TlsFiles(), False)
        check_plaintext(address, TlsFiles(), True)
        check_plaintext(address, TlsFiles(authority="ca.pem"), False)


ADDRESSES = {
    r"must be host:port with a port in 1\.\.65535": ("localhost:99999", "localhost:0", "localhost:-1", "localhost", ""),
    "must be host:port": (":", ":5", "localhost:", "localhost:5x", "h:5/", "h: 5", "h:+5", "h:٥", "h:5\n"),
    "and a host's name or IP address alone before it": ("a b:5", "me@host:5", "a/b:5", "-a:5", ".:5", "*:5"),
    "and an IPv6 address in brackets": ("::1:5", "http://localhost:5", "localhost:5:6", "[::1:5"),
    "must have an IPv6 address in the brackets": ("[]:5", "[localhost]:5", "[127.0.0.1]:5", "[::x]:5"),
    "must have a whole IP address": ("256.0.0.1:5", "1.2.3:5", "5:5"),
}


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in ADDRESSES.items() for text in texts])
def test_addresses_that_are_none(rule, text):
    with pytest.raises(ValueError, match=f"server .*{rule}.*, got {re.escape(repr(text))}"):
        parse_address("server", text)


def test_ports_of_ones_own_are_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"metrics_port must be a free port, got {port}: Address already in use"):
            Endpoint(ListenOptions(listen="localhost:0", metrics_port=port), Metrics(), streams=1)
        with pytest.raises(ValueError, match=f"listen must be a free host:port, got '127.0.0.1:{port}'"):
            Endpoint(ListenOptions(listen=f"127.0.0.1:{port}"), Metrics(), streams=1)
    endpoint = Endpoint(ListenOptions(listen="localhost:0", metrics_port=0), Metrics(), streams=1)
    try:
        said = re.fullmatch(r"localhost:(\d+), metrics at http://127.0.0.1:(\d+)/metrics", str(endpoint))
        assert (endpoint.address.port, endpoint.metrics_port) == tuple(map(int, said.groups()))
        assert all(port != "0" for port in said.groups())
    finally:
        endpoint.close()
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=f"metrics_port must be in 0..65535, got {port}"):
            ListenOptions(metrics_port=port).check()


@contextlib.contextmanager
def silent():
    """The address of a server that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_is_away_is_named_with_what_was_tried():
    told = []
    remote = inference.RemoteServer("localhost:1")
    try:
        with pytest.raises(ConnectionError, match=r"no answer in 0\.3 s of trying: localhost:1: .*Connection refused"):
            remote.describe(0.3, tell=told.append)
    finally:
        remote.close()
    assert len(told) == 1 and re.search("localhost:1: .*; trying again for up to 0 s", told[0])
    with silent() as address:
        remote = inference.RemoteServer(address)
        try:
            with pytest.raises(ConnectionError, match=f"no answer in 0.2 s of trying: {address}: nothing answers"):
                remote.describe(0.2)
        finally:
            remote.close()

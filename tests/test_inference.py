"""Inference through a server's half behind gRPC: the same numbers, and nothing for those who may not ask."""

import contextlib
import datetime
import time

import jax
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from msjax import assemble, compress, config, halves, models
from msjax.transport import inference
from msjax.transport import split_pb2 as pb
from msjax.transport._metrics import Metrics
from msjax.transport._security import TlsFiles, Tokens, check_plaintext
from msjax.transport.client import Refused
from msjax.transport.options import ListenOptions
from msjax.transport.server import Endpoint

INFO = assemble.SetInfo((8, 8, 1), 10, (0.5,), (0.25,))
CODEC = compress.MaskEncoded(ratio=0.9)


def make(path, **mode):
    """(client, server, head) of a small net, as files under `path` too."""
    cfg = config.Config(model=config.ModelConfig(width=0.5, cut="shallow"), mode=config.ModeConfig(**mode), codec=CODEC)
    client, server, *head = assemble.make_halves(cfg, INFO)
    mine = models.Half(client.apply, client.params | head[0].params, client.stats | head[0].stats) if head else client
    halves.save(path / "client.safetensors", "client", mine, cfg, INFO, run="r", step=7)
    halves.save(path / "server.safetensors", "server", server, cfg, INFO, run="r", step=7)
    return client, server, *head


@contextlib.contextmanager
def served(path, metrics=None, **options):
    options = ListenOptions(**{"listen": "localhost:0", **options})
    trained = halves.load(path / "server.safetensors")
    limits = {"max_bytes": options.max_megabytes << 20, "max_messages_per_second": options.max_messages_per_second}
    metrics = metrics or Metrics()
    servicer = inference.Servicer(trained, Tokens(options.tokens), metrics, compression=options.compression, **limits)
    endpoint = Endpoint(options, servicer, metrics, streams=4)
    try:
        yield f"localhost:{endpoint.port}"
    finally:
        endpoint.close()


@contextlib.contextmanager
def remote(address, **options):
    it = inference.Remote(address, **options)
    try:
        yield it
    finally:
        it.close()


def features(half, batch, seed=0):
    x = jax.random.normal(jax.random.key(seed), (batch, *INFO.input_shape))
    h, _ = half.apply(half.params, half.stats, x, train=False)
    return h


def like(h):
    return jax.ShapeDtypeStruct(h.shape, h.dtype)


@pytest.mark.parametrize("codec", [CODEC, compress.Identity(), compress.Uniform(bits=4)], ids=repr)
@pytest.mark.parametrize("compression", [None, "huffman"])
def test_logits_are_those_of_the_half(tmp_path, codec, compression):
    client, server = make(tmp_path)
    with served(tmp_path) as address, remote(address) as there:
        description = there.describe()
        assert (description.run, description.step, description.num_classes) == ("r", 7, 10)
        batches = [features(client, batch, seed=batch) for batch in (4, 1, 4)]
        for h in batches:  # all on their way at once
            assert there.send(codec.encode(h), codec, like(h), compression) > codec.payload_bytes(h) * (not compression)
        for h in batches:
            message = there.receive()
            expected, _ = server.apply(server.params, server.stats, codec.roundtrip(h), train=False)
            np.testing.assert_allclose(message.payload[0], expected, rtol=1e-5, atol=1e-5)


def test_u_shaped(tmp_path):
    client, server, head = make(tmp_path, head_cut="last")
    h = features(client, 4)
    with served(tmp_path) as address, remote(address) as there:
        there.send(CODEC.encode(h), CODEC, like(h))
        message = there.receive()
    expected, _ = server.apply(server.params, server.stats, CODEC.roundtrip(h), train=False)
    assert (message.codec, message.like) == (CODEC, like(expected))
    np.testing.assert_allclose(message.payload.values, CODEC.encode(expected).values, rtol=1e-5)
    logits, _ = head.apply(head.params, head.stats, CODEC.decode(message.payload, message.like), train=False)
    assert logits.shape == (4, 10)


def test_features_that_do_not_fit(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 2)
    for wrong in (h[:, 1:], h[:0], h.astype(np.float16)):
        with served(tmp_path) as address, remote(address) as there:
            there.send(CODEC.encode(wrong), CODEC, like(wrong))
            with pytest.raises(Refused, match=r"features must be float32\[batch"):
                there.receive()
    with served(tmp_path) as address, remote(address) as there:
        there.send(CODEC.encode(h), CODEC, like(h))
        there.receive()
        there._requests.put(pb.Features(payload=b"nonsense, and more"))
        with pytest.raises(Refused, match="begin with b'MSJX'"):
            there.receive()


def test_shapes_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "_MAX_SHAPES", 2)
    client, _ = make(tmp_path)
    with served(tmp_path) as address, remote(address) as there:
        for batch in (1, 2, 1, 3):
            h = features(client, batch)
            there.send(CODEC.encode(h), CODEC, like(h))
        for _ in range(3):
            there.receive()
        with pytest.raises(Refused, match="takes no new ones"):
            there.receive()
        with remote(address) as again:  # what was met before is answered all the same
            h = features(client, 2)
            again.send(CODEC.encode(h), CODEC, like(h))
            again.receive()


def test_a_message_that_is_too_long(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 300)
    assert compress.Identity().payload_bytes(h) > 1 << 20
    with served(tmp_path, max_megabytes=1) as address, remote(address) as there:
        with pytest.raises(ValueError, match="listen must be a free host:port"), served(tmp_path, listen=address):
            pass
        there.send((h,), compress.Identity(), like(h))
        with pytest.raises(Refused, match="larger than max"):
            there.receive()


def test_who_is_too_fast_is_held_back(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 2)
    with served(tmp_path, max_messages_per_second=10) as address, remote(address) as there:
        there.send(CODEC.encode(h), CODEC, like(h))
        there.receive()  # compiled
        began = time.monotonic()
        for _ in range(19):
            there.send(CODEC.encode(h), CODEC, like(h))
        for _ in range(19):
            there.receive()
        assert time.monotonic() - began > 0.7  # ten at once, then ten a second


def test_a_client_half_does_not_serve(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="half must be that of a server, got that of a client"):
        inference.Servicer(halves.load(tmp_path / "client.safetensors"), Tokens(None), Metrics())


def test_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://localhost:1")  # what is sent in the open goes to no proxy
    metrics = Metrics()
    client, _ = make(tmp_path)
    h = features(client, 2)
    # echo -n bob | sha256sum
    bob = "81b637d8fcd2c6da6359e6963113a1170de795e4b725b84d1e0b4cfd9ec58ce9"
    (tmp_path / "tokens").write_text(f"# of two clients\n0 alice\n1 sha256:{bob}\n")
    with served(tmp_path, metrics, tokens=str(tmp_path / "tokens")) as address:
        for token in (None, "mallory", bob):
            with remote(address, token=token) as there:
                with pytest.raises(Refused, match="no such token"):
                    there.describe()
                there.send(CODEC.encode(h), CODEC, like(h))
                with pytest.raises(Refused, match="no such token"):
                    there.receive()
        assert metrics.refused._value.get() == 6 and metrics.totals() == {"received_bytes": 0, "sent_bytes": 0}
        for token in ("alice", "bob"):
            with remote(address, token=token) as there:
                assert there.describe().run == "r"
                sent = there.send(CODEC.encode(h), CODEC, like(h))
                assert there.receive().like.shape == (2, 10)
        assert 2 * sent <= metrics.totals()["received_bytes"] < 2 * sent + 20


class Authority:
    def __init__(self, path):
        self._ca, self._path = trustme.CA(), path
        self._ca.cert_pem.write_to_path(path / "ca.pem")

    def issue(self, name, **options):
        cert = self._ca.issue_cert(name, **options)
        cert.cert_chain_pems[0].write_to_path(self._path / f"{name}.pem")
        cert.private_key_pem.write_to_path(self._path / f"{name}.key")
        return TlsFiles(*(str(self._path / file) for file in (f"{name}.pem", f"{name}.key", "ca.pem")))


def test_mutual_tls(tmp_path):
    make(tmp_path)
    (tmp_path / "other").mkdir()
    ours, others = Authority(tmp_path), Authority(tmp_path / "other")
    server = ours.issue("localhost")
    no_certificate = TlsFiles(authority=server.authority)
    with served(tmp_path, tls=server) as address:
        with remote(address, tls=ours.issue("client")) as there:
            assert there.describe().run == "r"
            health = health_pb2_grpc.HealthStub(there._channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        other = others.issue("client")
        strangers = (
            no_certificate,
            TlsFiles(other.certificate, other.key, server.authority),
            ours.issue("late", not_after=datetime.datetime(2020, 1, 1)),
            None,  # in the open
        )
        for tls in strangers:
            with remote(address, tls=tls) as there, pytest.raises(ConnectionError):
                there.describe(seconds=2)
    # Someone else's server.
    theirs, mine = others.issue("localhost"), ours.issue("client2")
    with served(tmp_path, tls=theirs) as address, remote(address, tls=mine) as there, pytest.raises(ConnectionError):
        there.describe(seconds=2)
    with pytest.raises(ValueError, match="a server checks its clients' certificates"):
        no_certificate.server()
    with pytest.raises(ValueError, match=r"tls key must be a readable PEM file, got 'x.key'"):
        TlsFiles("x.pem", "x.key", "ca.pem").server()


def test_plaintext_only_at_home():
    for address in ("localhost:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "unix:/tmp/socket"):
        check_plaintext(address, TlsFiles(), False)
    for address in ("0.0.0.0:1", "[::]:1", "example.org:1", "10.0.0.1:1", "localhost.example.org:1"):
        with pytest.raises(ValueError, match="--insecure to send everything in the open"):
            check_plaintext(address, TlsFiles(), False)
        check_plaintext(address, TlsFiles(), True)
        check_plaintext(address, TlsFiles(authority="ca.pem"), False)


def test_tokens_file(tmp_path):
    path = tmp_path / "tokens"
    for line in ("alice", "x alice", "-1 alice"):
        path.write_text(f"0 bob\n{line}\n")
        with pytest.raises(ValueError, match="lines of a client's number and its token, got line 2"):
            Tokens(str(path))
    for wrong in ("sha256:", "sha256:zz", "sha256:" + "a" * 63):
        path.write_text(f"0 {wrong}")
        with pytest.raises(ValueError, match="64 hexadecimal digits, in line 1"):
            Tokens(str(path))
    path.write_text("0 sha256:81B637D8FCD2C6DA6359E6963113A1170DE795E4B725B84D1E0B4CFD9EC58CE9")
    assert Tokens(str(path)).accept(0, "bob") and not Tokens(str(path)).accept(0, "bo")
    path.write_text("")
    assert not Tokens(str(path)).accept(0, None) and not Tokens(str(path)).accept_any("")
    path.write_text("0 bob\n")
    tokens = Tokens(str(path))
    assert tokens.accept(0, "bob") and not tokens.accept(1, "bob") and not tokens.accept(0, "")
    assert Tokens(None).accept(5, None) and Tokens(None).accept_any(None)


def test_nobody_there():
    with remote("localhost:1") as there:
        with pytest.raises(ConnectionError):
            there.describe(seconds=0.5)
        with pytest.raises(ValueError, match="receive must follow a send"):
            there.receive()

"""Inference through a server's part behind gRPC: the same numbers, and nothing for those who may not ask."""

import contextlib
import datetime
import time

import jax
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from msjax import build, compress, config, models, parts
from msjax.distributed import inference, messages
from msjax.distributed.channel import ConnectionLost
from msjax.distributed.client_run import Refused
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.remote import RemoteServer
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.connection import Connection
from msjax.distributed.rpc.security import Rate, TlsFiles, Tokens
from msjax.distributed.rpc.server import Endpoint, most_calls
from msjax.split.payloads import PayloadSpec

from .authority import Authority
from .setups import dataset
from .test_admission import Call
from .test_rpc import assert_answered_unasked, assert_nobody_watches, unread

SUMMARY = build.DataSummary.of(dataset())
CODEC = compress.MaskEncoded(ratio=0.9)
STREAMS = 4


def make(path, **mode):
    """(client, server, tail) of a small net, as files under `path` too."""
    cfg = config.Config(model=config.ModelConfig(width=0.5, cut="shallow"), mode=config.ModeConfig(**mode), codec=CODEC)
    client, server, *tail = build.make_parts(cfg, SUMMARY)
    mine = (
        models.ModelPart(client.apply, client.params | tail[0].params, client.stats | tail[0].stats) if tail else client
    )
    parts.save_trained(path / "client.safetensors", "client", mine, cfg, SUMMARY, run_id="r", step=7)
    parts.save_trained(path / "server.safetensors", "server", server, cfg, SUMMARY, run_id="r", step=7)
    return client, server, *tail


@contextlib.contextmanager
def served(path, metrics=None, **options):
    options = ListenOptions(**{"listen": "localhost:0", **options})
    trained = parts.load_part(path / "server.safetensors")
    limits = {"max_bytes": options.max_megabytes << 20, "max_messages_per_second": options.max_messages_per_second}
    metrics = metrics or Metrics()
    servicer = inference.InferenceServicer(
        trained, Tokens(options.tokens), metrics, compression=options.compression, **limits, most_streams=STREAMS
    )
    endpoint = Endpoint(options, metrics, STREAMS)
    endpoint.start(servicer)
    try:
        yield str(endpoint.address)
    finally:
        endpoint.close()
        servicer.close()


@contextlib.contextmanager
def remote(address, **options):
    it = RemoteServer(address, **options)
    try:
        yield it
    finally:
        it.close()


def features(part, batch, seed=0):
    x = jax.random.normal(jax.random.key(seed), (batch, *SUMMARY.input_shape))
    h, _ = part.apply(part.params, part.stats, x, train=False)
    return h


def like(h):
    return jax.ShapeDtypeStruct(h.shape, h.dtype)


def ask(there, codec, h):
    """Sends features; returns the message's bytes."""
    spec = PayloadSpec(jax.tree.structure(0), (codec,), (like(h),), (0,))
    return there.send(spec.encode(h), spec)


@pytest.mark.parametrize("codec", [CODEC, compress.Identity(), compress.Uniform(bits=4)], ids=repr)
@pytest.mark.parametrize("compression", [None, "huffman"])
def test_outputs_are_those_of_the_part(tmp_path, codec, compression):
    client, server = make(tmp_path)
    with served(tmp_path) as address, remote(address, compression=compression) as there:
        description = there.describe()
        assert (description.run, description.step) == ("r", 7)
        batches = [features(client, batch, seed=batch) for batch in (4, 1, 4)]
        for h in batches:  # all on their way at once
            assert ask(there, codec, h) > codec.payload_bytes(h) * (not compression)
        for h in batches:
            (message,) = there.receive()
            expected, _ = server.apply(server.params, server.stats, codec.roundtrip(h), train=False)
            np.testing.assert_allclose(message.payload[0], expected, rtol=1e-5, atol=1e-5)


def test_requests_are_counted(tmp_path):
    client, _ = make(tmp_path)
    metrics = Metrics()
    with served(tmp_path, metrics) as address, remote(address) as there:
        for batch in (4, 1, 4):
            ask(there, CODEC, features(client, batch, seed=batch))
            there.receive()
        there._requests.put(pb.Features(payload=[b"nonsense, and more"]))
        with pytest.raises(Refused, match="begin with b'MSJX'"):
            there.receive()
    totals, text = metrics.totals(), metrics.text()
    for line in ("requests_total 3.0", "samples_total 9.0", "answer_seconds_count 3.0", "refused_clients_total 1.0"):
        assert f"msjax_{line}" in text
    said = f"{totals['received_bytes']:,.0f} bytes received, {totals['sent_bytes']:,.0f} sent; 1 refused"
    assert metrics.summary().startswith("3 requests of 9 samples answered in ") and metrics.summary().endswith(said)


@pytest.mark.slow
def test_u_shaped(tmp_path):
    client, server, tail = make(tmp_path, tail_cut="last")
    h = features(client, 4)
    with served(tmp_path) as address, remote(address) as there:
        ask(there, CODEC, h)
        (message,) = there.receive()
    expected, _ = server.apply(server.params, server.stats, CODEC.roundtrip(h), train=False)
    assert (message.codec, message.like) == (CODEC, like(expected))
    np.testing.assert_allclose(message.payload.values, CODEC.encode(expected).values, rtol=1e-5)
    logits, _ = tail.apply(tail.params, tail.stats, CODEC.decode(message.payload, message.like), train=False)
    assert logits.shape == (4, 10)


@pytest.mark.slow
def test_features_that_do_not_fit(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 2)
    for wrong in (h[:, 1:], h[:0], h.astype(np.float16)):
        with served(tmp_path) as address, remote(address) as there:
            ask(there, CODEC, wrong)
            with pytest.raises(Refused, match=r"features must be float32\[batch"):
                there.receive()
    with served(tmp_path) as address, remote(address) as there:
        ask(there, CODEC, h)
        there.receive()
        there._requests.put(pb.Features(payload=[b"nonsense, and more"]))
        with pytest.raises(Refused, match="begin with b'MSJX'"):
            there.receive()


@pytest.mark.slow
def test_batch_sizes_without_end(tmp_path, monkeypatch):
    """All are answered, and the programs of so many are kept at a time."""
    monkeypatch.setattr(inference, "_MOST_PROGRAMS", 2)
    kept = []
    monkeypatch.setattr(inference.jax, "clear_caches", lambda: kept.append(inference._infer._cache_size()))
    client, server = make(tmp_path)
    with served(tmp_path) as address, remote(address) as there:
        for batch in (1, 2, 1, 3, 4, 5):
            h = features(client, batch)
            ask(there, compress.Identity(), h)
            (message,) = there.receive()
            expected, _ = server.apply(server.params, server.stats, h, train=False)
            np.testing.assert_allclose(message.payload[0], expected, rtol=1e-5, atol=1e-5)
    assert len(kept) == 2


@pytest.mark.slow
def test_a_message_that_is_too_long(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 300)
    assert compress.Identity().payload_bytes(h) > 1 << 20
    with served(tmp_path, max_megabytes=1) as address, remote(address) as there:
        with pytest.raises(ValueError, match="listen must be a free host:port"), served(tmp_path, listen=address):
            pass
        ask(there, compress.Identity(), h)
        with pytest.raises(Refused, match="larger than max"):
            there.receive()


@pytest.mark.slow
def test_who_is_too_fast_is_held_back(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 2)
    with served(tmp_path, max_messages_per_second=10) as address, remote(address) as there:
        ask(there, CODEC, h)
        there.receive()  # compiled
        began = time.monotonic()
        for _ in range(19):
            ask(there, CODEC, h)
        for _ in range(19):
            there.receive()
        assert time.monotonic() - began > 0.7  # ten at once, then ten a second


class _Call(Call):
    """A call that ends where it is told to."""

    def add_callback(self, call):
        self.end = call
        return True

    def cancel(self):
        self.end()


def test_a_callers_rate_is_one_over_all_its_streams(tmp_path, monkeypatch):
    delays = []
    monkeypatch.setattr(Rate, "wait", lambda rate, ended: delays.append(rate.delay()))
    make(tmp_path)
    part = parts.load_part(tmp_path / "server.safetensors")
    servicer = inference.InferenceServicer(part, Tokens(None), Metrics(), max_messages_per_second=1e-3)

    def ask(host):  # one message at once, and the next 1000 s later
        call = _Call(peer=f"ipv4:{host}:5000")
        assert next(servicer._held(iter([pb.Features()]), call)) == pb.Features()
        return call

    calls = [ask("192.0.2.1") for _ in range(3)]
    assert delays == [0.0, pytest.approx(1000, rel=0.1), pytest.approx(2000, rel=0.1)]
    for call in calls:
        call.end()
    ask("192.0.2.1")  # who comes again is no new one
    assert delays[3] == pytest.approx(3000, rel=0.1)
    ask("192.0.2.2")
    assert delays[4] == 0.0


def test_a_clients_part_does_not_serve(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="part must be that of a server, got that of a client"):
        inference.InferenceServicer(parts.load_part(tmp_path / "client.safetensors"), Tokens(None), Metrics())


def test_a_client_that_would_train_is_told_what_it_has_met(tmp_path, caplog):
    make(tmp_path)
    with served(tmp_path) as address:
        connection = Connection(address, TlsFiles(), None)
        try:
            connection.send(pb.FromClient())
            with pytest.raises(ConnectionLost, match=rf"^{address}: .* training one \(msjax serve\)") as caught:
                connection.receive(20)
        finally:
            connection.close()
    assert caught.value.final and not caplog.records


def test_tokens(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("http_proxy", "http://localhost:1")  # what is sent in the open goes to no proxy
    metrics = Metrics()
    client, _ = make(tmp_path)
    h = features(client, 2)
    # echo -n bob | sha256sum
    bob = "81b637d8fcd2c6da6359e6963113a1170de795e4b725b84d1e0b4cfd9ec58ce9"
    (tmp_path / "tokens").write_text(f"# of two clients\n0 alice\n1 sha256:{bob}\n")
    with served(tmp_path, metrics, tokens=str(tmp_path / "tokens")) as address:
        for token, says in ((None, "--token-file gives one"), ("mallory", "no such token"), (bob, "no such token")):
            with remote(address, token=token) as there:
                with pytest.raises(Refused, match=says):
                    there.describe()
                ask(there, CODEC, h)
                with pytest.raises(Refused, match=says):
                    there.receive()
        assert metrics.refused._value.get() == 6 and metrics.totals() == {"received_bytes": 0, "sent_bytes": 0}
        for token in ("alice", "bob"):
            with remote(address, token=token) as there:
                assert there.describe().run == "r"
                sent = ask(there, CODEC, h)
                assert there.receive()[0].like.shape == (2, 10)
        assert 2 * sent <= metrics.totals()["received_bytes"] < 2 * sent + 20
    assert caplog.text.count("refused: ") == 2 and "refused: 5 calls, the last from ipv" in caplog.text


def test_who_does_not_read_keeps_nobody_out(tmp_path):
    """Of who has most streams, one is ended for another's."""
    client, _ = make(tmp_path)
    h, metrics = features(client, 2), Metrics()
    spec = PayloadSpec(jax.tree.structure(0), (CODEC,), (like(h),), (0,))
    request = pb.Features(payload=messages.encode(spec.encode(h), spec, None)).SerializeToString()
    (tmp_path / "tokens").write_text("0 alice\n1 bob\n")
    count = most_calls(STREAMS) + 4
    with (
        served(tmp_path, metrics, tokens=str(tmp_path / "tokens")) as address,
        remote(address, token="bob") as there,
        contextlib.ExitStack() as stack,
    ):
        ask(there, CODEC, h)
        there.receive()
        unread(stack, address, "msjax.v2.Split/Infer", request, count, token="alice", in_turn=True)
        ask(there, CODEC, h)
        there.receive()
        streams = [stack.enter_context(remote(address, token="bob")) for _ in range(STREAMS)]
        for other in streams:
            ask(other, CODEC, h)
            other.receive()
        ask(there, CODEC, h)
        with pytest.raises(ConnectionError, match="the server has ended the stream, as others needed its room"):
            there.receive()
    assert f"msjax_evicted_sessions_total {count + 1}.0" in metrics.text()


@pytest.mark.slow
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
            assert_nobody_watches(there._channel)
            assert_answered_unasked(there._channel, "msjax.v2.Split/Describe")
        other = others.issue("client")
        strangers = {
            "the server wants a certificate": no_certificate,
            "it is of no authority that the server trusts": TlsFiles(other.certificate, other.key, server.authority),
            "certificate has expired": ours.issue("late", not_after=datetime.datetime(2020, 1, 1)),
            "the server speaks TLS": None,  # in the open
        }
        for says, tls in strangers.items():
            with remote(address, tls=tls) as there, pytest.raises(Refused, match=says):
                there.describe()
    # Someone else's server.
    theirs, mine = others.issue("localhost"), ours.issue("client2")
    with (
        served(tmp_path, tls=theirs) as address,
        remote(address, tls=mine) as there,
        pytest.raises(Refused, match="the server's certificate: unable to get local issuer certificate"),
    ):
        there.describe()
    with pytest.raises(ValueError, match="a server checks its clients' certificates"):
        no_certificate.server()
    with pytest.raises(ValueError, match=r"tls.certificate must be a file that can be read, got 'x.pem'"):
        TlsFiles("x.pem", "x.key", "ca.pem").server()


def test_nobody_there():
    with remote("localhost:1") as there:
        with pytest.raises(ConnectionError):
            there.describe(seconds=0.5)
        with pytest.raises(ValueError, match="receive must follow a send"):
            there.receive()

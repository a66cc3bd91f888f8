"""Inference through a server's part behind gRPC: the same numbers, and nothing for those who may not ask."""

import contextlib
import datetime
import queue
import time

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from msjax import build, compress, config, models, parts, wire
from msjax.distributed import inference, messages
from msjax.distributed import remote as remote_module
from msjax.distributed.channel import ConnectionLost
from msjax.distributed.fair_share import FairShare
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions
from msjax.distributed.remote import RemoteServer
from msjax.distributed.rpc import reread
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


def spec_of(codec, like):
    return PayloadSpec(jax.tree.structure(0), (codec,), (like,), (0,))


def ask(there, codec, *batches):
    """Sends features of equal shapes; returns the outputs, (batch, 10) each."""
    up = spec_of(codec, like(batches[0]))
    down = spec_of(compress.Identity(), jax.ShapeDtypeStruct((len(batches[0]), 10), np.float32))
    return [payload[0].values for payload in there.answers([up.encode(h) for h in batches], up, down)]


def ask_nonsense(there):
    stream = there._stub.Infer(iter([pb.Features(payload=[b"nonsense, and more"])]))
    with pytest.raises(ValueError, match="begin with b'MSJX'"):
        there._call(lambda: next(stream))


@pytest.mark.parametrize("codec", [CODEC, compress.Identity(), compress.Uniform(bits=4)], ids=repr)
@pytest.mark.parametrize("compression", [None, "huffman"])
def test_outputs_are_those_of_the_part(tmp_path, codec, compression):
    client, server = make(tmp_path)
    with served(tmp_path) as address, remote(address, compression=compression) as there:
        description = there.describe()
        assert (description.run, description.step) == ("r", 7)
        batches, single = [features(client, 4, seed=seed) for seed in range(3)], features(client, 1, seed=1)
        answers = ask(there, codec, *batches), ask(there, codec, single)  # several are on their way at once
        for h, found in zip([*batches, single], [*answers[0], *answers[1]], strict=True):
            expected, _ = server.apply(server.params, server.stats, codec.roundtrip(h), train=False)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert there.sent_bytes > 3 * codec.payload_bytes(batches[0]) * (not compression)
        assert there.received_bytes > 3 * 4 * 10 * 4


def soon(check):
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_requests_are_counted(tmp_path):
    client, _ = make(tmp_path)
    metrics = Metrics()
    with served(tmp_path, metrics) as address, remote(address) as there:
        for batch in (4, 1, 4):
            ask(there, CODEC, features(client, batch, seed=batch))
        open_streams = lambda: metrics.registry.get_sample_value("msjax_connected_clients")  # noqa: E731
        stream = there._stub.Infer(iter(queue.Queue().get, None))
        soon(lambda: open_streams() == 1)
        stream.cancel()
        soon(lambda: open_streams() == 0)
        ask_nonsense(there)
    totals, text = metrics.totals(), metrics.text()
    for line in ("requests_total 3.0", "samples_total 9.0", "answer_seconds_count 3.0", "refused_clients_total 1.0"):
        assert f"msjax_{line}" in text
    said = f"{totals['received_bytes']:,.0f} bytes received, {totals['sent_bytes']:,.0f} sent; 1 refused"
    assert metrics.summary().startswith("3 requests of 9 samples answered in ") and metrics.summary().endswith(said)


@pytest.mark.slow
def test_u_shaped(tmp_path):
    client, server, tail = make(tmp_path, tail_cut="last")
    h = features(client, 4)
    expected, _ = server.apply(server.params, server.stats, CODEC.roundtrip(h), train=False)
    up, down = (spec_of(CODEC, like(x)) for x in (h, expected))
    with served(tmp_path) as address, remote(address) as there:
        ((found,),) = there.answers([up.encode(h)], up, down)
        dense = [spec_of(compress.Identity(), it.likes[0]) for it in (up, down)]
        ((plain,),) = there.answers([dense[0].encode(h)], *dense)  # as it was sent
    np.testing.assert_allclose(found.values, CODEC.encode(expected).values, rtol=1e-5)
    expected, _ = server.apply(server.params, server.stats, h, train=False)
    np.testing.assert_allclose(plain.values, expected, rtol=1e-5, atol=1e-6)
    logits, _ = tail.apply(tail.params, tail.stats, down.decode((found,)), train=False)
    assert logits.shape == (4, 10)


@pytest.mark.slow
def test_features_that_do_not_fit(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 2)
    with served(tmp_path) as address, remote(address) as there:
        for wrong in (h[:, 1:], h[:0], h.astype(np.float16)):
            with pytest.raises(ValueError, match=r"features must be float32\[batch"):
                ask(there, CODEC, wrong)
            assert ask(there, CODEC, h)[0].shape == (2, 10)  # and what is right is answered as before
        ask_nonsense(there)
        up, other = spec_of(CODEC, like(h)), spec_of(compress.Identity(), jax.ShapeDtypeStruct((2, 9), np.float32))
        with pytest.raises(ValueError, match=r"the server's answer is not what its run calls for: .*2, 9.*2, 10"):
            there.answers([up.encode(h)], up, other)


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
            (found,) = ask(there, compress.Identity(), h)
            expected, _ = server.apply(server.params, server.stats, h, train=False)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len(kept) == 2


@pytest.mark.slow
def test_a_message_that_is_too_long(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 300)
    assert compress.Identity().payload_bytes(h) > 1 << 20
    with served(tmp_path, max_megabytes=1) as address, remote(address) as there:
        with pytest.raises(ValueError, match="listen must be a free host:port"), served(tmp_path, listen=address):
            pass
        with pytest.raises(ValueError, match="larger than max"):
            ask(there, compress.Identity(), h)


@pytest.mark.slow
def test_who_is_too_fast_is_held_back(tmp_path):
    client, _ = make(tmp_path)
    h = features(client, 2)
    with served(tmp_path, max_messages_per_second=10) as address, remote(address) as there:
        ask(there, CODEC, h)  # compiled
        began = time.monotonic()
        ask(there, CODEC, *[h] * 19)
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
        assert next(servicer._held(iter([pb.Features()]), call, 0)) == pb.Features()
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
                with pytest.raises(ValueError, match=says):
                    there.describe()
                with pytest.raises(ValueError, match=says):
                    ask(there, CODEC, h)
        assert metrics.refused._value.get() == 6 and metrics.totals() == {"received_bytes": 0, "sent_bytes": 0}
        for token in ("alice", "bob"):
            with remote(address, token=token) as there:
                assert there.describe().run == "r"
                assert ask(there, CODEC, h)[0].shape == (2, 10)
                sent = there.sent_bytes
        assert 2 * sent <= metrics.totals()["received_bytes"] < 2 * sent + 20
    assert caplog.text.count("refused: ") == 2 and "refused: 5 calls, the last from ipv" in caplog.text


def test_a_stream_ends_once_its_token_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(reread, "SECONDS_BETWEEN_LOOKS", 0.0)
    client, _ = make(tmp_path)
    h = features(client, 2)
    spec = spec_of(CODEC, like(h))
    request = pb.Features(payload=messages.encode(spec.encode(h), spec, None))
    (tmp_path / "tokens").write_text("0 alice\n1 bob\n")
    with served(tmp_path, tokens=str(tmp_path / "tokens")) as address, remote(address, token="alice") as there:
        requests = queue.Queue()
        stream = there._stub.Infer(iter(requests.get, None), metadata=there._metadata)
        requests.put(request)
        assert next(stream).payload
        (tmp_path / "tokens").write_text("1 bob\n")
        requests.put(request)
        with pytest.raises(ValueError, match="no such token"):
            there._call(lambda: next(stream))
        requests.put(None)
        with remote(address, token="bob") as other:
            assert ask(other, CODEC, h)[0].shape == (2, 10)


def test_who_does_not_read_keeps_nobody_out(tmp_path, monkeypatch):
    """Of who has most streams, one is ended for another's."""
    client, _ = make(tmp_path)
    h, metrics = features(client, 2), Metrics()
    spec = PayloadSpec(jax.tree.structure(0), (CODEC,), (like(h),), (0,))
    request = pb.Features(payload=messages.encode(spec.encode(h), spec, None)).SerializeToString()
    (tmp_path / "tokens").write_text("0 alice\n1 bob\n")
    count, made = most_calls(STREAMS) + 4, []
    monkeypatch.setattr(inference, "FairShare", lambda most: made.append(FairShare(most)) or made[-1])

    def ask_alone(left):
        """Asks, and waits until the server has seen the end of that, too: what comes next does not depend on it."""
        ask(there, CODEC, h)
        soon(lambda: len(made[0]) == left)

    with (
        served(tmp_path, metrics, tokens=str(tmp_path / "tokens")) as address,
        remote(address, token="bob") as there,
        contextlib.ExitStack() as stack,
    ):
        ask_alone(0)
        unread(stack, address, "msjax.v2.Split/Infer", request, count, token="alice", in_turn=True)
        ask_alone(STREAMS - 1)
        streams = [there._stub.Infer(iter(queue.Queue().get, None), metadata=there._metadata) for _ in range(STREAMS)]
        soon(lambda: metrics.evicted._value.get() == count)
        for _ in streams:
            ask_alone(STREAMS - 1)
        with pytest.raises(ConnectionError, match="the server has ended the stream, as others needed its room"):
            there._call(lambda: next(streams[0]))
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
            with remote(address, tls=tls) as there, pytest.raises(ValueError, match=says):
                there.describe()
    # Someone else's server.
    theirs, mine = others.issue("localhost"), ours.issue("client2")
    with (
        served(tmp_path, tls=theirs) as address,
        remote(address, tls=mine) as there,
        pytest.raises(ValueError, match="the server's certificate: unable to get local issuer certificate"),
    ):
        there.describe()
    with pytest.raises(ValueError, match="a server checks its clients' certificates"):
        no_certificate.server()
    with pytest.raises(ValueError, match=r"tls.certificate must be a file that can be read, got 'x.pem'"):
        TlsFiles("x.pem", "x.key", "ca.pem").server()


def test_nobody_there():
    with remote("localhost:1", retry_seconds=0.2) as there:
        with pytest.raises(ConnectionError, match=r"no answer in 0\.2 s of trying: localhost:1"):
            there.describe()
        with pytest.raises(ConnectionError, match=r"no answer in 0\.2 s of trying: localhost:1"):
            ask(there, compress.Identity(), jnp.zeros((1, 2)))


class _Lost(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "the cable is out"


class _Stream:
    def __init__(self, answers):
        self._answers, self.is_open = answers, True

    def __next__(self):
        return next(self._answers)

    def cancel(self):
        self.is_open = False

    def initial_metadata(self):
        return (("msjax-run", "r"),)


def test_what_has_no_answer_is_sent_again(monkeypatch):
    """Over another stream, for as long as there is an answer at least every so many seconds."""
    monkeypatch.setattr(remote_module.time, "sleep", lambda seconds: None)
    streams, told, batches = [], [], [jnp.full((1, 2), n, jnp.float32) for n in range(5)]

    def infer(requests, metadata):
        def answers(more):
            for request in requests:
                if not more:
                    raise _Lost()
                more -= 1
                (x,) = wire.decode(request.payload[0]).payload
                outputs = spec_of(compress.Identity(), jax.ShapeDtypeStruct((1, 10), np.float32))
                payload = outputs.encode(jnp.repeat(x[:, :1], 10, axis=1))
                yield pb.Outputs(payload=messages.encode(payload, outputs, None))

        streams.append(_Stream(answers(2)))
        return streams[-1]

    with remote("localhost:1", retry_seconds=1000.0, tell=told.append) as there:
        there._stub.Infer = infer
        found = ask(there, compress.Identity(), *batches)
        assert [x[0, 0] for x in found] == [0, 1, 2, 3, 4] and len(streams) == 3
        assert len(told) == 2 and not any(stream.is_open for stream in streams)
        there._retry_seconds = 0.0
        with pytest.raises(ConnectionError, match=r"no answer in 0 s of trying: localhost:1: .*the cable is out"):
            ask(there, compress.Identity(), *batches)
    assert not streams[-1].is_open


def test_another_part_in_its_place_is_refused(tmp_path):
    client, _ = make(tmp_path)
    h, refusal = (
        features(client, 2),
        pytest.raises(ValueError, match="now has a part of another run, 'r', got 's' before"),
    )
    with served(tmp_path) as address, remote(address) as there:
        there.describe()
        assert ask(there, CODEC, h)[0].shape == (2, 10)
        there._run = "s"
        with refusal:
            ask(there, CODEC, h)
        with refusal:
            there.describe()

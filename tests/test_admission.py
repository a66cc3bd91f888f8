"""Whom a server lets in: a client's certificate is its own, and who guesses tokens is refused for a while."""

import contextlib
import dataclasses
import hashlib
import os
import ssl

import grpc
import pytest

from msjax import compress, config
from msjax.distributed.channel import ConnectionLost
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ListenOptions, ServeOptions
from msjax.distributed.rpc import admission, reread
from msjax.distributed.rpc import split_pb2 as pb
from msjax.distributed.rpc.admission import Admission, Certificates, Identity, WrongTokens, address_of, peer_of
from msjax.distributed.rpc.connection import Connection
from msjax.distributed.rpc.event_loop import run
from msjax.distributed.rpc.security import TlsFiles, Tokens
from msjax.distributed.rpc.training import TrainEndpoint, TrainServicer
from msjax.distributed.server_program import check_serve

from .authority import Authority
from .memory_network import Clock


class Call:
    """What gRPC says of a call."""

    def __init__(self, peer="ipv4:192.0.2.1:5000", token="", **auth):
        self._peer, self._token = peer, token
        self._auth = {f"x509_{name}": value for name, value in auth.items()}

    def peer(self):
        return self._peer

    def invocation_metadata(self):
        return [("authorization", f"Bearer {self._token}")] if self._token else []

    def auth_context(self):
        return self._auth


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("admission")
    (path / "tokens").write_text("0 alice\n1 bob\n")
    (path / "names").write_text("# of two\n0 client-0\n1 the second client\n")
    return path


def test_names_in_certificates(path):
    names = Certificates(str(path / "names"))
    second = Identity.of(Call(common_name=[b"the second client"]))
    assert names.refusal(second, 1) is None and names.refusal(second, None) is None
    assert names.refusal(second, 0) == "this certificate, of the second client, is not client 0's"
    assert names.refusal(second, 2) == "this certificate, of the second client, is not client 2's"
    # A common name beside others is none.
    first = Identity.of(Call(subject_alternative_name=[b"10.0.0.1", b"client-0"], common_name=[b"the second client"]))
    assert names.refusal(first, 0) is None
    assert names.refusal(first, 1) == "this certificate, of 10.0.0.1, client-0, is not client 1's"
    assert names.refusal(Identity.of(Call()), None) == "this certificate, of none, is no client's"
    # Nor is a name a fingerprint, whatever it says.
    (path / "fingerprints").write_text(f"0 sha256:{'ab' * 32}\n1 client-1\n")
    prints = Certificates(str(path / "fingerprints"))
    posing = Identity.of(Call(subject_alternative_name=[f"sha256:{'ab' * 32}".encode()]))
    assert prints.refusal(posing, 0) is not None
    assert Certificates(None).refusal(Identity(), 5) is None


def test_fingerprints_as_openssl_prints_them(path, tmp_path):
    files = Authority(tmp_path).issue("anyone")
    with open(files.certificate) as file:
        pem = file.read()
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest().upper()
    shown = ":".join(digest[i : i + 2] for i in range(0, 64, 2))
    (tmp_path / "certificates").write_text(f"0 sha256:{shown}\n")
    certificates = Certificates(str(tmp_path / "certificates"), 1)
    assert certificates.refusal(Identity.of(Call(pem_cert=[pem.encode()])), 0) is None
    assert certificates.refusal(Identity.of(Call(common_name=[shown.encode()])), 0) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0 a\n",
            "certificates must have a line of every client, or of policy.start_clients of them, got none of client 1 "
            "in",
        ),
        ("", "got none at all"),
        ("a\n", "certificates must be lines of a client's number and the name in its certificate, got line 1"),
        ("0 a\n0 b\n", "certificates must have one line a client, got another of client 0, line 2"),
        ("0 a\n1 a\n", "certificates must be another for each client, got an earlier client's in line 2"),
        ("0 a\n1 sha256:ab\n", "certificates: sha256: needs 64 hexadecimal digits, in line 2"),
    ],
)
def test_certificates_that_no_client_could_use(tmp_path, text, message):
    (tmp_path / "names").write_text(text)
    options = ServeOptions(tls=Authority(tmp_path).issue("localhost"), certificates=str(tmp_path / "names"))
    with pytest.raises(ValueError, match=message):
        check_serve(config.Config(clients=2), options)


def test_a_budget_that_does_not_fit_is_refused_before_anyone_joins():
    cfg = config.Config(clients=2, cut_bits=2.4)
    with pytest.raises(ValueError, match="codec must be an EntropyMask where cut_bits is given, got MaskEncoded"):
        check_serve(cfg, ServeOptions())
    with pytest.raises(ValueError, match=r"cut_seconds must be None without cut_bits, got 0\.5"):
        check_serve(config.Config(clients=2, cut_seconds=0.5), ServeOptions())


def test_what_data_that_are_known_by_name_would_make_fail_is_refused_before_anyone_joins():
    codec = compress.EntropyMask(signed=True)
    turns = config.Config(clients=2, mode=config.ModeConfig(kind="sequential"), update_codec=codec)
    with pytest.raises(ValueError, match=r"update_codec must be Identity\(\) or a Cast"):
        check_serve(turns, ServeOptions())
    check_serve(dataclasses.replace(turns, data=config.DataConfig("elsewhere.csv")), ServeOptions())


def test_certificates_go_with_tls(path):
    with pytest.raises(ValueError, match=r"certificates must go with tls, got '.*names' without it"):
        ListenOptions(certificates=str(path / "names")).check()
    with pytest.raises(ValueError, match="max_wrong_tokens must be an integer of at least 0, got -1"):
        ListenOptions(max_wrong_tokens=-1).check()


@contextlib.contextmanager
def listening(tls, **options):
    endpoint = TrainEndpoint(ListenOptions(listen="localhost:0", tls=tls), Metrics(), streams=1)
    endpoint.start(TrainServicer(metrics=endpoint.metrics, **options))
    try:
        yield str(endpoint.address), endpoint.metrics
    finally:
        endpoint.close()


def answer_to(address, client, tls, token=None, wait=20):
    connection = Connection(address, tls, token)
    try:
        connection.send(pb.FromClient(hello=pb.Hello(protocol=5, client=client)))
        return connection.receive(wait)
    except ConnectionLost as lost:
        return lost
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("code", "said", "reason"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "no such token", "no such token"),
        (grpc.StatusCode.OK, "", "closed the stream"),
    ],
)
def test_a_server_that_ends_the_stream_while_a_client_writes_is_understood(code, said, reason):
    async def end(_, context):
        context.set_code(code)
        context.set_details(said)

    async def start():
        server = grpc.aio.server()
        name = pb.DESCRIPTOR.services_by_name["Split"].full_name
        server.add_registered_method_handlers(name, {"Train": grpc.stream_stream_rpc_method_handler(end)})
        port = server.add_insecure_port("localhost:0")
        await server.start()
        return server, f"localhost:{port}"

    server, address = run(start())
    for _ in range(30):  # half of them would meet the race
        connection = Connection(address, TlsFiles(), None)
        for _ in range(3):
            connection.send(pb.FromClient(hello=pb.Hello(protocol=5, client=0)))
        with pytest.raises(ConnectionLost) as lost:
            connection.receive(20)
        connection.close()
        assert reason in str(lost.value) and lost.value.final == (code is not grpc.StatusCode.OK)
    run(server.stop(None))


def test_a_client_cannot_use_anothers_certificate(path, tmp_path):
    authority = Authority(tmp_path)
    first, third = authority.issue("client-0"), authority.issue("client-2")
    certificates = Certificates(str(path / "names"))
    with listening(authority.issue("localhost"), tokens=Tokens(None), certificates=certificates) as (address, metrics):
        let_in = answer_to(address, 0, first, wait=0.5)  # where no coordinator is
        assert "no answer within" in str(let_in)
        lost = answer_to(address, 1, first)
        assert str(lost) == "this certificate, of client-0, is not client 1's" and lost.final
        lost = answer_to(address, 0, third)
        assert str(lost) == "this certificate, of client-2, is no client's" and lost.final
        assert metrics.refused._value.get() == 2


@pytest.fixture
def looks_always(monkeypatch):
    """At files that may have changed; else once a second."""
    monkeypatch.setattr(reread, "SECONDS_BETWEEN_LOOKS", 0.0)


@pytest.mark.usefixtures("looks_always")
def test_files_of_tokens_and_certificates_are_read_anew(tmp_path, caplog):
    """A client whose line is gone is not let in again, and its stream ends once it says something."""
    caplog.set_level("INFO", "msjax")
    (tmp_path / "tokens").write_text("0 alice\n1 bob\n")
    (tmp_path / "names").write_text("0 client-0\n")
    tokens, names = Tokens(str(tmp_path / "tokens"), 2), Certificates(str(tmp_path / "names"))
    it = Admission(tokens, names)
    alice, bob = (Call(token=token, common_name=[f"client-{n}".encode()]) for n, token in enumerate(("alice", "bob")))
    assert it.version == 0 and it.refusal(alice, 0) is None and it.refusal(bob, 1).reason.startswith("this certificate")
    (tmp_path / "names").write_text("0 client-0\n1 client-1\n")
    assert it.version == 1 and it.refusal(bob, 1) is None
    (tmp_path / "tokens").write_text("1 bob\n")  # and none need be of every client
    assert it.version == 2 and it.refusal(bob, 1) is None
    for _ in range(20):  # who was let in before does not guess
        assert it.refusal(alice, 0, again=True) is not None
    assert it.refusal(alice, 0).reason == "no such token for client 0" and it.refusal(alice).reason == "no such token"
    assert caplog.text.count("was changed, and read anew") == 2
    for wrong in ("", "1 bob\n1 bob\n", None):  # as while it is written
        if wrong is None:
            (tmp_path / "tokens").unlink()
        else:
            (tmp_path / "tokens").write_text(wrong)
        assert it.version == 2 and it.refusal(bob, 1) is None and it.refusal(bob, 1) is None
    assert caplog.text.count("what was read of tokens before stays: tokens must") == 3
    (tmp_path / "tokens").write_text("0 alice\n")
    assert it.version == 3 and it.refusal(alice, 0) is None and it.refusal(bob, 1) is not None


@pytest.mark.usefixtures("looks_always")
def test_a_server_takes_away_access_and_reads_its_certificate_while_it_runs(tmp_path):
    folders = [tmp_path / name for name in ("old", "new")]
    for folder in folders:
        folder.mkdir()
    old, new = map(Authority, folders)
    (tmp_path / "tokens").write_text("0 alice\n1 bob\n")
    tls, first, second = old.issue("localhost"), old.issue("client-0"), new.issue("client-0")
    with listening(tls, tokens=Tokens(str(tmp_path / "tokens"))) as (address, metrics):
        connection = Connection(address, first, "alice")
        connection.send(pb.FromClient(hello=pb.Hello(protocol=5, client=0)))
        with pytest.raises(ConnectionLost, match="no answer within"):  # let in, where no coordinator is
            connection.receive(0.5)
        (tmp_path / "tokens").write_text("1 bob\n")
        connection.send(pb.FromClient(goodbye=pb.Goodbye()))
        with pytest.raises(ConnectionLost, match="no such token for client 0") as lost:
            connection.receive(20)
        connection.close()
        assert lost.value.final and metrics.refused._value.get() == 1
        renewed = new.issue("localhost")
        for file, other in zip(dataclasses.astuple(tls), dataclasses.astuple(renewed), strict=True):
            os.replace(other, file)
        second = dataclasses.replace(second, authority=tls.authority)
        assert "no answer within" in str(answer_to(address, 1, second, "bob", wait=0.5))


def test_who_guesses_is_refused_for_a_minute(path):
    clock, said = Clock(), []
    it = Admission(Tokens(str(path / "tokens")), wrong_tokens=WrongTokens(3, 60.0, clock, said.append))
    guess, good = Call(token="x"), Call(token="alice")
    other = Call("ipv4:192.0.2.2:5000", "alice")
    for second in (0.0, 1.0):
        clock.now = second
        assert it.refusal(guess).reason == "no such token"
    assert it.refusal(good) is None and not said
    clock.now = 2.0
    assert it.refusal(good, 1).reason == "no such token for client 1"  # that is a wrong one, too
    assert said == ["192.0.2.1: 3 wrong tokens within 60 s; it is refused for 60 s"]
    for call in (guess, good):
        refusal = it.refusal(call)
        assert refusal.reason == "too many wrong tokens have come from this address; it may try again later"
        assert refusal.is_told and refusal.code is grpc.StatusCode.UNAVAILABLE  # so that a client tries again
    assert it.refusal(other) is None
    clock.now = 62.1
    assert it.refusal(other) is None
    assert said[1:] == ["192.0.2.1 may try tokens again; 2 calls of it were refused meanwhile"]
    assert it.refusal(good) is None and it.refusal(guess).reason == "no such token"
    assert len(said) == 2


def test_wrong_tokens_that_come_seldom_are_no_guessing():
    clock, said = Clock(), []
    it = WrongTokens(3, 60.0, clock, said.append)
    for n in range(20):
        clock.now = 31.0 * n
        it.count("a")
        assert not it.refuses("a")
    assert not said


def test_no_limit():
    it = WrongTokens(0)
    for _ in range(100):
        it.count("a")
    assert not it.refuses("a") and not it._found


def test_addresses_that_are_remembered_are_few(monkeypatch):
    monkeypatch.setattr(admission, "_MOST_ADDRESSES", 5)
    it = WrongTokens(2, 60.0, Clock(), lambda line: None)
    for n in range(100):
        it.count(f"{n}")
        it.count(f"{n}")
    assert len(it._found) == len(it._refused) == 5
    assert it.refuses("99") and it.refuses("95") and not it.refuses("94")


def test_a_token_that_nobody_checks_makes_no_caller_of_its_own(path):
    calls = [Call(token=token) for token in ("alice", "made up", "")]
    unchecked, checked = (Admission(Tokens(file)) for file in (None, str(path / "tokens")))
    assert [unchecked.caller_of(call) for call in calls] == ["192.0.2.1"] * 3
    assert [checked.caller_of(call) for call in calls[::2]] == ["token alice", "192.0.2.1"]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:[2001:db8:1:2:3::4]:5000", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2:3::4%5D:5000", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.1]:5000", "192.0.2.1"),
        ("ipv6:[::1]:5000", "::1"),
        ("ipv6:[fe80::1%25eth0]:5000", "fe80::/64"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
    ],
)
def test_addresses_of_peers(peer, address):
    assert address_of(peer) == address
    assert "%5" not in peer_of(Call(peer))


def test_over_grpc(path):
    tokens, wrong = Tokens(str(path / "tokens")), WrongTokens(2, 60.0, Clock(), lambda line: None)
    with listening(TlsFiles(), tokens=tokens, wrong_tokens=wrong) as (address, metrics):
        for _ in range(2):
            lost = answer_to(address, 0, TlsFiles(), "x")
            assert str(lost) == "no such token" and lost.final
        lost = answer_to(address, 0, TlsFiles(), "alice")
        assert "too many wrong tokens have come from this address" in str(lost) and not lost.final
        assert metrics.refused._value.get() == 3

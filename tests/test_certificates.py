"""What is wrong with certificates, said at once by both ends."""

import contextlib
import datetime
import logging
import pathlib
import re
import shutil
import subprocess
import time

import pytest
import trustme

from msjax.distributed.channel import ConnectionLost
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ClientOptions, ListenOptions
from msjax.distributed.rpc.connection import Connection
from msjax.distributed.rpc.security import TlsFiles, Tokens, read_token
from msjax.distributed.rpc.training import TrainEndpoint, TrainServicer

from .authority import Authority

PAST, FUTURE = datetime.datetime(2020, 1, 1), datetime.datetime(2100, 1, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def files(path):
    """The files of both ends, good and bad, by name; the bad ones are of "localhost", too."""
    ours, found = Authority(path), {}
    others = path / "others"
    others.mkdir()
    found["server"], found["client"] = ours.issue("localhost"), ours.issue("client")
    found["other"] = Authority(others).issue("client")
    found["foreign"] = TlsFiles(found["other"].certificate, found["other"].key, found["client"].authority)
    found["late"], found["elsewhere"] = ours.issue("late", not_after=PAST), ours.issue("elsewhere")
    (path / "old").mkdir()
    old = Authority(path / "old")
    found["expired"] = old.issue("localhost", not_after=PAST)
    found["of expired"] = TlsFiles(found["client"].certificate, found["client"].key, found["expired"].authority)
    found["no certificate"] = TlsFiles(authority=found["server"].authority)
    found["none"] = TlsFiles()
    return found


@contextlib.contextmanager
def listening(tls):
    endpoint = TrainEndpoint(ListenOptions(listen="localhost:0", tls=tls), Metrics(), streams=1)
    endpoint.start(TrainServicer(Tokens(None), Metrics()))
    try:
        yield str(endpoint.address)
    finally:
        endpoint.close()


@pytest.mark.parametrize(
    ("server", "client", "says"),
    [
        ("server", "none", "the server speaks TLS: give tls its certificate, key and authority"),
        ("none", "client", "the server does not speak TLS"),
        ("server", "no certificate", "the server wants a certificate: give tls.certificate and tls.key"),
        ("server", "foreign", "the server does not take this end's tls.certificate '.*': it is of no authority that"),
        ("server", "late", "the server does not take this end's tls.certificate '.*': certificate has expired"),
        ("server", "other", "the server's certificate: unable to get local issuer certificate"),
        ("expired", "of expired", "the server's certificate: certificate has expired"),
        (
            "elsewhere",
            "client",
            "the server's certificate: Hostname mismatch, certificate is not valid for 'localhost'",
        ),
    ],
)
def test_a_client_hears_at_once_what_is_wrong(files, server, client, says):
    with listening(files[server]) as address:
        connection = Connection(address, files[client], None)
        try:
            with pytest.raises(ConnectionLost, match=f"{address}: {says}") as lost:
                connection.receive(20)
            assert lost.value.final
        finally:
            connection.close()


def test_where_nothing_is_wrong_nothing_is_said(files):
    with listening(files["server"]) as address:
        assert files["client"].fault_with(address) is None
    assert files["client"].fault_with(address) is None  # nobody is there any more
    with listening(TlsFiles()) as address:
        assert TlsFiles().fault_with(address) is None


def test_an_end_knows_what_is_wrong_with_its_own_certificate(files, path, caplog):
    for end, role in (("server", "server"), ("client", "client"), ("foreign", "client")):
        own = files[end].own(role)
        assert own.fault is None and own.expires_at > time.time() and files[end].warning(role, time.time()) is None
    for end in ("none", "no certificate"):
        assert files[end].own("client") == (None, None) and files[end].warning("client", time.time()) is None
    day = datetime.datetime(2030, 2, 3, 4, 5, tzinfo=datetime.UTC)
    soon = Authority(path).issue("soon", not_after=day)
    for role in ("server", "client"):
        assert soon.own(role).expires_at == day.timestamp()
        assert soon.warning(role, day.timestamp() - 31 * 86_400) is None
        warning = soon.warning(role, day.timestamp() - 12 * 86_400)
        assert re.fullmatch(
            "tls.certificate '.*soon.pem' expires on 2030-02-03 04:05 UTC, in 12.0 days: put a new one there", warning
        )
    early = Authority(path).issue("early", not_before=FUTURE, not_after=FUTURE + datetime.timedelta(days=1))
    for role in ("server", "client"):
        assert re.fullmatch("tls.certificate '.*late.pem': certificate has expired", files["late"].own(role).fault)
        assert early.own(role).fault.endswith("certificate is not yet valid")
    with caplog.at_level(logging.WARNING, "msjax"), listening(files["expired"]):
        assert "localhost.pem': certificate has expired; clients will not take it" in caplog.text
    with caplog.at_level(logging.WARNING, "msjax"):
        ClientProgram(ClientOptions(client_id=0, tls=files["late"], state=str(path / "state")))
    assert "late.pem': certificate has expired; the server will not take it" in caplog.text


def test_a_server_beyond_this_machine_says_who_can_call_and_when_its_certificate_expires(files, tmp_path, caplog):
    (tmp_path / "tokens").write_text("0 alice\n")
    said = {}
    for name, tls, tokens in (("tls", files["server"], None), ("open", TlsFiles(), None), ("tokens", TlsFiles(), 1)):
        caplog.clear()
        tokens = tokens and str(tmp_path / "tokens")
        options = ListenOptions(listen="0.0.0.0:0", tls=tls, insecure=not tls, tokens=tokens)
        endpoint = TrainEndpoint(options, Metrics(), streams=1)
        endpoint.close()
        said[name] = (
            caplog.text,
            [line for line in endpoint.metrics.text().splitlines() if line.startswith("msjax_certificate_expiry")],
        )
    assert "whoever has a certificate of tls.authority can call as any client: tokens or" in said["tls"][0]
    assert "whoever reaches this port can call as any client" in said["open"][0] and "whoever" not in said["tokens"][0]
    expires_at = float(said["tls"][1][0].removeprefix("msjax_certificate_expiry_timestamp_seconds "))
    assert expires_at == files["server"].own("server").expires_at and not said["open"][1] and not said["tokens"][1]


def test_files_that_do_not_fit_are_named(files, path):
    server, client = files["server"], files["client"]
    text = pathlib.Path(client.key).read_text()
    (path / "nonsense.pem").write_text("nonsense")
    (path / "empty.pem").write_text("")
    (path / "cut.key").write_text(text[: len(text) // 2])
    locked = trustme.CA().issue_cert("x").private_key_pem.bytes()
    (path / "locked.key").write_bytes(locked.replace(b"KEY-----\n", b"KEY-----\nProc-Type: 4,ENCRYPTED\n", 1))
    nonsense, empty, cut, locked = (str(path / n) for n in ("nonsense.pem", "empty.pem", "cut.key", "locked.key"))
    for tls, says in (
        (TlsFiles(server.certificate, client.key, server.authority), "tls.key must be the key of tls.certificate"),
        (TlsFiles(nonsense, client.key, server.authority), "tls.certificate must be certificates in PEM format"),
        (TlsFiles(client.key, client.key, server.authority), "tls.certificate must be certificates in PEM format"),
        (
            TlsFiles(client.certificate, client.key, empty),
            "tls.authority must be certificates in PEM .*empty",
        ),
        (TlsFiles(client.certificate, cut, server.authority), "tls.key must be a private key in PEM format.*cut.key"),
        (TlsFiles(client.certificate, locked, server.authority), "tls.key must be a private key in PEM .*locked.key"),
        (TlsFiles(client.certificate, client.certificate, server.authority), "tls.key must be a private key in PEM"),
    ):
        for check in (tls.server, tls.client, ListenOptions(tls=tls).check):
            with pytest.raises(ValueError, match=says):
                check()
        with pytest.raises(ValueError, match=says):
            ClientProgram(ClientOptions(client_id=0, tls=tls, state=str(path / "state")))


def test_files_that_are_being_renewed_are_tried_again(files, path):
    for name in ("certificate", "key"):
        (path / f"renewed.{name}").write_bytes(pathlib.Path(getattr(files["client"], name)).read_bytes())
    tls = TlsFiles(str(path / "renewed.certificate"), str(path / "renewed.key"), files["client"].authority)
    program = ClientProgram(ClientOptions(client_id=0, tls=tls, state=str(path / "state")))
    (path / "renewed.key").write_text("")
    with pytest.raises(ConnectionLost, match=r"tls\.key must be a private key in PEM format") as lost:
        program.connect()
    assert not lost.value.final


@pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("bash")), reason="needs openssl and bash")
def test_the_recipe_of_the_documentation_makes_certificates_and_tokens_that_work(tmp_path):
    page = (pathlib.Path(__file__).parent.parent / "docs" / "security.md").read_text()
    recipes = [block for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL) if "openssl" in block]
    assert len(recipes) == 2  # all at first, and one more client
    recipe = "".join(recipes).replace("host.example.org", "localhost").replace("rsa:3072", "rsa:2048")
    subprocess.run(["bash", "-ec", recipe], cwd=tmp_path, check=True, capture_output=True)
    server, client = (
        TlsFiles(*(str(tmp_path / file) for file in (f"{name}.pem", f"{name}.key", "ca.pem")))
        for name in ("server", "c0")
    )
    assert server.own("server").fault is None and client.own("client").fault is None
    with listening(server) as address:
        assert client.fault_with(address) is None
        assert TlsFiles(authority=client.authority).fault_with(address) is not None
    tokens = Tokens(str(tmp_path / "tokens.txt"), 3)
    given = [read_token("token_file", str(tmp_path / f"c{n}.token")) for n in range(3)]
    for client in range(3):
        assert [n for n, token in enumerate(given) if tokens.accept(client, token)] == [client]

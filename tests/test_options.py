"""What the network's ends refuse before they open anything: addresses, ports, tokens, files of TLS."""

import contextlib
import dataclasses
import re
import socket
import urllib.request

import pytest

from msjax import build, config, models
from msjax.cli import main as cli
from msjax.cli import serve
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.membership import Policy
from msjax.distributed.metrics import Metrics
from msjax.distributed.options import ClientOptions, ListenOptions, ServeOptions
from msjax.distributed.remote import RemoteServer
from msjax.distributed.rpc.addresses import parse_address
from msjax.distributed.rpc.connection import Connection
from msjax.distributed.rpc.security import TlsFiles, Tokens, check_plaintext
from msjax.distributed.rpc.server import Endpoint
from msjax.distributed.server_program import check_serve


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


def test_a_port_must_be_free_at_all_addresses_of_a_name(monkeypatch):
    """gRPC would take those that it gets, and leave clients to reach one server or the other."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", port))
        found = [free, (*free[:4], ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"got 'localhost:{port}': Address already in use, 127.0.0.1"):
                Endpoint(ListenOptions(listen=f"localhost:{port}"), Metrics(), streams=1)
            found.reverse()


@pytest.mark.parametrize(
    ("address", "why"), [("no.such.host.invalid:50300", ""), ("192.0.2.1:50300", "Cannot assign requested address")]
)
def test_an_address_of_another_machine(address, why):
    with pytest.raises(ValueError, match=f"listen must be a free host:port of this machine, got '{address}': {why}"):
        Endpoint(ListenOptions(listen=address, insecure=True), Metrics(), streams=1)


def test_ports_of_ones_own_are_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"metrics_port must be a free port, got {port}: Address already in use"):
            Endpoint(ListenOptions(listen="localhost:0", metrics_port=port), Metrics(), streams=1)
        with pytest.raises(ValueError, match=f"listen .*, got '127.0.0.1:{port}': Address already in use"):
            Endpoint(ListenOptions(listen=f"127.0.0.1:{port}"), Metrics(), streams=1)
    endpoint = Endpoint(ListenOptions(listen="localhost:0", metrics_port=0), Metrics(), streams=1)
    try:
        said = re.fullmatch(r"localhost:(\d+), metrics at http://127.0.0.1:(\d+)/metrics", str(endpoint))
        assert (endpoint.address.port, endpoint.metrics_port) == tuple(map(int, said.groups()))
        assert all(port != "0" for port in said.groups())
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.metrics_port}/metrics", timeout=30) as answer:
            assert b"msjax_refused_clients_total" in answer.read()
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", endpoint.metrics_port), timeout=30):
            pass  # it is bound to one address of this machine
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
    remote = RemoteServer("localhost:1", retry_seconds=0.3, tell=told.append)
    try:
        with pytest.raises(ConnectionError, match=r"no answer in 0\.3 s of trying: localhost:1: .*Connection refused"):
            remote.describe()
    finally:
        remote.close()
    assert len(told) == 1 and re.search("localhost:1: .*; trying again for up to 0 s", told[0])
    with silent() as address:
        remote = RemoteServer(address, retry_seconds=0.2)
        try:
            with pytest.raises(ConnectionError, match=f"no answer in 0.2 s of trying: {address}: nothing answers"):
                remote.describe()
        finally:
            remote.close()


def test_a_port_that_is_taken_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with silent() as address:
        port = address.partition(":")[2]
        for option, name in ((f"--listen={address}", "--listen"), (f"--metrics-port={port}", "--metrics-port")):
            assert cli.run("serve", ["--listen=localhost:0", option]) == 2
            assert f"msjax serve: {name} must be a free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_messages_have_a_size_that_grpc_can_count():
    for size in (0, 2048, 1 << 40):
        with pytest.raises(ValueError, match=f"max_megabytes must be in 1..2047, got {size}"):
            ListenOptions(max_megabytes=size).check()
    Endpoint(ListenOptions(listen="localhost:0", max_megabytes=2047), Metrics(), streams=1).close()


@pytest.mark.parametrize("name", [name for name in models.NAMES if name not in ("mlp", "transformer")])
def test_layers_do_not_depend_on_the_shape(name):
    """So a server knows before there are clients whether there is such a cut."""
    found = [
        models.build(name, input_shape=shape, num_classes=classes)
        for shape, classes in (((32, 32, 3), 10), ((64, 64, 3), 2), ((224, 224, 1), 1000))
    ]
    assert len({(tuple(block.layer for block in it.blocks), it.named_cuts) for it in found}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cut": "nosuch"}, "model.cut must be one of .* for convnet, got 'nosuch'"),
        ({"cut": "99"}, "model.cut must be one of .*, got 99"),
        ({"name": "lenet"}, "model.name must be one of .*, got 'lenet'"),
        ({"width": 0.0}, "model.width must be above 0"),
        ({"activation": "relu6"}, "model.activation must be one of"),
        ({"shortcut": "zero_padding"}, 'model.shortcut must be "projection" for convnet'),
        ({"tail_cut": "nosuch"}, "mode.tail_cut must be one of .*, got 'nosuch'"),
        ({"tail_cut": "shallow"}, "mode.tail_cut must be behind cut 'medium', got 'shallow'"),
        ({"name": "mlp", "cut": "5"}, "model.cut must be one of .* for mlp, got 5"),
    ],
)
def test_a_server_knows_that_there_is_no_such_model_or_cut(fields, message):
    mode = config.ModeConfig(tail_cut=fields.pop("tail_cut", None))
    with pytest.raises(ValueError, match=message):
        check_serve(config.Config(model=config.ModelConfig(**fields), mode=mode), ServeOptions())


def test_models_of_any_data_can_be_served():
    for name in models.NAMES:
        model, own = config.ModelConfig(name=name, cut="shallow"), config.DataConfig("of_the_clients.csv")
        check_serve(config.Config(model=model, data=own), ServeOptions())
    with pytest.raises(ValueError, match="must have sides of at least 32 for vgg19, got"):  # of digits
        check_serve(config.Config(model=config.ModelConfig("vgg19", cut="shallow")), ServeOptions())


def test_tokens_file(tmp_path, caplog):
    path = tmp_path / "tokens"
    for line in ("alice", "x alice", "-1 alice", "٣ alice", "1 "):
        path.write_text(f"0 bob\n{line}\n")
        with pytest.raises(ValueError, match="lines of a client's number and its token, got line 2"):
            Tokens(str(path))
    for wrong in ("sha256:", "sha256:zz", "sha256:" + "a" * 63):
        path.write_text(f"0 {wrong}")
        with pytest.raises(ValueError, match="64 hexadecimal digits, in line 1"):
            Tokens(str(path))
    path.write_text("0 sha256:81B637D8FCD2C6DA6359E6963113A1170DE795E4B725B84D1E0B4CFD9EC58CE9")
    assert Tokens(str(path)).accept(0, "bob") and not Tokens(str(path)).accept(0, "bo")
    path.write_text("0 bob\n")
    tokens = Tokens(str(path))
    assert tokens.accept(0, "bob") and not tokens.accept(1, "bob") and not tokens.accept(0, "")
    path.write_text("0 bob\n2 eve\n")
    tokens = Tokens(str(path), 4, least=2)  # as where access was taken away, and training goes on
    assert tokens.accept(2, "eve") and not any(tokens.accept(c, t) for c in (1, 3) for t in (None, "", "bob", "eve"))
    assert "has no line of client 1, 3, which cannot take part" in caplog.text
    with pytest.raises(ValueError, match=r"got none of client 1, 3 in"):
        Tokens(str(path), 4, least=3)
    assert Tokens(None).accept(5, None) and Tokens(None).accept_any(None)


OF_WHOM = "a line of every client, or of policy.start_clients of them"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tokens must have a line of a client, got none at all"),
        ("# nobody\n", "got none at all"),
        ("0 bob\n2 eve\n", f"tokens must have {OF_WHOM}, got none of client 1"),
        ("0 bob\n1 eve\n0 alice\n", "tokens must have one line a client, got another of client 0, line 3"),
        ("0 bob\n00 alice\n", "tokens must have one line a client, got another of client 0, line 2"),
        ("0 bob\n1 bob\n", "tokens must be another for each client, got an earlier client's in line 2"),
        ("0 bob\n1 s\u00e9cret\n", "tokens: the token in line 2 .* printable ASCII characters, got others"),
        ("0 bob\n1 a\tb\n", "printable ASCII characters, got others"),
        (f"0 {'a' * 1025}\n", "1..1024 printable ASCII characters, got 1025 characters"),
    ],
)
def test_tokens_that_no_client_could_use(tmp_path, text, message):
    path = tmp_path / "tokens"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        check_serve(config.Config(clients=2), ServeOptions(tokens=str(path)))
    assert not any(secret in str(error.value) for secret in ("alice", "cret", "aaaa"))
    if "none of" not in message:
        with pytest.raises(ValueError, match=message):
            ListenOptions(tokens=str(path)).check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("s\u00e9cret\n".encode(), "the token in token_file .*token' must be one line of 1..1024 printable ASCII"),
        (b"", "printable ASCII characters, got 0 characters"),
        (b" \n", "printable ASCII characters, got 0 characters"),
        (b"one\ntwo\n", "token_file must have one line, the token, got .* with 2"),
        (b"\xff\xfe", "token_file must be a file of text"),
    ],
)
def test_a_token_that_cannot_be_sent(tmp_path, content, message):
    (tmp_path / "token").write_bytes(content)
    options = ClientOptions(client_id=0, token_file=str(tmp_path / "token"), state=str(tmp_path / "state"))
    with pytest.raises(ValueError, match=message) as error:
        ClientProgram(options)
    assert "cret" not in str(error.value)


def test_a_token_that_grpc_does_not_carry_is_refused_at_once():
    for token in ("s\u00e9cret", "one\ntwo"):
        for connect in (
            lambda token=token: Connection("localhost:1", TlsFiles(), token),
            lambda token=token: RemoteServer("localhost:1", token=token),
        ):
            with pytest.raises(ValueError, match=r"token must be one line of 1\.\.1024 printable ASCII"):
                connect()


def test_a_token_is_what_stands_in_its_file(tmp_path):
    for text in ("alice", " alice\r\n", "\ufeffalice\n"):
        (tmp_path / "token").write_text(text, encoding="utf-8", newline="")
        assert ClientOptions(client_id=0, token_file=str(tmp_path / "token")).token() == "alice"


def test_more_clients_than_there_are_cannot_be_waited_for():
    policy = Policy(stragglers="drop", min_clients=3)
    with pytest.raises(ValueError, match=r"policy.min_clients must be in 1\.\.2, the number of clients, got 3"):
        check_serve(config.Config(clients=2), ServeOptions(policy=policy))


def test_a_batch_larger_than_a_share_is_said():
    said = build.batch_of_small_share(config.Config(batch_size=256), 144)
    assert said == "batch_size is 256, but a client has 144 samples an epoch: its batches have 144"
    assert build.batch_of_small_share(config.Config(batch_size=144), 144) is None


def test_a_server_that_goes_on_has_the_options_that_it_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    had = []

    def program(cfg, options, folder, *, endpoint):
        had.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(serve, "ServerProgram", program)
    first = [
        "--listen",
        "localhost:0",
        "--checkpoint-steps",
        "7",
        "--policy.stragglers",
        "drop",
        "--compression",
        "all",
    ]
    for arguments in (
        [*first, "--clients", "2", "--out", ".", "--name", "a"],
        ["--resume", "a"],
        ["--resume", "a", "--checkpoint-steps", "3"],
        ["--resume", "a"],
    ):
        assert cli.run("serve", arguments) == 2
    assert cli.run("serve", ["--clients-per-group", "1"]) == 2 and len(had) == 4
    drop = ServeOptions("localhost:0", checkpoint_steps=7, policy=Policy(stragglers="drop"), compression="all")
    again = dataclasses.replace(drop, checkpoint_steps=3)
    assert had == [drop, drop, again, again]


def test_the_files_of_a_server_that_goes_on_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ServeOptions(tokens="tokens", tls=TlsFiles(key="a/key.pem")).write(tmp_path / "serve.json")
    known = ServeOptions.read(tmp_path / "serve.json")
    assert (known.tokens, known.tls.key, known.certificates) == (f"{tmp_path}/tokens", f"{tmp_path}/a/key.pem", None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("serve", "--listen", "0.0.0.0:0"), "is not this machine: give tls its certificate"),
        (("serve", "--clients", "0"), "clients must be at least 1, got 0"),
        (("serve", "--max-megabytes", "65537"), "--max-megabytes must be in 1..65536, got 65537"),
        (("serve", "--model.cut", "nosuch"), "model.cut must be one of"),
        (("serve", "--tokens", "none"), "No such file"),
        (("serve", "--listen", "localhost:port"), "listen must be host:port with a port in 0..65535"),
        (("serve", "--metrics-port", "99999"), "--metrics-port must be in 0..65535, got 99999"),
        (
            ("client", "--client-id", "0", "--server", "localhost:99999"),
            "server must be host:port with a port",
        ),
        (("serve", "--checkpoint-steps", "0"), "--checkpoint-steps must be at least 1, got 0"),
        (("serve", "--policy.min-clients", "0"), "--policy.min-clients must be at least 1, got 0"),
        (("client", "--client-id", "-1"), "--client-id must be at least 0, got -1"),
        (("client", "--client-id", "0", "--tls.certificate", "none"), "a certificate and its key together"),
        (("serve", "--part", "none"), "No such file"),
        (("client", "--client-id", "0", "--server", "example.org:1"), "is not this machine: give tls its certificate"),
        (("client", "--client-id", "0", "--token-file", "none"), "No such file"),
        (("client",), "client-id"),
        (("eval", "none", "--server", "localhost:1"), "No such file"),
    ],
)
def test_bad_options(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments[0], list(arguments[1:])) == 2
    said = capsys.readouterr()
    assert message in said.err + said.out and "Traceback" not in said.err
    assert not list(tmp_path.iterdir())

"""The commands as users start them, in processes of their own: killed at any point, they end with the same numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from msjax import _commands, _serving, assemble, config, halves, parties
from msjax.transport.options import ClientOptions

MSJAX = (sys.executable, "-c", "from msjax.cli import main; main()")
SECONDS = 240
RUN = ("--model.width", "0.5", "--clients", "2", "--batch-size", "48", "--epochs", "10", "--checkpoint-steps", "10")


class Shell:
    """Starts the commands in a folder, and kills what is left of them."""

    def __init__(self, path, cache):
        self._path, self._cache, self._started = path, cache, []
        with socket.socket() as s:
            s.bind(("localhost", 0))
            self.address = f"localhost:{s.getsockname()[1]}"

    def start(self, name, *arguments):
        # Later processes need not compile again.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self._cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with (self._path / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                (*MSJAX, *arguments), cwd=self._path, env=os.environ | cache, stdout=log, stderr=subprocess.STDOUT
            )
        self._started.append(process)
        return process

    def serve(self, *arguments):
        return self.start("serve", "serve", *arguments, "--listen", self.address)

    def client(self, number):
        """The second one encodes with NumPy, which makes no difference."""
        where = ("--server", self.address, "--state", f"client{number}", "--encoder", ("jax", "numpy")[number])
        return self.start(f"client{number}", "client", "--number", str(number), *where)

    def wait_for_checkpoint(self, folder, step):
        """Until there is one of this step or a later one; the run must still be under way."""
        deadline = time.monotonic() + SECONDS
        while not any(p.name.isdecimal() and int(p.name) >= step for p in folder.glob("checkpoints/*")):
            assert time.monotonic() < deadline, self.logs()
            assert not (folder / "summary.json").exists()
            time.sleep(0.01)

    def logs(self):
        return "\n".join(f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(self._path.glob("*.log")))

    def wait(self, *processes, status=0):
        for process in processes:
            assert process.wait(SECONDS) == status, self.logs()

    def close(self):
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where all tests here keep compiled programs: most run the same ones."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def shell(tmp_path, compiled):
    it = Shell(tmp_path, compiled)
    yield it
    it.close()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def expected(path):
    """The states of server and clients at the end, from one calm program."""
    cfg = config.load(path / "runs/run/config.json")
    taking_part = [_serving.TakingPart(ClientOptions(number=n, state=str(path / "x"))) for n in (0, 1)]
    own = [part._load(cfg) for part in taking_part]
    clients = [part._build(cfg, own[0].samples, own[0].test_samples) for part in taking_part]
    parts = assemble.assemble(cfg, taking_part[0]._info, samples=own[0].samples, test_samples=own[0].test_samples)
    server = parties.Server(parts.plan, parts.shapes(), parts.programs(cfg.seed), parts.server)
    for exchange in parties.run(parts.plan, server, clients):
        if exchange.step == parts.plan.total_steps - 1 - parts.plan.epoch_steps:
            server.train = server.test = parties.NONE
    return server, clients


def test_killed_processes_end_like_others(tmp_path, shell):
    run = tmp_path / "runs/run"
    server, clients = shell.serve(*RUN, "--name", "run"), [shell.client(0), shell.client(1)]
    shell.wait_for_checkpoint(run, 20)
    kill(clients[1])
    clients[1] = shell.client(1)
    shell.wait_for_checkpoint(run, 50)
    kill(server)
    server = shell.serve("--resume", str(run), "--checkpoint-steps", "10")
    shell.wait_for_checkpoint(run, 90)
    for process in (server, *clients):
        kill(process)
    server, clients = shell.serve("--resume", str(run)), [shell.client(0), shell.client(1)]
    shell.wait(server, *clients)
    shell.wait(shell.serve("--resume", str(run)), status=2)
    assert "must be a run that is not finished" in (tmp_path / "serve.log").read_text()

    server, clients = expected(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train"] == server.train.means() and summary["test"] == server.test.means()
    files = (run / "server", tmp_path / "client0/client", tmp_path / "client1/client")
    for file, state in zip(files, (server.state, clients[0].state, clients[1].state), strict=True):
        half = halves.load(file.with_suffix(".safetensors"))
        for ours, theirs in zip(
            jax.tree.leaves((state.params, state.stats)), jax.tree.leaves((half.params, half.stats)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_train_serve_and_evaluate(tmp_path, shell):
    """The halves of `msjax train`, apart again, test as they did together; signals end what serves."""
    options = ("--model.width", "0.5", "--clients", "2", "--epochs", "1", "--no-compare", "--out", ".")
    shell.wait(shell.start("train", "train", *options, "--name", "run"))
    expected = json.loads((tmp_path / "run/summary.json").read_text())["test"]
    server = shell.serve("--half", "run/server.safetensors")
    command = (*MSJAX, "eval", "run/client.safetensors", "--server", shell.address)
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=SECONDS, text=True)
    assert found.returncode == 0, found.stderr
    found = json.loads(found.stdout)
    # Convolutions of another batch size may differ in the last bits.
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert found["samples"] == 360 and found["sent_bytes"] > 0
    server.terminate()
    shell.wait(server)


def test_a_stopped_server_says_how_to_go_on(tmp_path, shell):
    server = shell.serve(*RUN, "--name", "run")
    clients = [shell.client(0), shell.client(1)]
    shell.wait_for_checkpoint(tmp_path / "runs/run", 20)
    server.send_signal(signal.SIGINT)
    shell.wait(server, status=130)
    assert "continue with: msjax serve --resume runs/run" in (tmp_path / "serve.log").read_text()
    for process in clients:
        shell.wait(process, status=2)
    assert "the server stopped: by a signal" in (tmp_path / "client0.log").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("serve", "--listen", "0.0.0.0:0"), "is not this machine: give certificates"),
        (("serve", "--clients", "0"), "clients must be at least 1, got 0"),
        (("serve", "--data.name", "imagenet2012"), "must be a set that fits in memory"),
        (("serve", "--tokens", "none"), "No such file"),
        (("serve", "--listen", "localhost:port"), "listen must be a free host:port"),
        (("serve", "--metrics-port", "99999"), "metrics_port must be in 1..65535, got 99999"),
        (("serve", "--checkpoint-steps", "0"), "checkpoint_steps must be at least 1, got 0"),
        (("serve", "--policy.min-clients", "0"), "min_clients must be at least 1, got 0"),
        (("client", "--number", "-1"), "number must be at least 0, got -1"),
        (("client", "--number", "0", "--tls.certificate", "none"), "a certificate and its key together"),
        (("serve", "--half", "none"), "No such file"),
        (("client", "--number", "0", "--server", "example.org:1"), "is not this machine: give certificates"),
        (("client", "--number", "0", "--token-file", "none"), "No such file"),
        (("client",), "number"),
        (("eval", "none", "--server", "localhost:1"), "No such file"),
    ],
)
def test_bad_options(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _commands.run(arguments[0], list(arguments[1:])) == 2
    said = capsys.readouterr()
    assert message in said.err + said.out and "Traceback" not in said.err
    assert not list(tmp_path.iterdir())

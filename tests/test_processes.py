"""The commands as users start them, in processes of their own: killed at any point, they end with the same numbers."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from msjax import build, config
from msjax.cli import main as cli
from msjax.distributed.client_program import ClientProgram
from msjax.distributed.options import ClientOptions
from msjax.parts import load_part
from msjax.split import parties
from msjax.split.metrics import MetricSums
from msjax.training import processes

from .helpers import free_port

MSJAX = (sys.executable, "-c", "from msjax.cli import main; main.main()")
SECONDS = 240
pytestmark = pytest.mark.slow
RUN = ("--model.width", "0.5", "--clients", "2", "--batch-size", "48", "--epochs", "8", "--checkpoint-steps", "5")


class Shell:
    """Starts the commands in a folder, and kills what is left of them."""

    def __init__(self, path):
        self._path, self._started = path, []
        self.address = f"localhost:{free_port()}"

    def start(self, name, *arguments):
        with (self._path / f"{name}.log").open("ab") as log:
            process = subprocess.Popen((*MSJAX, *arguments), cwd=self._path, stdout=log, stderr=subprocess.STDOUT)
        self._started.append(process)
        return process

    def serve(self, *arguments):
        return self.start("serve", "serve", *arguments, "--listen", self.address)

    def client(self, number):
        """The second one encodes with NumPy, which makes no difference."""
        where = ("--server", self.address, "--state", f"client{number}", "--encoder", ("jax", "numpy")[number])
        return self.start(f"client{number}", "client", "--client-id", str(number), *where)

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


@pytest.fixture
def shell(tmp_path):
    it = Shell(tmp_path)
    yield it
    it.close()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def expected(path):
    """The states of server and clients at the end, from one calm program."""
    cfg = config.load(path / "runs/run/config.json")
    programs = [ClientProgram(ClientOptions(client_id=n, state=str(path / "x"))) for n in (0, 1)]
    own = [program._load(cfg) for program in programs]
    clients = [program._build(cfg, own[0].samples, own[0].test_samples) for program in programs]
    counts = {"samples": own[0].samples, "test_samples": own[0].test_samples}
    run = build.build(cfg, programs[0]._summary, **counts)
    server, schedule = parties.Server(run.spec, run.server, cfg.seed), run.spec.schedule
    for exchange in parties.run(server, clients):
        if exchange.step == schedule.total_steps - 1 - schedule.epoch_steps:
            server.train = server.test = MetricSums()
    return server, clients


def test_a_port_that_has_been_taken_is_named(monkeypatch):
    """JAX would crash."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: pytest.fail("it is called"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"coordinator_address must have a free port .* got '{address}'"):
            processes.join(address, 2, 0)
    with pytest.raises(ValueError, match=r"coordinator_address must have a free port .* got 'localhost:70000'"):
        processes.join("localhost:70000", 2, 0)


def test_killed_processes_end_like_others(tmp_path, shell):
    """A client is killed, then the server; then the server is stopped, and all are started again."""
    run = tmp_path / "runs/run"
    server, clients = shell.serve(*RUN, "--name", "run"), [shell.client(0), shell.client(1)]
    shell.wait_for_checkpoint(run, 10)
    kill(clients[1])
    clients[1] = shell.client(1)
    shell.wait_for_checkpoint(run, 25)
    kill(server)
    server = shell.serve("--resume", str(run), "--checkpoint-steps", "5")
    shell.wait_for_checkpoint(run, 45)
    server.send_signal(signal.SIGINT)
    shell.wait(server, status=130)
    assert f"continue with: msjax serve --resume {run}" in (tmp_path / "serve.log").read_text()
    shell.wait(*clients, status=75)
    assert "the server stopped: by a signal" in (tmp_path / "client0.log").read_text()
    server, clients = shell.serve("--resume", str(run)), [shell.client(0), shell.client(1)]
    shell.wait(server, *clients)
    assert cli.run("serve", ["--resume", str(run)]) == 2

    server, clients = expected(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    task = server.spec.task
    assert summary["train"] == server.train.means(task) and summary["test"] == server.test.means(task)
    files = (run / "server", tmp_path / "client0/client", tmp_path / "client1/client")
    for file, state in zip(files, (server.state, clients[0].state, clients[1].state), strict=True):
        part = load_part(file.with_suffix(".safetensors"))
        for ours, theirs in zip(
            jax.tree.leaves((state.params, state.stats)), jax.tree.leaves((part.params, part.stats)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_train_serve_and_evaluate(tmp_path, shell, capsys, monkeypatch):
    """The parts of `msjax train`, apart again, test as they did together; signals end what serves."""
    monkeypatch.chdir(tmp_path)
    options = ("--model.width", "0.5", "--clients", "2", "--epochs", "1", "--no-compare", "--out", ".")
    assert cli.run("train", [*options, "--name", "run"]) == 0
    expected = json.loads((tmp_path / "run/summary.json").read_text())["test"]
    server = shell.serve("--part", "run/server.safetensors")
    capsys.readouterr()
    assert cli.run("eval", ["run/client.safetensors", "--server", shell.address]) == 0
    found = json.loads(capsys.readouterr().out)
    # Convolutions of another batch size may differ in the last bits.
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert found["samples"] == 360 and found["sent_bytes"] > 0
    server.terminate()
    shell.wait(server)


def test_the_example_of_a_model_of_ones_own(tmp_path, shell, capsys, monkeypatch):
    """Each party with its own copy of the preset; the trained parts are used with it, too."""
    example = pathlib.Path(__file__).parent.parent / "examples" / "own_model_over_network.py"
    for name in ("server", "client0", "client1"):
        shutil.copy(example, tmp_path / f"{name}.py")
    server = shell.serve("--config", "server.py", "--epochs", "2", "--name", "run")
    clients = [
        shell.start(
            f"client{n}", "client", "--client-id", str(n), "--server", shell.address, "--config", f"client{n}.py"
        )
        for n in (0, 1)
    ]
    shell.wait(server, *clients)
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["headline"] == "mae" and summary["test"]["mae"] < 2
    server = shell.serve("--part", "runs/run/server.safetensors", "--config", "server.py")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    command = ["client0/client.safetensors", "--server", shell.address, "--config", "client0.py"]
    assert cli.run("eval", command) == 0
    assert json.loads(capsys.readouterr().out)["mae"] == pytest.approx(summary["test"]["mae"], rel=1e-4)

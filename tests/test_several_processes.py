"""One run in several processes: the numbers of one process, whatever ends it; errors that all raise."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import driver
from msjax.cli import hosts
from msjax.cli import main as cli
from msjax.parts import load_part
from msjax.runs import RunFolder
from msjax.split.finite import NonFiniteError
from msjax.training import Interrupted, loop, processes

from . import setups, two_processes
from .helpers import free_port

SECONDS = 600


class Pair:
    """Two processes of two CPU devices each, and what they print."""

    def __init__(self, path):
        self._path, self._all = path, []

    def start(self, command, variables=lambda number: {}, **options):
        """Starts both; from a process's number `command` is to its arguments, `variables` to more environment."""
        flags = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
        started = []
        for number in (0, 1):
            with (self._path / f"{number}.log").open("ab") as log:
                arguments = (sys.executable, *command(number))
                streams = {"stdout": log, "stderr": subprocess.STDOUT}
                environment = os.environ | {"XLA_FLAGS": flags} | variables(number)
                started.append(subprocess.Popen(arguments, env=environment, **streams, **options))
        self._all += started
        return started

    def log(self, number):
        return (self._path / f"{number}.log").read_text()

    def wait(self, *processes):
        """The exit codes."""
        try:
            return [process.wait(SECONDS) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.log(0)[-3000:] + self.log(1)[-3000:]) from None

    def close(self):
        for process in self._all:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two processes trained in all modes: (of each its arrays, of each what else it found), and their folder."""
    path = tmp_path_factory.mktemp("pair")
    pair, port = Pair(path), str(free_port())
    try:
        both = pair.start(lambda number: ("-m", two_processes.__name__, port, str(number), str(path)))
        assert pair.wait(*both) == [0, 0], pair.log(0)[-3000:] + pair.log(1)[-3000:]
    finally:
        pair.close()
    arrays = [dict(np.load(path / f"{number}.npz")) for number in (0, 1)]
    return arrays, [json.loads((path / f"{number}.json").read_text()) for number in (0, 1)], path


def of_run(arrays, name):
    return {key.removeprefix(f"{name}: "): value for key, value in arrays.items() if key.startswith(f"{name}: ")}


@pytest.mark.slow
@pytest.mark.parametrize("name", two_processes.RUNS)
def test_two_processes_train_as_one(name, trained, monkeypatch):
    """On as many devices in all. Only the order of the sums over devices differs; without such sums nothing does."""
    cfg = two_processes.config_of(name)
    counts = two_processes.counts_of(cfg)
    run = setups.load_program(cfg, monkeypatch, spread=cfg.mode.kind != "sequential", counts=counts)
    expected = two_processes.result(loop.train(run, quiet=True))
    found = of_run(trained[0][0], name)
    assert found.keys() == expected.keys()
    assert name != "budget" or len(set(expected["aims"])) == cfg.clients  # not all at a limit
    for key, value in expected.items():
        if cfg.mode.kind == "sequential" or "traffic" in key:
            np.testing.assert_array_equal(found[key], value, err_msg=key)
        else:
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_both_processes_end_with_the_same_bits(trained):
    (first, second), *_ = trained
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.slow
def test_a_process_reads_its_clients_samples_alone(trained):
    """Those of two clients of four: streamed it reads no others, in memory its devices hold no others."""
    arrays, found, _ = trained
    assert [one["devices"] for one in found] == [4, 4]
    for number, one in enumerate(found):
        own = one["held"][2 * number : 2 * number + 2]
        assert one["read"] == sorted(own[0] + own[1])
        assert one["rows"] == [len(indices) for indices in one["held"][:2]]
    streamed, in_memory = (of_run(arrays[0], name) for name in ("streamed", "parallel"))
    for name, value in in_memory.items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_errors_are_raised_in_all_processes(trained):
    first, second = (found["errors"] for found in trained[1])
    message = "optim.learning_rate must be the same in all processes, got 0.05 in process 0 and 0.25 in process 1"
    assert first["config"] == second["config"] == f"ValueError: {message}"
    assert first["data"] == second["data"]
    assert first["data"].startswith(
        "ValueError: the data (their hashes; of what is streamed its length) must be the same"
    )
    message = "clients must be a multiple of 2, the number of processes, got 3"
    assert first["clients"] == second["clients"] == f"ValueError: {message}"
    assert first["together"] == "ValueError: process 1: no data here" and second["together"] == first["first"]
    assert second["first"] == "ValueError: process 0: no data here" and first["first"] == "ValueError: no data here"
    assert first["second"] == second["second"] == "none"  # only the first one calls it
    assert first["NaN"] == second["NaN"] and "the loss of all clients must be finite, got nan" in first["NaN"]


@pytest.mark.slow
def test_msjax_train_takes_the_processes_that_it_finds(trained):
    """One of them writes the folder, with the parts and the checkpoints of both."""
    (arrays, _), _, path = trained
    expected = two_processes.train_own(None)
    for name, part in (("client", expected.client), ("server", expected.server)):
        np.testing.assert_allclose(arrays[f"own: {name}"], part.params["w"], rtol=1e-5, atol=1e-5)
        written = load_part(path / "own" / f"{name}.safetensors")
        np.testing.assert_array_equal(jax.tree.leaves(written.params)[0], arrays[f"own: {name}"])
    again = two_processes.train_own(str(path / "own"))  # which had ended
    np.testing.assert_array_equal(again.client.params["w"], arrays["own: client"])


RUN = ("--model.width", "0.25", "--clients", "4", "--batch-size", "90", "--epochs", "30", "--test-every", "10")
RUN = (*RUN, "--codec", "RandK(ratio=0.5)", "--no-compare", "--optim.learning-rate", "0.02")
SPREAD = ("--mode.kind", "splitfed", "--mode.average-steps", "3", "--update-codec", "RandK(ratio=0.5)")
"""Every client has a part of its own, and a memory of what averages have lost: checkpoints that all processes write."""


def wait_for_epoch(pair, folder, epoch):
    """Until the history has this epoch; the run must still be under way."""
    deadline, history = time.monotonic() + SECONDS, folder / "metrics.jsonl"
    while not history.exists() or history.read_text().count("\n") < epoch:
        assert time.monotonic() < deadline and not (folder / "summary.json").exists(), pair.log(0) + pair.log(1)
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_whose_processes_are_stopped_and_killed_ends_with_the_same_numbers(tmp_path, monkeypatch, capsys):
    """SIGTERM at one stops both; with one killed the other ends; one process then goes on alone."""
    pair, folder = Pair(tmp_path), tmp_path / "runs/run"

    def start(*arguments):
        where = ("--distributed", "--coordinator-address", f"localhost:{free_port()}", "--num-processes", "2")
        main = "from msjax.cli import main; main.main()"
        return pair.start(lambda n: ("-c", main, "train", *where, "--process-id", str(n), *arguments), cwd=tmp_path)

    try:
        both = start(*RUN, *SPREAD, "--name", "run")
        wait_for_epoch(pair, folder, 1)
        both[1].send_signal(signal.SIGTERM)
        assert pair.wait(*both) == [130, 130], pair.log(0) + pair.log(1)
        assert "interrupted and saved; continue with: msjax train --resume runs/run" in pair.log(0)
        assert "interrupted" not in pair.log(1) and "epoch" not in pair.log(1)
        stopped = len(RunFolder(folder).read_history())
        assert stopped < 20
        both = start("--resume", "runs/run", "--heartbeat-seconds", "12")
        wait_for_epoch(pair, folder, stopped + 2)
        both[1].kill()
        status, killed = pair.wait(*both)
    finally:
        pair.close()
    said = pair.log(0)
    assert (
        killed == -signal.SIGKILL
        and "if one of the 2 processes ends, start all again with msjax train --resume" in said
    )
    # Where the operation that it is in fails it says so; where that only waits, JAX ends it.
    lost = "process 0 of 2 cannot go on, most likely because another process has ended: "
    aborted = "This most likely indicates that another task died"
    assert (status == 2 and lost in said) or (status == -signal.SIGABRT and aborted in said), said
    monkeypatch.chdir(tmp_path)
    assert cli.run("train", ["--resume", "runs/run"]) == 0
    assert cli.run("train", [*RUN, *SPREAD, "--name", "calm"]) == 0
    found, calm = (RunFolder(tmp_path / "runs" / name).read_history() for name in ("run", "calm"))
    assert len(found) == len(calm) == 30 and found[-1]["traffic"] == calm[-1]["traffic"]
    for one, other in zip(found, calm, strict=True):
        for group in ("train", "test") if "test" in other else ("train",):
            # One process adds in another order than two: of 1,436 samples a few may be judged otherwise.
            off = {name: 0.3 if name.endswith("percent") else 1e-3 for name in other[group]}
            assert one[group].keys() == off.keys()
            for name, most in off.items():
                assert one[group][name] == pytest.approx(other[group][name], rel=1e-3, abs=most), name
    parts = [load_part(tmp_path / "runs" / name / "client.safetensors") for name in ("run", "calm")]
    # 120 steps make more of a rounding error, in weights that matter little more than in losses.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-3), *(part.params for part in parts))


class Exited(BaseException):
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (processes.lost(RuntimeError("Gloo all-reduce failed\nat length")), 2, "all-reduce failed; start them again\n"),
        (OSError("no space left on device"), 2, "msjax train: no space left on device\n"),
        (KeyError("a mistake of ours"), 1, "KeyError: 'a mistake of ours'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_process_that_fails_alone_ends_at_once(error, status, message, monkeypatch, capsys):
    """Without the exit handlers that would wait for the others; but what all raise alike goes on."""

    def end(code):
        raise Exited(code)

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.os, "_exit", end)
    monkeypatch.setattr(hosts.time, "sleep", lambda seconds: None)
    with pytest.raises(Exited) as ended, hosts.ending_together("train", "start them again"):
        raise error
    assert ended.value.args == (status,) and capsys.readouterr().err.endswith(message)
    for common in (Interrupted(), NonFiniteError("the loss")):
        with pytest.raises(type(common)), hosts.ending_together("train", "start them again"):
            raise common
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 1)
    with pytest.raises(type(error)), hosts.ending_together("train", "start them again"):
        raise error


def test_studies_take_the_options_of_several_processes():
    """They are written down there, too, as `hosts` would start JAX where a study only prints its table."""
    assert driver._AMONG == hosts.FIELDS


def test_what_is_given_of_several_processes_reaches_jax(monkeypatch):
    met = []
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: met.append((args, options)))
    processes.join("somewhere:1234", 3, 2, (0, 1), heartbeat_seconds=7)
    assert met == [(("somewhere:1234", 3, 2, (0, 1)), {"heartbeat_timeout_seconds": 7})]


def test_options_of_several_processes_are_checked_before_they_meet(capsys):
    for arguments, message in (
        (["--num-processes", "2"], "--num-processes takes --distributed beside it"),
        (["--distributed", "--num-processes", "two"], "--num-processes must be an integer, got 'two'"),
        (
            ["--distributed", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be an integer in 0..1, got 2",
        ),
        (["--distributed", "--coordinator-address", "here"], "--coordinator-address must be HOST:PORT, got 'here'"),
        (["--distributed", "--local-device-ids", "0,x"], "--local-device-ids must be an integer, got 'x'"),
        (["--distributed", "--local-device-ids", "1,1"], "--local-device-ids must name each device once, got 1,1"),
        (["--distributed", "--heartbeat-seconds", "0"], "--heartbeat-seconds must be an integer of at least 1, got 0"),
    ):
        assert cli.run("train", arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_runs_in_several_processes_as_slurm_describes_them(tmp_path):
    """Each run in all of them, with one record; measurements wait for a call in one process."""
    pair = Pair(tmp_path)
    code = (
        "import dataclasses, pathlib, sys\n"
        "from experiments import driver, study\n"
        "cfg = dataclasses.replace(study.base('smoke'), out='runs')\n"
        "wanted = {'trained': cfg, 'measured': study.Measured(cfg, 'experiments.some:rows')}\n"
        "among = dict.fromkeys(driver._AMONG) | {'distributed': True}\n"
        "results = pathlib.Path('results')\n"
        "sys.exit(driver.run_missing('smoke', wanted, command='the command', results=results, among=among))\n"
    )

    def slurm(number):
        found = {"SLURM_JOB_ID": os.getpid(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2}
        found |= {"SLURM_PROCID": number, "SLURM_LOCALID": number, "PYTHONPATH": os.pathsep.join(sys.path)}
        return {name: str(value) for name, value in found.items()}

    try:
        both = pair.start(lambda number: ("-c", code), variables=slurm, cwd=tmp_path)
        assert pair.wait(*both) == [0, 0], pair.log(0) + pair.log(1)
    finally:
        pair.close()
    (record,) = (tmp_path / "results/smoke").glob("*.json")
    record = json.loads(record.read_text())
    assert record["command"] == "the command" and len(record["history"]) == 1
    assert record["environment"]["devices"].startswith("4 ×")
    for number in (0, 1):
        assert "1 measurements are left for a call without --distributed" in pair.log(number)

"""The loop: order and schedule, interruption and resumption, the run folder, the command line."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from msjax import _commands, assemble, cli, compress, config, feed, runs, train

SMALL = config.Config(
    model=config.ModelConfig(width=0.125),
    optim=config.OptimConfig(learning_rate=0.1, warmup_epochs=1.0),
    clients=3,
    batch_size=64,
    epochs=3,
    test_every=2,
)


def start(cfg, tmp_path, name):
    return runs.RunFolder.create(dataclasses.replace(cfg, out=str(tmp_path)), name)


def numbers(summary):
    return {k: summary[k] for k in ("test", "train", "traffic")}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run: (its folder, its summary)."""
    folder = start(SMALL, tmp_path_factory.mktemp("runs"), "whole")
    summary = train.train(SMALL, folder, quiet=True)
    folder.close()
    return folder.path, summary


def test_run_folder_is_complete(whole_run):
    path, summary = whole_run
    assert config.load(path / "config.json") == dataclasses.replace(SMALL, out=str(path.parent))
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], "test" in r) for r in records] == [(1, False), (2, True), (3, True)]
    assert records[1]["traffic"]["paper_bytes"] > 2 * records[0]["traffic"]["paper_bytes"]
    assert records[-1]["test"] == summary["test"] == json.loads((path / "summary.json").read_text())["test"]
    assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((path / "tensorboard").glob("events*"))
    assert summary["environment"]["packages"]["jax"] == jax.__version__
    assert records[-1]["train"]["loss"] < records[0]["train"]["loss"]
    assert summary["test"]["top1_percent"] > 60 and summary["test"]["top5_percent"] > summary["test"]["top1_percent"]


@pytest.mark.parametrize(
    "stop_after", [2, 8, 11]
)  # steps of 8 an epoch: inside the first, between two, inside the second
def test_an_interrupted_run_ends_with_the_same_numbers(whole_run, tmp_path, monkeypatch, stop_after):
    folder = start(SMALL, tmp_path, "cut")
    steps = []
    original = train.display.Progress.step

    def step(self, count, sent_bytes):
        original(self, count, sent_bytes)
        steps.append(count)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train.display.Progress, "step", step)
    with pytest.raises(train.Interrupted):
        train.train(SMALL, folder, quiet=True)
    folder.close()
    assert len(steps) == stop_after
    assert not (folder.path / "summary.json").exists()
    again, cfg = runs.RunFolder.open(folder.path)
    summary = train.train(cfg, again, quiet=True)
    again.close()
    assert numbers(summary) == numbers(whole_run[1])
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_half_written_checkpoint_is_not_loaded(whole_run, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(whole_run[0], path)
    last = max((p for p in (path / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    # What a kill in the middle of saving leaves behind: a folder that was not renamed to its final name yet.
    shutil.copytree(last, path / "checkpoints" / "999.orbax-checkpoint-tmp")
    shutil.rmtree(path / "checkpoints" / "999.orbax-checkpoint-tmp" / "state")
    folder, cfg = runs.RunFolder.open(path)
    job = train.prepare(cfg)
    (state, _), progress = folder.restore((job.state, train.simulate.zero_sums(job.mesh)))
    folder.close()
    assert int(state.step) == int(last.name) and len(progress["history"]) == 3


def test_records_of_a_diverged_run_are_json():
    text = runs.to_json({"loss": float("nan"), "all": [1.5, float("inf")], "n": 3})
    assert json.loads(text) == {"loss": None, "all": [1.5, None], "n": 3}
    assert "NaN" not in text


def test_batches_cover_each_sample_once():
    order = np.arange(2 * 23, dtype=np.int32).reshape(2, 23)
    calls = feed.epoch_calls(order, 5, steps_per_call=3)
    assert [c.shape for c in calls] == [(3, 2, 5), (1, 2, 5), (1, 2, 3)]
    for client in range(2):
        seen = np.concatenate([c[:, client].reshape(-1) for c in calls])
        np.testing.assert_array_equal(seen, order[client])
    short = feed.epoch_calls(order[:, :3], 5, steps_per_call=3)
    assert [c.shape for c in short] == [(1, 2, 3)]


@pytest.mark.parametrize("count", [1, 7, 20, 41, 60])
def test_eval_batches_cover_each_sample_once(count):
    calls = feed.eval_calls(count, clients=3, batch_size=5)
    np.testing.assert_array_equal(np.concatenate([c.reshape(-1) for c in calls]), np.arange(count))
    assert {c.shape for c in calls} <= {(1, 3, 5), (1, 1, 5), (1, 1, count % 5)}


def test_the_table_sets_a_single_run_against_no_compression(capsys):
    traffic = {"uplink_feature_bytes": 100, "uplink_gradient_bytes": 0, "uplink_bytes": 150}
    traffic |= {"downlink_gradient_bytes": 900, "downlink_bytes": 1000}
    configs = {"codec": "MaskEncoded()", "grad_codec": "Identity()"}
    summary = {"config": configs, "test": {"top1_percent": 90.0}, "wall_seconds": 1.0}
    summary |= {"traffic": traffic, "uncompressed_feature_bytes": 1380}
    coded = summary | {"traffic": traffic | {"coded_uplink_bytes": 20, "coded_downlink_bytes": 30}}
    train.display.print_summaries([summary, coded | {"config": configs | {"grad_codec": "EntropyMask()"}}])
    out = capsys.readouterr().out
    assert "13.80×" in out and "69.00×" in out and "gradients: EntropyMask()" in out


def rates(optim, epochs, steps):
    """The learning rate of each step, as the size of an update for a gradient of one."""
    optimizer = assemble.make_optimizer(optim, epochs=epochs, steps_per_epoch=steps)
    params = {"w": jax.numpy.zeros(())}
    state, out = optimizer.init(params), []
    for _ in range(epochs * steps):
        updates, state = optimizer.update({"w": jax.numpy.ones(())}, state, params)
        out.append(-float(updates["w"]))
    return np.array(out)


def test_schedules_of_the_paper():
    plain = {"learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    cosine = rates(config.OptimConfig(schedule="cosine", **plain), 10, 2)
    np.testing.assert_allclose(cosine, 0.05 * (1 + np.cos(np.pi * np.arange(20) / 20)), rtol=1e-5)
    steps = rates(config.OptimConfig(schedule="steps", milestones=(2, 4), gamma=0.2, **plain), 5, 2)
    np.testing.assert_allclose(steps, [0.1] * 4 + [0.02] * 4 + [0.004] * 2, rtol=1e-5)
    warm = rates(config.OptimConfig(schedule="constant", warmup_epochs=2.0, **plain), 4, 2)
    np.testing.assert_allclose(warm, [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1], atol=1e-7)
    late = rates(config.OptimConfig(schedule="steps", milestones=(3,), gamma=0.1, warmup_epochs=1.0, **plain), 4, 2)
    np.testing.assert_allclose(late[2:], [0.1] * 4 + [0.01] * 2, rtol=1e-5)


def test_optimizer_is_pytorchs_sgd():
    """v ← µ·v + (g + λ·w); w ← w − η·v, or with Nesterov w ← w − η·(g + λ·w + µ·v)."""
    for nesterov in (False, True):
        cfg = config.OptimConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant", nesterov=nesterov)
        optimizer = assemble.make_optimizer(cfg, epochs=1, steps_per_epoch=4)
        params = {"w": jax.numpy.array(2.0)}
        state, w, v = optimizer.init(params), 2.0, 0.0
        for g in (1.0, -2.0, 0.5):
            updates, state = optimizer.update({"w": jax.numpy.array(g)}, state, params)
            params = optax.apply_updates(params, updates)
            d = g + 0.5 * w
            v = 0.9 * v + d
            w -= 0.1 * (d + 0.9 * v if nesterov else v)
            assert float(params["w"]) == pytest.approx(w, rel=1e-5)


def run_cli(*arguments, expect=0, **options):
    done = subprocess.run(
        [sys.executable, "-m", "msjax", *arguments], capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_command_line_trains_evaluates_and_compares(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--epochs", "1", "--model.width", "0.125"]
    assert _commands.run("train", [*options, "--name", "a", "--codec", "Uniform(bits=4)"]) == 0
    out = capsys.readouterr().out
    assert "Identity()" in out and "Uniform(" in out and "saved" in out
    assert (tmp_path / "a" / "uncompressed" / "summary.json").exists()
    saved = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert saved["config"]["codec"] == repr(compress.Uniform(bits=4))
    assert _commands.run("eval", [str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["top1_percent"] == saved["test"]["top1_percent"]
    assert _commands.run("eval", [str(tmp_path / "a"), "--uncompressed"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == "no compression"
    assert _commands.run("train", ["--resume", str(tmp_path / "a")]) == 0
    # A run that failed to start leaves no folder, so its name can be used again.
    assert _commands.run("train", [*options, "--name", "b", "--model.cut", "nowhere"]) == 2
    assert not (tmp_path / "b").exists()


def test_an_interrupted_comparison_goes_on(tmp_path, capsys, monkeypatch):
    original = train.display.Progress.epoch

    def epoch(self, *arguments):
        original(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    options = ["--out", str(tmp_path), "--epochs", "1", "--model.width", "0.125", "--name", "a"]
    with monkeypatch.context() as patch:
        patch.setattr(train.display.Progress, "epoch", epoch)
        assert _commands.run("train", options) == 130
    assert f"msjax train --resume {tmp_path / 'a'}" in capsys.readouterr().out
    assert not (tmp_path / "a" / "summary.json").exists()
    assert _commands.run("train", ["--resume", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "Identity()" in out and "13." in out  # the saving by MS, in the table


class FakeStream:
    """As `data.ImageStream`: what it yields tells what it was asked for."""

    name, input_shape = "fake", (2, 2, 1)

    def __len__(self):
        return 100


def test_a_resumed_stream_goes_on_where_it_stopped(monkeypatch):
    def batches(source, indices, *, seed, epoch, start=0):
        return ((np.full((1,), n), indices[n]) for n in range(start, len(indices)))

    monkeypatch.setattr(feed.data, "batches", batches)
    calls = feed.epoch_calls(np.arange(46).reshape(2, 23), 5, steps_per_call=1)
    split = feed.Split(FakeStream(), 46)
    whole = [(int(n[0]), index.tolist()) for n, index, _ in feed.feed(split, calls, seed=1, epoch=2)]
    assert len(whole) == 5
    for done in range(6):
        rest = [(int(n[0]), index.tolist()) for n, index, _ in feed.feed(split, calls, seed=1, epoch=2, done=done)]
        assert rest == whole[done:]


@pytest.mark.parametrize("done", range(6))
def test_a_resumed_epoch_goes_on_at_any_step(done):
    """Also inside a call, as when a run goes on on another kind of device."""
    calls = feed.epoch_calls(np.arange(46).reshape(2, 23), 5, steps_per_call=3)
    steps = [s.tolist() for call in calls for s in call]
    split = feed.Split((None, None), 46)
    assert [s.tolist() for _, _, call in feed.feed(split, calls, done=done) for s in call] == steps[done:]


def test_each_evaluation_batch_draws_its_own_noise(monkeypatch):
    cfg = dataclasses.replace(SMALL, codec=compress.RandK(0.5), batch_size=16)
    job = train.prepare(cfg)
    evaluate = train.Evaluator(cfg, job)
    keys = []

    def program(state, sums, images, labels, order, key, numbers):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return sums._replace(samples=sums.samples + 1)

    evaluate._programs = dict.fromkeys(evaluate._programs, program)
    evaluate(job.state)
    assert len(keys) == len(set(keys)) > 5


def test_training_in_bfloat16_with_uneven_clients_and_a_compressed_downlink(tmp_path):
    cfg = dataclasses.replace(
        SMALL,
        dtype="bfloat16",
        data=config.DataConfig(alpha=0.5),
        codec=compress.MaskEncoded(granularity="sample"),
        grad_codec=compress.StochasticUniform(8),
        epochs=2,
    )
    folder = start(cfg, tmp_path, "a")
    summary = train.train(cfg, folder, quiet=True)
    folder.close()
    assert np.isfinite(summary["train"]["loss"]) and summary["test"]["top1_percent"] > 15
    traffic = summary["traffic"]
    assert traffic["downlink_gradient_bytes"] < summary["uncompressed_feature_bytes"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--config", "none.py"], "--config must be a Python file"),
        ("train", ["--resume", "none"], "the run must be a folder with config.json"),
        ("train", ["--out", "OUT", "--model.cut", "nowhere"], "cut must be one of"),
        ("train", ["--out", "OUT", "--data.name", "nothing", "--data.data-dir", "OUT"], "looked for nothing in"),
        ("train", ["--out", "OUT", "--clients", "0"], "clients must be at least 1"),
        ("eval", ["none"], "the run must be a folder with config.json"),
        ("models", ["vgg19", "--width", "0"], "width must be above 0"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, capsys, command, arguments, message):
    assert _commands.run(command, [str(tmp_path) if a == "OUT" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_models_table_has_the_papers_feature_maps(capsys):
    assert _commands.run("models", ["vgg19"]) == 0
    out = capsys.readouterr().out
    assert "38.96 M" in out and "16×16×64" in out and "4×4×256" in out and "2×2×512" in out
    assert "65,536" in out  # bytes a sample at cut 2, uncompressed


def test_help_is_quick_and_needs_no_jax():
    code = (
        "import sys; sys.argv = ['msjax', '--help']; from msjax import cli; cli.main(); assert 'jax' not in sys.modules"
    )
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "msjax train" in out and "--resume" in out
    assert time.monotonic() - start < 5  # a second on an idle machine


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_clients_are_spread_over_the_cores_and_arrays_over_large_pages(tmp_path):
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # and no number of devices
    environment = {k: v for k, v in os.environ.items() if k not in runs._VARIABLES} | flags
    options = ["--clients", "2", "--epochs", "1", "--model.width", "0.125", "--no-compare"]
    run_cli("train", *options, "--out", str(tmp_path), "--name", "a", env=environment)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["environment"]["devices"].startswith("2 ×")
    assert summary["environment"]["variables"] == flags | (cli.LARGE_PAGES if sys.platform == "linux" else {})


def test_unknown_command_is_refused():
    assert "unknown command 'fly'" in run_cli("fly", expect=1).stderr

"""Training in one program: order and schedule, interruption and resumption, the run folder."""

import dataclasses
import json
import logging
import os
import shutil
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msjax import compress, config, data, runs
from msjax.cli import main as cli
from msjax.optim import make_optimizer
from msjax.parts import load_part
from msjax.runs import checkpoints
from msjax.runs.progress import Progress
from msjax.runs.tables import print_summaries
from msjax.split import sent
from msjax.split.metrics import MetricSums
from msjax.split.modes import Parallel
from msjax.split.schedule import Schedule
from msjax.training import Interrupted, batching, evaluator, loaded, loop, program, saved
from msjax.training.from_config import load_run, train_config

from . import setups

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
    summary = train_config(SMALL, folder, quiet=True)
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
    "stop_after",
    [2, pytest.param(8, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)],
)  # steps of 8 an epoch: inside the first, between two, inside the second
def test_an_interrupted_run_ends_with_the_same_numbers(whole_run, tmp_path, monkeypatch, stop_after):
    folder = start(SMALL, tmp_path, "cut")
    steps, written, history = [], [], folder.path / "metrics.jsonl"
    original = Progress.step

    def step(self, count, *rest):
        original(self, count, *rest)
        steps.append(count)
        written.append(len(history.read_text().splitlines()) if history.exists() else 0)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "step", step)
    with pytest.raises(Interrupted, match=f"stopped by a signal after step {stop_after}; its state is saved"):
        train_config(SMALL, folder, quiet=True)
    folder.close()
    assert len(steps) == stop_after
    assert not (folder.path / "summary.json").exists()
    again, cfg = runs.RunFolder.open(folder.path)
    restore = saved.restore
    history.unlink(missing_ok=True)  # of a process that died before it had written what is in its checkpoint

    def restore_after_hours(*args):
        state, sums, progress = restore(*args)
        return state, sums, progress | {"wall_seconds": 7200.0, "train_seconds": 3600.0}

    monkeypatch.setattr(loop, "restore", restore_after_hours)
    summary = train_config(cfg, again, quiet=True)
    again.close()
    assert numbers(summary) == numbers(whole_run[1])
    assert summary["wall_seconds"] > 7200.0  # with earlier processes' time; tests and checkpoints are part of it
    assert 3 * 1437 / 3800 < summary["images_per_second"] <= round(3 * 1437 / 3600, 1)  # and here they are not
    assert written[stop_after] == stop_after // 8 and len(history.read_text().splitlines()) == 3


def test_a_finished_run_goes_on_to_more_epochs(tmp_path, capsys):
    """With a constant rate to the numbers of a run that had them from the beginning."""
    optim = config.OptimConfig(learning_rate=0.05, schedule="constant")
    cfg = dataclasses.replace(SMALL, optim=optim, epochs=2, test_every=1)
    straight = start(cfg, tmp_path, "straight")
    expected = train_config(cfg, straight, quiet=True)
    straight.close()
    short = dataclasses.replace(cfg, epochs=1)
    folder = start(short, tmp_path, "short")
    train_config(short, folder, quiet=True)
    folder.close()
    path = str(tmp_path / "short")
    for wrong, message in (
        (["--epochs", "0"], "epochs must be an integer of at least 1, got 0"),
        (["--epochs", "x"], "epochs must be an integer of at least 1, got 'x'"),
        (["--epochs=2", "--clients", "4"], "--data.workers, and --config for the functions of a preset), got also --c"),
    ):
        assert cli.run("train", ["--resume", path, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.run("train", ["--resume", path, "--epochs", "2"]) == 0
    summary = folder.read_summary()
    assert numbers(summary) == numbers(expected) and summary["config"]["epochs"] == 2
    records = [[{**r, "seconds": 0} for r in f.read_history()] for f in (folder, straight)]
    assert records[0] == records[1]
    client, same = (load_part(f.path / "client.safetensors") for f in (folder, straight))
    jax.tree.map(np.testing.assert_array_equal, client[1:3], same[1:3])
    assert client.step == same.step
    assert cli.run("train", ["--resume", path, "--epochs", "1"]) == 2
    assert "epochs must be above 2, which the run has done or is in, got 1" in capsys.readouterr().err
    assert cli.run("train", ["--resume", path, "--epochs", "2"]) == 0  # nothing is left to do
    assert config.load(folder.path / "config.json").epochs == 2 and folder.read_summary() == summary
    shutil.rmtree(folder.path / "checkpoints")
    assert cli.run("train", ["--resume", path, "--epochs", "3"]) == 2
    assert "the run must have a checkpoint to go on from" in capsys.readouterr().err


@pytest.mark.slow
def test_more_epochs_of_a_comparison(tmp_path, capsys):
    """Both runs go on; the test that was the last is counted, though the longer run would not have had it."""
    options = ["--out", str(tmp_path), "--name", "a", "--epochs", "1", "--model.width", "0.125", "--test-every", "2"]
    assert cli.run("train", [*options, "--clients", "2"]) == 0
    assert cli.run("train", ["--resume", str(tmp_path / "a"), "--epochs", "3"]) == 0
    for path in (tmp_path / "a", tmp_path / "a" / "uncompressed"):
        first, second, third = runs.RunFolder(path).read_history()
        assert "test" in first and "test" in second and "test" in third
        tests = [r["traffic"]["paper_bytes"] - r["traffic"]["uplink_feature_bytes"] for r in (first, second, third)]
        assert tests[0] > 0 and tests == [n * tests[0] for n in (1, 2, 3)]


def test_a_half_written_checkpoint_is_not_loaded(whole_run, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(whole_run[0], path)
    last = max((p for p in (path / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    # What a kill in the middle of saving leaves behind: a folder that was not renamed to its final name yet.
    shutil.copytree(last, path / "checkpoints" / "999.orbax-checkpoint-tmp")
    shutil.rmtree(path / "checkpoints" / "999.orbax-checkpoint-tmp" / "state")
    folder, cfg = runs.RunFolder.open(path)
    run = load_run(cfg)
    mesh = loaded.mesh_of(run.spec)
    state, _, progress = saved.restore(folder, run, program.place(run.spec, run.state, mesh), mesh)
    folder.close()
    assert int(state.step) == int(last.name) and len(progress["history"]) == 3


def test_a_folder_is_read_without_warnings(whole_run):
    """Orbax warns of what was asked for; what it may have to say beside that is shown."""
    said, logger = [], logging.getLogger("absl")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        folder, _ = runs.RunFolder.open(whole_run[0], read_only=True)
        assert folder.checkpoints.latest() == 24
        folder.close()
        assert not said
        with checkpoints._without_warning("Given"):
            logger.warning("Given directory")
            logger.warning("another %s", "warning")
        logger.warning("Given now")
    finally:
        logger.removeHandler(handler)
    assert said == ["another warning", "Given now"]


def test_records_of_a_diverged_run_are_json():
    text = runs.to_json({"loss": float("nan"), "all": [1.5, float("inf")], "n": 3})
    assert json.loads(text) == {"loss": None, "all": [1.5, None], "n": 3}
    assert "NaN" not in text


def test_batches_cover_each_sample_once():
    order = np.arange(2 * 23, dtype=np.int32).reshape(2, 23)
    calls = batching.epoch_calls(order, 5, steps_per_call=3)
    assert [c.shape for c in calls] == [(3, 2, 5), (1, 2, 5), (1, 2, 3)]
    for client in range(2):
        seen = np.concatenate([c[:, client].reshape(-1) for c in calls])
        np.testing.assert_array_equal(seen, order[client])
    short = batching.epoch_calls(order[:, :3], 5, steps_per_call=3)
    assert [c.shape for c in short] == [(1, 2, 3)]


@pytest.mark.parametrize("count", [1, 7, 20, 41, 60])
def test_each_client_tests_all_of_its_own_samples_once(count):
    schedule = Schedule(Parallel(), 3, 5, count, 5, 1, own_tests=True)
    rounds = schedule.test_rounds()
    assert schedule.tested_samples == 3 * count
    for client in range(3):
        np.testing.assert_array_equal(np.concatenate([samples[client] for samples in rounds]), np.arange(count))


@pytest.mark.parametrize("count", [1, 7, 20, 41, 60])
def test_rounds_of_a_test_cover_each_sample_once(count):
    rounds = Schedule(Parallel(), 3, 5, count, 5, 1).test_rounds()
    np.testing.assert_array_equal(np.concatenate([r.reshape(-1) for r in rounds]), np.arange(count))
    assert {r.shape for r in rounds} <= {(3, 5), (1, 5), (1, count % 5)}


def test_the_table_sets_a_single_run_against_no_compression(capsys):
    traffic = {"uplink_feature_bytes": 100, "uplink_gradient_bytes": 0, "uplink_bytes": 150}
    traffic |= {"downlink_gradient_bytes": 900, "downlink_bytes": 1000}
    configs = {"codec": "MaskEncoded()", "grad_codec": "Identity()"}
    summary = {"config": configs, "test": {"top1_percent": 90.0}, "wall_seconds": 1.0}
    summary |= {"traffic": traffic, "uncompressed_feature_bytes": 1380}
    coded = summary | {"traffic": traffic | {"coded_uplink_bytes": 20, "coded_downlink_bytes": 30}}
    print_summaries([summary, coded | {"config": configs | {"grad_codec": "EntropyMask()"}}])
    out = capsys.readouterr().out
    assert "13.80×" in out and "69.00×" in out and "gradients: EntropyMask()" in out
    traffic |= {"uplink_bytes": 3e6, "uplink_synchronization_bytes": 2e6, "coded_uplink_synchronization_bytes": 1e5}
    traffic |= {
        "downlink_bytes": 4e6,
        "downlink_synchronization_bytes": 2e6,
        "coded_downlink_synchronization_bytes": 2e5,
    }
    print_summaries([summary | {"traffic": traffic, "config": configs | {"update_codec": "TopK()"}}])
    out = capsys.readouterr().out
    assert "averages: TopK()" in out and "1.10" in out and "2.20" in out


def test_coded_bytes_of_a_u_shaped_run_are_those_of_both_messages():
    traffic = {"uplink_feature_bytes": 1000, "uplink_gradient_bytes": 1000, "uplink_bytes": 2000}
    traffic |= {"downlink_feature_bytes": 500, "downlink_gradient_bytes": 1500, "downlink_bytes": 2010}
    assert sent.cut_bytes(traffic) == 4000
    traffic |= {"coded_uplink_bytes": 600, "coded_downlink_bytes": 400}
    assert sent.cut_bytes(traffic) == 1000 and sent.by_direction(traffic) == (600, 410)
    assert sent.feature_bytes(traffic) is None  # which part of a message's bytes are theirs is not known


def rates(optim, epochs, steps):
    """The learning rate of each step, as the size of an update for a gradient of one."""
    optimizer = make_optimizer(optim, epochs=epochs, steps_per_epoch=steps)
    params = {"w": jnp.zeros(())}
    state, out = optimizer.init(params), []
    for _ in range(epochs * steps):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
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
        optimizer = make_optimizer(cfg, epochs=1, steps_per_epoch=4)
        params = {"w": jnp.array(2.0)}
        state, w, v = optimizer.init(params), 2.0, 0.0
        for g in (1.0, -2.0, 0.5):
            updates, state = optimizer.update({"w": jnp.array(g)}, state, params)
            params = optax.apply_updates(params, updates)
            d = g + 0.5 * w
            v = 0.9 * v + d
            w -= 0.1 * (d + 0.9 * v if nesterov else v)
            assert float(params["w"]) == pytest.approx(w, rel=1e-5)


def test_bytes_of_coded_messages_are_of_all_epochs_so_far():
    sums = MetricSums(uplink_bytes=jnp.float32(10.4), downlink_bytes=jnp.float32(3.0))
    spec = setups.built(dataclasses.replace(setups.SMALL, codec=compress.EntropyMask()), 30).spec
    first = loop._coded_bytes(spec, sums, [])
    assert first == {"coded_uplink_bytes": 10, "coded_downlink_bytes": 3}
    history = [{"traffic": {"uplink_bytes": 7} | first}]
    assert loop._coded_bytes(spec, sums, history) == {"coded_uplink_bytes": 20, "coded_downlink_bytes": 6}


class FakeStream:
    """As `data.ImageStream`: what it yields tells what it was asked for."""

    in_memory, input_like, label_like = False, None, None

    def labels(self):
        return np.zeros(100)

    def fetch(self, indices, entropy=()):
        return indices, indices

    def __len__(self):
        return 100


def read(split, calls, **options):
    found = batching.batches_on_device(split, None, calls, seed=1, epoch=2, **options)
    return [(int(n[0]), index.tolist()) for n, index, _ in found]


def test_a_resumed_stream_goes_on_where_it_stopped(monkeypatch):
    def batches(source, indices, *, seed, epoch, start=0, workers=None):
        return ((np.full((1,), n), indices[n]) for n in range(start, len(indices)))

    monkeypatch.setattr(batching.data, "batches", batches)
    calls = batching.epoch_calls(np.arange(46).reshape(2, 23), 5, steps_per_call=1)
    split = FakeStream()
    whole = read(split, calls)
    assert len(whole) == 5
    for done in range(6):
        assert read(split, calls, done=done) == whole[done:]


@pytest.mark.parametrize("done", range(6))
def test_a_resumed_epoch_goes_on_at_any_step(done):
    """Also inside a call, as when a run goes on on another kind of device."""
    calls = batching.epoch_calls(np.arange(46).reshape(2, 23), 5, steps_per_call=3)
    steps = [s.tolist() for call in calls for s in call]
    found = batching.batches_on_device(FakeStream(), batching.Resident(None, None), calls, done=done)
    assert [s.tolist() for _, _, call in found for s in call] == steps[done:]


def test_a_device_of_a_mesh_has_its_clients_samples_alone():
    """Of uneven shares, in any order; the positions of the calls lead to the same samples as on one device."""
    split = data.Arrays(np.arange(40, 60, dtype=np.int32).reshape(20, 1), np.arange(20, dtype=np.int32))
    held = [np.int32(rows) for rows in ([3, 1], [19, 5, 7, 0], [2], [8, 11])]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("client",))
    resident = batching.resident_of_clients(split, mesh, held)
    shards = [np.asarray(shard.data)[:, 0].tolist() for shard in resident.inputs.addressable_shards]
    assert shards == [[43, 41, 59, 45, 47, 40], [42, 48, 51, 0, 0, 0]]
    ((_, labels, order),) = batching.batches_on_device(split, resident, [np.int32([[[1], [7], [2], [11]]])])
    assert order.tolist() == [[[1], [4], [0], [2]]]
    on_device = [
        shard.data[order[0, 2 * n : 2 * n + 2, 0]].tolist() for n, shard in enumerate(labels.addressable_shards)
    ]
    assert on_device == [[1, 7], [2, 11]]


def test_each_evaluation_batch_draws_its_own_noise(monkeypatch):
    cfg = dataclasses.replace(SMALL, codec=compress.RandK(0.5), batch_size=16)
    run = load_run(cfg)
    keys = []

    def rounds(spec, mesh, state, sums, inputs, labels, order, clients, key, places, **options):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return sums._replace(samples=sums.samples + 1)

    monkeypatch.setattr(program, "eval_rounds", rounds)
    evaluator.Evaluator(run)(run.state)
    assert len(keys) == len(set(keys)) > 5


@pytest.mark.slow
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
    summary = train_config(cfg, folder, quiet=True)
    folder.close()
    assert np.isfinite(summary["train"]["loss"]) and summary["test"]["top1_percent"] > 15
    traffic = summary["traffic"]
    assert traffic["downlink_gradient_bytes"] < summary["uncompressed_feature_bytes"]


class SumsOfBefore(NamedTuple):
    """What stood beside the state in a checkpoint of the first version."""

    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    samples: jax.Array
    uplink_bytes: jax.Array
    downlink_bytes: jax.Array


@pytest.mark.slow
def test_checkpoints_of_the_first_version_are_resumed(whole_run, tmp_path):
    """A run folder of before there were tasks: another structure of sums, and the config's first field names."""
    folder = start(SMALL, tmp_path, "before")
    tree = config.earlier_names(json.loads((folder.path / "config.json").read_text()))
    (folder.path / "config.json").write_text(json.dumps({n: v for n, v in tree.items() if n != "task"}))
    assert "head_cut" in tree["mode"]
    folder, cfg = runs.RunFolder.open(folder.path)
    run = load_run(cfg)
    state = program.place(run.spec, run.state, loaded.mesh_of(run.spec))
    zero = [jnp.zeros((), dtype) for dtype in (jnp.float32, *[jnp.int32] * 3, jnp.float32, jnp.float32)]
    progress = {"history": [], "train_seconds": 0.0, "wall_seconds": 0.0}
    folder.checkpoints.save(0, (saved.to_save(run.spec, state), SumsOfBefore(*zero)), progress)
    summary = train_config(cfg, folder, run=run, quiet=True)
    folder.close()
    assert numbers(summary) == numbers(whole_run[1])


@pytest.mark.slow
def test_without_test_data_a_run_has_no_test(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1)).astype(np.uint8)
    ds = data.from_arrays((x, np.arange(24) % 3))
    monkeypatch.setattr(data, "load", lambda *args, **options: ds)
    cfg = dataclasses.replace(SMALL, batch_size=8, epochs=1)
    folder = start(cfg, tmp_path, "run")
    summary = train_config(cfg, folder, quiet=True)
    folder.close()
    assert "test" not in summary and summary["train"].keys() == {"loss", "top1_percent", "top5_percent"}
    print_summaries([summary])

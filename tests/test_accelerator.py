"""What is made for a GPU, at tiny sizes on a CPU: calls go on where the last one stopped."""

import contextlib
import json
import os
import signal
import sys
import types

import numpy as np
import pytest

from experiments import accelerator, accelerator_jobs, packed_images, report
from msjax import data

from .memory_network import Clock

RNG = np.random.default_rng(0)


def images(count, side=16):
    """Smooth ones with noise, and one that is noise alone."""
    ramp = np.linspace(0, 250, side)[None, :, None, None] * RNG.random((count, 1, side, 3))
    found = np.clip(ramp + RNG.normal(scale=3, size=(count, side, side, 3)), 0, 255).astype(np.uint8)
    found[0] = RNG.integers(0, 256, found[0].shape)
    return found


def split(count):
    return images(count), np.arange(count) % 10


def test_packed_images_come_back(tmp_path):
    train, test, rest = split(24), split(7), split(8)
    files = [tmp_path / "new" / "1.npz", tmp_path / "new" / "2.npz"]
    packed_images.save(files[0], train=train, test=test)
    packed_images.save(files[1], train=rest)
    assert files[0].stat().st_size < 0.9 * 31 * 16 * 16 * 3
    found = packed_images.load(files)
    for pair, want in ((found["train"], map(np.concatenate, zip(train, rest, strict=True))), (found["test"], test)):
        for got, expected in zip(pair, want, strict=True):
            np.testing.assert_array_equal(got, expected)
    assert found["train"][0].dtype == np.uint8 and found["train"][1].dtype == np.int32
    with np.load(files[1]) as file:
        changed = dict(file) | {"train_images": packed_images.pack(rest[0] ^ 1)}
    np.savez(files[1], **changed)
    with pytest.raises(ValueError, match="must hold the train images that were packed"):
        packed_images.load(files)


def test_the_files_to_carry(tmp_path, monkeypatch, capsys):
    """Both of about one size, the test images in the first, so that it is enough to train on."""
    (x, y), test = split(50), split(10)
    train, test = (data.Arrays(images, labels.astype(np.int32)) for images, labels in ((x, y), test))
    monkeypatch.setattr(data, "load", lambda name, data_dir: data.Dataset(name, train, test, 10, None, None))
    assert accelerator.pack(tmp_path, "there") == 0
    first, second = (packed_images.load([tmp_path / f"cifar10-{n}.npz"]) for n in (1, 2))
    assert len(first["train"][1]) == 20 and len(first["test"][1]) == 10 and len(second["train"][1]) == 30
    assert "cifar10-2.npz: 0.0 MiB" in capsys.readouterr().out


def options_for(tmp_path, **others):
    return types.SimpleNamespace(out=tmp_path / "record", **{"small": False, "no_torch": True, **others})


def test_a_row_that_fails_is_kept_and_tried_again_last(tmp_path, monkeypatch):
    """Nothing is begun that would take too long, what failed does not block the rest, and a row is done once."""
    calls, clock = [], Clock()
    monkeypatch.setattr(accelerator, "time", types.SimpleNamespace(monotonic=clock))

    def failing():
        calls.append("a")
        clock.now += 20.0
        raise RuntimeError("out of memory")

    jobs = {"a": failing, "b": lambda: calls.append("b") or {"seconds": {}}}
    accelerator.work_on("steps", jobs, accelerator.Record(options_for(tmp_path)), 10.0)
    assert calls == ["a"]
    record = accelerator.Record(options_for(tmp_path))
    for _ in range(2):
        accelerator.work_on("steps", jobs, record, 100.0)
    assert calls == ["a", "a", "b"]
    made = json.loads((tmp_path / "record.json").read_text())
    assert [row.get("error") for row in made["rows"]] == ["RuntimeError: out of memory", None]
    assert len(made["calls"]) == 2 and made["wall_seconds"] >= 0
    record = accelerator.Record(options_for(tmp_path))
    assert record.is_done("b") and not record.is_done("a")
    accelerator.work_on("steps", jobs, record, 100.0)
    assert calls == ["a", "a", "b", "a"]


def test_a_call_that_is_killed_leaves_what_it_was_doing(tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accelerator.work_on("codecs", {"a": killed}, accelerator.Record(options_for(tmp_path)), 9.0)
    (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert row["error"] == "did not end"


def test_a_training_that_starts_anew_does_not_shorten_its_record(tmp_path):
    def epochs(count):
        def job(seconds, told):
            history = [{"epoch": n + 1, "seconds": 1.0} for n in range(count)]
            for n in range(count):
                told({"history": history[: n + 1]})
            return {"history": history}

        return job

    for count, known in ((3, 3), (2, 3), (0, 3), (4, 4)):
        accelerator.work_on("train", {"a": epochs(count)}, accelerator.Record(options_for(tmp_path)), 9.0)
        (row,) = json.loads((tmp_path / "record.json").read_text())["rows"]
        assert len(row["history"]) == known


def test_a_training_that_diverges_keeps_its_epochs_and_the_next_one_runs(tmp_path):
    def diverges(seconds, told):
        told({"history": [{"epoch": 1, "seconds": 1.0}]})
        raise ValueError("loss is NaN")

    def goes_on(seconds, told):
        return {"history": [{"epoch": 1, "seconds": 1.0}], "finished": True}

    accelerator.work_on("train", {"a": diverges, "b": goes_on}, accelerator.Record(options_for(tmp_path)), 9.0)
    first, second = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert first["error"] == "ValueError: loss is NaN" and len(first["history"]) == 1 and second["finished"]


def test_records_of_two_kinds_of_device_are_not_mixed(tmp_path):
    accelerator.work_on("steps", {"a": dict}, accelerator.Record(options_for(tmp_path)), 9.0)
    text = (tmp_path / "record.json").read_text()
    (tmp_path / "record.json").write_text(text.replace('"device": "', '"device": "another '))
    with pytest.raises(SystemExit, match="--out must name"):
        accelerator.Record(options_for(tmp_path))


def test_records_of_two_sizes_are_not_mixed(tmp_path, monkeypatch):
    accelerator.work_on("steps", {"a": dict}, accelerator.Record(options_for(tmp_path, small=True)), 9.0)
    with pytest.raises(SystemExit, match="--out must name a record without --small, or a new one"):
        accelerator.Record(options_for(tmp_path))
    monkeypatch.setattr(sys, "argv", ["experiments/accelerator.py", "--small"])
    used = []
    monkeypatch.setattr(accelerator, "run", lambda options: used.extend([options.out, options.work]))
    monkeypatch.setattr(accelerator, "table", str)
    monkeypatch.setattr(accelerator.json, "loads", lambda text: {"rows": []})
    with contextlib.suppress(FileNotFoundError):
        accelerator.main()
    assert [path.name for path in used] == ["accelerator_small", "accelerator_small"]


def test_a_row_without_pytorch_is_made_again_once_there_is_one(tmp_path, monkeypatch):
    accelerator.work_on("steps", {"a": dict}, accelerator.Record(options_for(tmp_path)), 9.0)
    assert accelerator.Record(options_for(tmp_path)).is_done("steps: a") is False  # of another name
    monkeypatch.setattr(accelerator, "has_torch", lambda: True)
    for no_torch, done in ((True, True), (False, False)):
        assert accelerator.Record(options_for(tmp_path, no_torch=no_torch)).is_done("a") is done


def test_a_training_that_was_stopped_in_its_first_epoch_goes_on(tmp_path):
    """It writes down what it has when it is restored, which is no epoch yet."""
    told, folder = [], accelerator_jobs._Told(tmp_path)
    folder.told = told.append
    folder.write_history([])
    assert told == []
    folder.write_history([{"epoch": 1}])
    assert told == [[{"epoch": 1}]]


@pytest.fixture
def no_claims(monkeypatch):
    """Their table takes long, and other tests hold it."""
    monkeypatch.setattr(report.claims, "page", lambda results: "")


def test_what_was_not_run_is_said(tmp_path, no_claims):
    text, _ = report.page(tmp_path, scales=["smoke"])
    assert "## On a GPU" in text and "There is no record: not run." in text


@pytest.mark.slow
def test_a_second_call_goes_on(tmp_path, monkeypatch, capsys, no_claims):
    """The first is stopped in the middle of a training; the second measures nothing twice and ends it."""
    parts = [tmp_path / "1.npz", tmp_path / "2.npz"]
    packed_images.save(parts[0], train=split(24), test=split(16))
    packed_images.save(parts[1], train=split(24))
    results = tmp_path / "results"
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(accelerator_jobs, "CODECS", ())
    monkeypatch.setattr(accelerator_jobs, "NAMES", {accelerator_jobs.NONE: "none", accelerator_jobs.MS: "MS"})
    arguments = ["--small", "--no-torch", "--stages", "codecs", "train", "--data", *map(str, parts)]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(results / "accelerator")]
    monkeypatch.setattr(sys, "argv", ["experiments/accelerator.py", *arguments])
    told = accelerator_jobs._Told.write_history

    def stop_at_once(folder, history):
        told(folder, history)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(accelerator_jobs._Told, "write_history", stop_at_once)
    assert accelerator.main() == 0
    rows = {row["name"]: row for row in json.loads((results / "accelerator.json").read_text())["rows"]}
    trainings = {row["codec"]: row for row in rows.values() if row["stage"] == "train"}
    assert {codec: len(row["history"]) for codec, row in trainings.items()} == {"none": 1, "MS": 1}
    assert not any(row["finished"] for row in trainings.values())
    assert rows["codecs: MS, float32"]["finished"] and rows["codecs: MS, bfloat16"]["encode_seconds"] > 0

    monkeypatch.setattr(accelerator_jobs._Told, "write_history", told)
    monkeypatch.setattr(accelerator_jobs, "measure_codec", lambda *args: pytest.fail("was measured before"))
    assert accelerator.main() == 0
    made = json.loads((results / "accelerator.json").read_text())
    trainings = [row for row in made["rows"] if row["stage"] == "train"]
    assert all(row["finished"] and len(row["history"]) == 2 for row in trainings)
    assert {(row["train_samples"], row["test_samples"]) for row in trainings} == {(48, 16)}
    assert "| none | 48 | 2 of 2 |" in capsys.readouterr().out
    text, _ = report.page(results, scales=["smoke"])
    assert "steps: not run." in text and "On cpu." in text and "| MS | float32 |" in text


@pytest.mark.slow
def test_steps_beside_pytorch():
    pytest.importorskip("torch", reason="needs the extra `bench`")
    made = {}
    args = ("vgg19", 2, 4, "bfloat16", accelerator_jobs.MS, accelerator_jobs.small(), made)
    row = accelerator_jobs.measure_steps(*args)
    names = ["msjax", "PyTorch, plain", "PyTorch, channels last", "PyTorch, channels last, with MS"]
    assert list(row["seconds"]) == names and row["torch_errors"] == {} and min(row["seconds"].values()) > 0
    assert accelerator.step_table([row]).splitlines()[2].startswith("| vgg19 | 2 × 2 | bfloat16 | MS | ")
    names = [name for name, _ in accelerator_jobs.training_steps(accelerator_jobs.full(), True)]
    assert len(set(names)) == len(names) == 36 and names[0] == "resnet18, 1 × 256, tf32, none"

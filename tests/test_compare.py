"""`msjax compare` and `msjax runs`: what they say of run folders, also of unfinished and damaged ones."""

import json
import math
import pathlib
import shutil

import numpy as np
import pytest
from flax import linen

import msjax
from msjax import compress, config
from msjax.cli import main as cli
from msjax.runs import RunFolder

from .own_models import numbers

UPLINK, DOWNLINK = 8_000_000, 4_000_000


def make_run(out, name, *, epochs=2, done=2, codec=None, coded=None, headline="top1_percent", seed=0, metric=40.0):
    """A run folder as training leaves it, without training."""
    cfg = config.Config(out=str(out), epochs=epochs, codec=codec or compress.Identity(), compare=False, seed=seed)
    folder = RunFolder.create(cfg, name)
    history = []
    for epoch in range(1, done + 1):
        traffic = {"uplink_feature_bytes": UPLINK, "uplink_gradient_bytes": 0, "uplink_label_bytes": 1000}
        traffic |= {"uplink_synchronization_bytes": 500, "downlink_synchronization_bytes": 500}
        traffic |= {"downlink_feature_bytes": 0, "downlink_gradient_bytes": DOWNLINK, "paper_bytes": UPLINK}
        traffic |= {"uplink_bytes": UPLINK + 1500, "downlink_bytes": DOWNLINK + 500}
        if coded:
            traffic |= {"coded_uplink_bytes": coded[0], "coded_downlink_bytes": coded[1]}
        metrics = {"loss": 1 / epoch, headline: metric + epoch}
        record = {"epoch": epoch, "step": 9 * epoch, "train": metrics, "test": metrics}
        history.append(record | {"traffic": {k: v * epoch for k, v in traffic.items()}, "seconds": 1.5 * epoch})
    if done:
        folder.write_history(history)
    if done == epochs:
        folder.write_summary({"headline": headline})
    folder.close()
    return str(folder.path)


def said(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_runs_beside_each_other(tmp_path, capsys):
    plain = make_run(tmp_path, "plain")
    coded = make_run(tmp_path, "coded", codec=compress.EntropyMask(bits=1.6), coded=(400_000, 200_000))
    assert cli.run("compare", [plain, coded, "--json"]) == 0
    one, other = said(capsys)
    assert one["cut_bytes"] == 2 * (UPLINK + DOWNLINK) and one["total_bytes"] == one["cut_bytes"] + 2 * 2000
    assert other["cut_bytes"] == 2 * 600_000 and other["total_bytes"] == 2 * 602_000
    assert other["codec"] == str(compress.EntropyMask(bits=1.6)) and other["test"]["top1_percent"] == 42.0
    assert one["epochs"] == one["of_epochs"] == 2 and one["finished"]
    picture = tmp_path / "both.png"
    assert cli.run("compare", [plain, coded, "--out", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "42.00" in table and "20.00×" in table and f"{one['total_bytes'] / other['total_bytes']:.2f}×" in table
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "are those of messages, entropy-coded, in coded, and of payloads in the others" in " ".join(table.split())
    assert cli.run("compare", [plain, plain, "--out", str(tmp_path / "both.pdf")]) == 0
    assert "entropy-coded" not in capsys.readouterr().out and (tmp_path / "both.pdf").read_bytes().startswith(b"%PDF")


def test_runs_of_several_seeds_are_one(tmp_path, capsys):
    plain = [make_run(tmp_path, f"plain{seed}", seed=seed, metric=40.0 + seed) for seed in range(3)]
    masked = [make_run(tmp_path, "masked", codec=compress.MaskEncoded(), metric=30.0)]
    assert cli.run("compare", [*plain, *masked, "--by-seed", "--json"]) == 0
    one, other = said(capsys)
    assert (one["runs"], one["seeds"], one["mean"], one["deviation"]) == (plain, [0, 1, 2], 43.0, 1.0)
    assert (other["runs"], other["mean"], other["deviation"]) == (masked, 32.0, None)
    assert one["total_bytes"] == other["total_bytes"] and one["codec"] == str(compress.Identity())
    picture = tmp_path / "seeds.svg"
    assert cli.run("compare", [plain[0], *masked, *plain[1:], "--by-seed", "--out", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "43.00 ± 1.00 (3)" in table and "32.00" in table and "plain0 and 2 more" in table and picture.exists()
    for runs, message in (
        (
            [plain[0], plain[0]],
            "runs that differ in nothing must have other seeds, got plain0, plain0",
        ),
        (
            [plain[0], make_run(tmp_path, "short", seed=5, done=1)],
            "equally many epochs, got plain0 of 2/2, short of 1/2",
        ),
    ):
        assert cli.run("compare", [*runs, "--by-seed"]) == 2
        assert message in capsys.readouterr().err


def test_a_run_that_diverged_has_no_mean(tmp_path, capsys):
    runs = [make_run(tmp_path, f"run{seed}", seed=seed, metric=value) for seed, value in enumerate((math.nan, 40.0))]
    assert cli.run("compare", runs) == 0
    table = capsys.readouterr().out
    assert "42.00" in table and "–" in table
    assert cli.run("compare", [*runs, "--by-seed", "--json"]) == 0
    (both,) = said(capsys)
    assert both["seeds"] == [0, 1] and both["mean"] is both["deviation"] is None
    small = [make_run(tmp_path, f"s{seed}", seed=seed, metric=seed / 1e3, headline="rmse", done=1) for seed in range(2)]
    assert cli.run("compare", [*small, "--by-seed"]) == 0
    assert "± 0.0007071 (2)" in capsys.readouterr().out


def test_runs_of_other_data_are_others(tmp_path, capsys):
    runs = [make_run(tmp_path, f"run{seed}", seed=seed) for seed in range(2)]
    for run, digest in zip(runs, "ab", strict=True):
        (pathlib.Path(run) / "data.json").write_text(json.dumps({"train": digest, "test": "c"}))
    assert cli.run("compare", [*runs, "--by-seed", "--json"]) == 0
    assert [one["seeds"] for one in said(capsys)] == [[0], [1]]


def test_runs_from_python_are_shown_like_others(tmp_path, capsys, unchecked):
    parts, options = (linen.Dense(4), linen.Dense(1)), {"task": "regression", "clients": 2, "batch_size": 8}
    mine = tmp_path / "mine"
    codec = compress.EntropyMask(bits=3.0, signed=True)
    mode = msjax.modes.SplitFed(2, client_fraction=0.5)
    result = msjax.train(parts, numbers(40), codec=codec, epochs=1, folder=mine, mode=mode, **options)
    assert cli.run("runs", [str(tmp_path), "--json"]) == 0
    (run,) = said(capsys)
    assert (run["model"], run["codec"], run["of_epochs"], run["finished"]) == (None, str(codec), 1, True)
    assert run["train"] == result.history[-1]["train"] and run["clients"] == 2
    other = shutil.copytree(mine, tmp_path / "other")  # of another seed, from which the mode draws, too
    spec = (other / "spec.json").read_text()
    (other / "spec.json").write_text(spec.replace("seed=0", "seed=1").replace('"seed": 0', '"seed": 1'))
    assert cli.run("compare", [str(mine), str(other), "--by-seed", "--json"]) == 0
    (both,) = said(capsys)
    assert both["seeds"] == [0, 1]
    shutil.rmtree(other)
    plain = make_run(tmp_path, "plain", headline=run["headline"])
    assert cli.run("compare", [plain, str(mine)]) == 0
    assert "EntropyMask(bits=3.0" in capsys.readouterr().out
    assert cli.run("runs", [str(tmp_path)]) == 0
    assert cli.run("predict", [str(mine), "x.npz"]) == 2
    assert "of a run from Python, which has no config: msjax.load_part reads its parts" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"inputs must be a batch as the data set stores it, got float32\[2, 3\]"):
        result.predict(np.ones((2, 3), np.float32))
    (mine / "spec.json").write_text("{")
    assert cli.run("runs", [str(tmp_path)]) == 2
    assert "spec.json must be an object in JSON" in capsys.readouterr().err


def test_runs_are_listed(tmp_path, capsys):
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", done=1)
    make_run(tmp_path, "c", done=0)
    assert cli.run("runs", [str(tmp_path), "--json"]) == 0
    found = said(capsys)
    assert [(run["epochs"], run["finished"]) for run in found] == [(2, True), (1, False), (0, False)]
    assert cli.run("runs", [str(tmp_path)]) == 0
    assert "1/2" in capsys.readouterr().out
    (tmp_path / "a" / "metrics.jsonl").write_text("{")
    assert cli.run("runs", [str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "1/2" in shown.out and "metrics.jsonl must be an object in JSON" in shown.err
    (tmp_path / "none").mkdir()
    assert cli.run("runs", [str(tmp_path / "none")]) == 0
    assert "no run folders" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{out}/nowhere"], "the run must be a folder with config.json"),
        (["{out}/a", "{out}/begun"], "each run must have finished an epoch"),
        (["{out}/a", "{out}/other"], "the runs must have the same first metric, got mae, top1_percent"),
        (["{out}/a", "--out", "{out}/a.jpg"], "--out must be a file that ends in .png, .pdf or .svg"),
        (["{out}/a", "--out", "{out}/nowhere/a.png"], "--out must be a file that can be written"),
    ],
)
def test_what_cannot_be_compared(arguments, error, tmp_path, capsys):
    make_run(tmp_path, "a")
    make_run(tmp_path, "begun", done=0)
    make_run(tmp_path, "other", headline="mae")
    assert cli.run("compare", [argument.format(out=tmp_path) for argument in arguments]) == 2
    assert error in capsys.readouterr().err


def test_no_folder_of_runs(tmp_path, capsys):
    assert cli.run("runs", [str(tmp_path / "nowhere")]) == 2
    assert "folder must be one that has run folders" in capsys.readouterr().err

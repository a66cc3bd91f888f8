"""The examples run, at small size, and stay short."""

import importlib.util
import json
import pathlib

import pytest

from msjax.cli import main as cli

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.slow
def test_cnn_npz(capsys):
    results = load("cnn_npz").main(["--epochs", "1"])
    sent = {name: result.traffic.uplink_feature_bytes for name, result in results.items()}
    assert 13 < sent["none"] / sent["MS"] < 14
    assert "MB of features sent" in capsys.readouterr().out


@pytest.mark.slow
def test_regression_csv():
    result = load("regression_csv").main(["--epochs", "4"])
    losses = [record["train"]["loss"] for record in result.history]
    assert losses[-1] < losses[0] and result.test["rmse"] > 0


@pytest.mark.slow
def test_own_loop(capsys):
    losses = load("own_loop").main(steps=40)
    assert sum(losses[-5:]) < sum(losses[:5]) / 3
    assert 30 < float(capsys.readouterr().out.partition("; ")[2].partition(" ")[0]) < 50


@pytest.mark.slow
def test_unet_segmentation():
    result = load("unet_segmentation").main(["--epochs", "1", "--images", "80"])
    assert set(result.spec.features.names) == {"h", "skip"}
    assert result.test["mean_iou_percent"] > 20


@pytest.mark.slow
def test_own_model_over_network_in_one_program(tmp_path, capsys):
    """Over a network it runs in `test_processes`."""
    preset = str(EXAMPLES / "own_model_over_network.py")
    options = ["--config", preset, "--epochs", "2", "--out", str(tmp_path), "--name", "own"]
    assert cli.run("train", options) == 0
    assert "mae" in capsys.readouterr().out
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert summary["headline"] == "mae" and summary["test"]["mae"] < 2
    assert cli.run("eval", [str(tmp_path / "own")]) == 0
    assert json.loads(capsys.readouterr().out)["mae"] == summary["test"]["mae"]

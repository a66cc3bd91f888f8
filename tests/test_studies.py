"""Studies at smoke scale: runs are done once, go on after an interruption, and a report comes of what there is."""

import argparse
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest

from experiments import (
    arithmetic_coder,
    both_directions,
    contexts,
    convergence,
    driver,
    entropy_variants,
    report,
    study,
    traffic,
)
from msjax import compress, config
from msjax.training.from_config import load_run

HALF_SHARE = 359
"""Samples of a client of digits, of two clients, over two."""


@pytest.mark.parametrize("module", report.STUDIES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("scale", study.SCALES)
def test_runs_differ_and_their_names_say_how(module, scale):
    found = module.runs(scale)
    keys = {study.key(cfg) for cfg in found.values()}
    assert len(keys) == len(found)


def test_the_key_of_a_run():
    """It does not depend on where things lie, nor on fields that are as by default; on everything else it does."""
    cfg = study.base("lite")
    data = dataclasses.replace(cfg.data, data_dir="/a", cache_dir="/b")
    assert study.key(dataclasses.replace(cfg, data=data, out="/c")) == study.key(cfg)
    assert study.key(study.with_cut(cfg, "deep")) != study.key(cfg)
    assert study.key(dataclasses.replace(cfg, seed=1)) != study.key(cfg)
    assert study._differing({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}}) == {"b": {"d": 3}}
    assert study._differing({"a": {"b": 1}}, {"a": {"b": 1}}) == {}


def test_each_network_has_a_run_without_compression():
    """One for all cuts, and where the paper's cut makes another network of a ResNet one of its own."""
    found = {name for name in convergence.runs("paper") if "none" in name}
    plain = {f"{setting}, none, medium, seed 0" for setting in convergence.settings("paper")}
    assert found == plain | {
        f"{setting}, none, shallow, seed 0" for setting in convergence.settings("paper") if "ResNet" in setting
    }
    records = {"none, shallow": ["shallow"], "none, medium": ["medium"], "MS, deep": ["ms"]}
    assert [study.at_cut(records, "none", cut) for cut in study.CUTS] == [["shallow"], ["medium"], ["medium"]]
    assert [study.at_cut(records, "MS", cut) for cut in study.CUTS] == [[], [], ["ms"]]


def test_every_record_is_found_by_its_config():
    """If this fails after a change of a default in `Config`: let the studies set the old value, or run them again."""
    for scale in (*study.SCALES, study.LOSSY):
        for file in (study.RESULTS / scale).glob("*.json"):
            made = json.loads(file.read_text())
            cfg = config.from_json(made["config"], own_code=True)
            assert study.key(study.Measured(cfg, made["by"]) if "by" in made else cfg) == file.stem
            assert made["config"]["data"].get("data_dir") is None
            assert made["wall_seconds"] > 0 and made["command"].startswith("python -m experiments.")


@pytest.mark.slow
def test_a_run_is_done_once_and_reported(tmp_path, capfd, monkeypatch):
    arguments = ["--scale", "smoke", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    name = "MS up, medium, seed 0"
    monkeypatch.setattr(sys, "argv", ["experiments/both_directions.py", *arguments, "--only", name])
    assert driver.main(both_directions) == 0
    assert f"{name}: done; 0 runs to go" in capfd.readouterr().out
    (file,) = (tmp_path / "results" / "smoke").iterdir()
    made = json.loads(file.read_text())
    assert 1.8 < study.saved(made) < 1.9
    assert 1.0 < study.saved(made, everything=True) < study.saved(made)
    assert made["environment"]["packages"]["jax"] and len(made["history"]) == made["config"]["epochs"]
    assert made["command"] == "python -m experiments.both_directions --scale smoke"

    assert driver.main(both_directions) == 0
    output = capfd.readouterr().out
    assert "1 runs at scale smoke, 0 to go" in output
    assert f"| medium | MS up | 1 | {made['test']['top1_percent']:.2f} |" in output


def test_several_studies_at_once(tmp_path, capfd, monkeypatch):
    """Runs of the same name in two studies are two runs; with all records there, nothing is left to do."""
    wanted = ["compression_error", "distributions"]
    results = tmp_path / "results"
    arguments = [*wanted, "--scale", "smoke", "--results", str(results), "--only", "distributions: seed 0", "none"]
    monkeypatch.setattr(sys, "argv", ["experiments/run.py", *arguments])
    asked = {}
    monkeypatch.setattr(driver, "run_missing", lambda scale, wanted, **options: asked.update(wanted) or 0)
    assert driver.main(*report.STUDIES) == 0
    assert asked.keys() == {"distributions: seed 0"}
    arguments = arguments[: arguments.index("--only")]
    monkeypatch.setattr(sys, "argv", ["experiments/run.py", *arguments])
    assert driver.main(*report.STUDIES) == 0
    assert asked.keys() == {"distributions: seed 0", "compression_error: seed 0"}
    assert len({study.key(run) for run in asked.values()}) == 2
    assert all(f"## {module.TITLE}" in capfd.readouterr().out for module in report.STUDIES[:1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(["--only", "nothing"], "--only"), (["--jobs", "0"], "--jobs"), (["studio"], "STUDY must be one of")],
)
def test_wrong_options(wrong, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/run.py", *wrong])
    with pytest.raises(SystemExit):
        driver.main(*report.STUDIES)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_every_study_at_smoke_scale_is_in_the_report(tmp_path):
    """Each network is built and each measurement done; one network a codec is trained, for the records of all.

    In two steps of half the samples each: a last step that is smaller would be a program of its own.
    """
    results = tmp_path / "results"
    (results / "smoke").mkdir(parents=True)
    options = argparse.Namespace(data_dir=None, cache_dir=None, out=str(tmp_path / "runs"))
    trained = {}

    def do(run):
        return driver.do("smoke", driver._placed(run, options), "python -m experiments.some", tmp_path / "shorter")

    for module in report.STUDIES:
        for run in module.runs("smoke").values():
            if study.record("smoke", run, results) is not None:
                continue
            if isinstance(run, study.Measured):
                cfg = run.config
                made = do(run._replace(config=dataclasses.replace(cfg, batch_size=HALF_SHARE)))
            else:
                cfg, codecs = run, (type(run.codec), type(run.grad_codec))
                load_run(cfg)
                if codecs not in trained:
                    trained[codecs] = do(dataclasses.replace(cfg, batch_size=HALF_SHARE))
                made = trained[codecs]
            whole = made | {"config": config.to_json(config.without_paths(cfg))}
            (results / "smoke" / f"{study.key(run)}.json").write_text(json.dumps(whole))
    text, figures = report.page(results, scales=["smoke"])
    for module in report.STUDIES:
        assert f"## {module.TITLE}" in text
    assert "Not run" not in text and "python -m experiments." in text and "| QU at equal bits | medium |" in text
    for name in figures:
        assert f"({name})" in text
    assert set(re.findall(r"\(([^)]*\.png)\)", text)) == set(figures)
    page = report.html(text, figures)
    assert page.count("data:image/png;base64,") == text.count(".png)") and "<table>" in page
    # The codecs' bytes are what the paper says, in the report as everywhere.
    made = study.record("smoke", both_directions.runs("smoke")["MS up, medium, seed 0"], results)
    assert 13 < made["uncompressed_feature_bytes"] / made["traffic"]["uplink_feature_bytes"] < 14


def test_traffic_to_accuracy():
    """Of made-up records of three epochs: what reaches the target earlier saves more, what never does is INF."""

    def made(top1, coded=()):
        history = [
            {
                "epoch": n + 1,
                "test": {"top1_percent": value},
                "traffic": {
                    "uplink_feature_bytes": 10 * (n + 1),
                    "downlink_gradient_bytes": 100 * (n + 1),
                    "uplink_label_bytes": 1 * (n + 1),
                    "uplink_synchronization_bytes": 10 * (n + 1),
                    "downlink_synchronization_bytes": 11 * (n + 1),
                }
                | (
                    {"coded_uplink_bytes": coded[0] * (n + 1), "coded_downlink_bytes": coded[1] * (n + 1)}
                    if coded
                    else {}
                ),
            }
            for n, value in enumerate(top1)
        ]
        return {"history": history, "uncompressed_feature_bytes": 300, **history[-1]}

    plain = made([50, 60, 70])
    assert traffic.saving(made([50, 60, 70]), plain, 0.0) == pytest.approx((10, 200 / 110, 222 / 132))
    assert traffic.saving(made([50, 71, 60]), plain, 0.0) == pytest.approx((15, 600 / 220, 666 / 264))
    assert traffic.saving(made([50, 60, 69.5]), plain, 0.0) == (None, None, None)
    assert traffic.saving(made([50, 60, 69.5]), plain, 1.0) == pytest.approx((10, 200 / 110, 222 / 132))
    assert traffic.saving(made([50, 60, 70], coded=(4, 6)), plain, 0.0) == pytest.approx((25, 20, 222 / 32))
    assert traffic._mean([None, None]) == "INF" and traffic._mean([2.0, 4.0]) == "3.00×"
    assert traffic._mean([None, 4.0]) == "INF (1 of 2 reach it)"


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path):
    cfg = dataclasses.replace(study.base("smoke"), epochs=400, out=str(tmp_path / "runs"))
    program = [sys.executable, "-m", "experiments.driver", "smoke", str(tmp_path / "results"), "a command"]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps({"config": config.to_json(cfg), "by": None}))
    process.stdin.close()
    lines = tmp_path / "runs" / study.key(cfg) / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not lines.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == driver.INTERRUPTED
    done = len(lines.read_text().splitlines())
    assert 0 < done < 400 and not (tmp_path / "results").exists()
    # With as many epochs as were done, what is left is to say so.
    folder = lines.parent
    shorter = dataclasses.replace(cfg, epochs=done + 1)
    folder.rename(folder.parent / study.key(shorter))
    (folder.parent / study.key(shorter) / "config.json").write_text(config.to_text(shorter))
    text = json.dumps({"config": config.to_json(shorter), "by": None})
    subprocess.run(program, input=text, text=True, check=True, timeout=300)
    made = study.record("smoke", shorter, tmp_path / "results")
    assert [epoch["epoch"] for epoch in made["history"]] == list(range(1, done + 2))


@pytest.mark.slow
def test_a_run_that_fails_does_not_keep_others_from_running(tmp_path, capfd):
    cfg = dataclasses.replace(study.base("smoke"), out=str(tmp_path / "runs"))
    wrong = study.with_cut(cfg, "nowhere")
    code = driver.run_missing(
        "smoke", {"wrong": wrong, "right": cfg}, command="c", results=tmp_path / "results", jobs=2
    )
    output = capfd.readouterr().out
    assert code == 1 and "wrong: failed" in output and "right: done" in output
    assert study.record("smoke", cfg, tmp_path / "results")["command"] == "c"
    assert study.record("smoke", wrong, tmp_path / "results") is None
    assert driver.run_missing("smoke", {"wrong": wrong}, command="c", results=tmp_path / "results") == 1


SYNCHRONIZATION = ("uplink_synchronization_bytes", "downlink_synchronization_bytes")


def test_bytes_and_points_of_both_directions():
    """Of made-up records: bytes both ways, coded ones where there are any, and losses in pairs of seeds."""

    def made(seed, top1, up, down, **coded):
        traffic = {"uplink_feature_bytes": up, "downlink_gradient_bytes": down, **coded}
        traffic |= {"uplink_label_bytes": 0, **dict.fromkeys(SYNCHRONIZATION, 450e6)}
        return {
            "traffic": traffic,
            "test": {"top1_percent": top1},
            "config": {"seed": seed},
            "uncompressed_feature_bytes": 1000e6,
        }

    records = {
        "none, medium, seed 0": made(0, 80.0, 1000e6, 1000e6),
        "none, medium, seed 1": made(1, 82.0, 1000e6, 1000e6),
        "EntropyMask 2.0 up 1.1 down, deep, seed 0": made(
            0, 79.0, 200e6, 300e6, coded_uplink_bytes=40e6, coded_downlink_bytes=60e6
        ),
        "EntropyMask 2.0 up 1.1 down, deep, seed 1": made(
            1, 80.8, 200e6, 300e6, coded_uplink_bytes=40e6, coded_downlink_bytes=60e6
        ),
    }
    page = both_directions.report("lite", records)
    assert "| medium | none | 2 | 81.00 ± 1.41 | 2,000 | 1.00× | 1.00× | 0.00 ± 0.00 |" in page.text
    assert "| deep | EntropyMask 2.0 up 1.1 down | 2 | 79.90 ± 1.27 | 100 | 20.00× | 2.90× | 1.10 ± 0.14 |" in page.text
    assert isinstance(page.figures["both_directions"], matplotlib.figure.Figure)
    assert "| cut |" in both_directions.report("lite", {}).text


@pytest.mark.slow
def test_variants_of_entropy_mask():
    """The base is the codec itself; contexts help where neighbours are alike, and nowhere else."""
    rng = np.random.default_rng(0)
    h = np.maximum(rng.normal(size=(16, 16, 16, 16)), 0).astype(np.float32)
    single, contexts = "entropy of single codes (rANS)", "entropy, contexts of neighbours"
    found = entropy_variants.compare(h, (entropy_variants.BASE, single, contexts))
    (bits, finer) = found[entropy_variants.BASE]
    measured = entropy_variants.rate_distortion.measure(h, compress.EntropyMask(error=0.07))
    assert measured["error"] == pytest.approx(0.07, rel=0.05)
    assert bits == pytest.approx(measured["bits"], rel=0.03) and finer > bits
    assert found[single][0] == pytest.approx(bits, rel=0.08) and found[single][0] < found[contexts][0]
    blocks = np.repeat(np.repeat(rng.random((16, 4, 4, 16)) < 0.3, 4, 1), 4, 2)
    codes = entropy_variants.uniform(np.where(blocks, h + 1, 0), 0.5)[0]
    assert entropy_variants.entropy(codes, entropy_variants.neighbours(codes)) < 0.8 * entropy_variants.entropy(codes)


@pytest.mark.parametrize("name", entropy_variants.VARIANTS)
def test_every_variant_measures(name):
    h = np.maximum(np.random.default_rng(0).normal(size=(4, 8, 8, 12)), 0)
    (bits, error), (fewer, more) = (entropy_variants.VARIANTS[name](h, step) for step in (0.2, 1.5))
    assert 0 < fewer < bits < 16 and 0 <= error < more < 1


def test_entropy_of_a_coin():
    codes = np.random.default_rng(0).integers(0, 2, 1 << 16)
    assert entropy_variants.entropy(codes) == pytest.approx(codes.size, rel=1e-3)
    assert entropy_variants.entropy(codes, codes) < 40  # known from its context, but for the statistics
    assert entropy_variants.entropy_of_pairs(codes) == pytest.approx(codes.size, rel=2e-3)


def test_what_neighbours_save_is_measured():
    """On blocks of equal values; what is called today is zlib's Huffman code or runs."""
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.repeat(rng.random((8, 4, 4, 16)) < 0.3, 4, 1), 4, 2)
    h = np.where(blocks, rng.random(blocks.shape) + 1, 0).astype(np.float32)
    codec = contexts.FEATURES[1]
    row = contexts.measure(h, codec, 1) | {"source": "blocks", "samples": 8, "codec": "E", "values": h.size}
    found = row["bytes"]
    assert found["left and above, 16 classes"] < 0.8 * found["today"]
    assert row["version"] == 3 and row["message_bytes"] < found["today"]
    assert "| blocks, 8 samples, E |" in contexts.table([row])


def test_an_arithmetic_coder_comes_close_to_the_entropy():
    pytest.importorskip("constriction", reason="needs the extra `bench`")
    rng = np.random.default_rng(0)
    h = np.maximum(rng.normal(size=(8, 16, 16, 16)), 0).astype(np.float32)
    row = arithmetic_coder.measure(h, compress.EntropyMask(bits=0.5), 1) | {"source": "noise", "codec": "E"}
    payload = compress.EntropyMask(bits=0.5).encode(jnp.asarray(h))
    counts = np.bincount(np.asarray(payload.codes))
    counts = counts[counts > 0]
    entropy = counts @ np.log2(counts.sum() / counts) / 8
    tables = 1.5 * len(counts)
    assert row["bytes"]["one table"] == pytest.approx(entropy + tables, rel=0.01)
    assert row["bytes"]["one table"] < 0.95 * row["bytes"]["wire"]
    assert "| noise, E |" in arithmetic_coder.table([row])

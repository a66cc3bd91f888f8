"""A decoder that was trained by adapters, in use: predictions and tests of texts, and a folder for transformers."""

import contextlib
import dataclasses
import json
import shutil
import warnings

import jax
import numpy as np
import pytest

from msjax import build, config, data, models, pair
from msjax.cli import main as command_line
from msjax.runs import RunFolder
from msjax.training import from_config

from . import language


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, and that of the weights that it began with."""
    home = tmp_path_factory.mktemp("use")
    folder = language.make_folder(home / "model")
    lora = config.LoraConfig(rank=2, targets=("q_proj", "up_proj"))
    cfg = language.config_of(folder, lora=lora, epochs=1, out=str(home / "runs"))
    cfg = build.resolved(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir=str(home / "cache"))))
    with contextlib.closing(RunFolder.create(cfg, "run")) as made:
        from_config.train_config(cfg, made, quiet=True)
    return made.path, folder


def merged_logits(run, folder, tokens):
    """What the network computes whole, with its adapters merged."""
    network = models.decoder(models.DecoderConfig.load(folder), length=len(tokens))
    whole = models.load_weights(folder, network)
    return np.asarray(jax.jit(lambda p, x: whole.apply(p, {}, x, train=False)[0])(whole.params, tokens[None])[0])


def test_an_exported_folder_has_the_tokenizer_and_predicts_the_same(run, tmp_path, capsys):
    path, folder = run
    out = tmp_path / "out"
    assert command_line.run("export", [str(path), "--out", str(out)]) == 0
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    text = tmp_path / "texts.txt"
    text.write_text("abcde\n\nfgh\n")
    capsys.readouterr()
    assert command_line.run("predict", [str(path), str(text), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["input"] for record in records] == [f"{text}:1", f"{text}:3"]
    for record, letters in zip(records, ("abcde", "fgh"), strict=True):
        tokens = np.int32([1, *(2 + language.LETTERS.index(letter) for letter in letters)])
        logits = merged_logits(run, out, tokens)
        logs = np.asarray(jax.nn.log_softmax(logits))
        assert record["tokens"] == len(tokens) and record["next_token"] == logits[-1].argmax()
        nats = -np.mean([logs[at, token] for at, token in enumerate(tokens[1:])])
        np.testing.assert_allclose(record["perplexity"], np.exp(nats), rtol=1e-4)
        np.testing.assert_allclose(record["probability"], np.exp(logs[-1].max()), rtol=1e-4)


def test_a_run_is_tested_on_its_own_text_and_on_another(run, tmp_path, capsys):
    path, _ = run
    summary = json.loads((path / "summary.json").read_text())
    found = []
    text = tmp_path / "other.txt"
    text.write_text(language.LETTERS[::-1] * 10)
    for options in ([], ["--test", str(text)]):
        capsys.readouterr()
        assert command_line.run("eval", [str(path), *options]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    np.testing.assert_allclose(found[0], summary["test"]["perplexity"], rtol=1e-5)
    assert abs(found[1] / found[0] - 1) > 0.01


@pytest.mark.slow
def test_a_run_goes_on_where_its_files_are_now(run, tmp_path, capsys):
    """The weights, beside which the adapters are, and the text; others in their place are told."""
    path, folder = run
    mine = tmp_path / "run"
    shutil.copytree(path, mine)
    moved = language.copy(folder, tmp_path / "elsewhere")
    text = moved.parent / "text.txt"
    cfg = config.load(mine / "config.json")
    gone = tmp_path / "gone"
    missing = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, weights=str(gone / moved.name)),
        data=dataclasses.replace(cfg.data, name=str(gone / text.name), tokenizer=str(gone / moved.name)),
    )
    (mine / "config.json").write_text(config.to_text(missing))
    resume = ["train", "--resume", str(mine), "--epochs", "2"]
    now = [f"--model.weights={moved}", f"--data.name={text}", f"--data.tokenizer={moved}"]

    def refused(arguments):
        assert command_line.run(*(arguments[0], arguments[1:])) == 2
        return capsys.readouterr().err

    assert "model.weights" in refused([*resume, *now[1:]])
    assert "--model.weights must be where the weights" in refused([*resume, f"--model.weights={tmp_path}", *now[1:]])
    whole = text.read_text()
    text.write_text(whole[::-1])
    assert "data must be those that the run began with, got others to train and test" in refused([*resume, *now])
    text.write_text(whole)
    assert command_line.run("train", ["--resume", str(mine), *now]) == 0
    assert command_line.run("train", resume[1:]) == 0  # they are known from now on
    assert RunFolder(mine).read_summary()["config"]["model"]["weights"] == str(moved)


def test_what_cannot_be_predicted_from_is_named(run, tmp_path, capsys):
    path, folder = run
    parts = [str(path / f"{part}.safetensors") for part in ("client", "server")]
    text = tmp_path / "texts.txt"
    for content, options, message in (
        ("abc" * 5, [], "inputs must have texts of 1 to 12 tokens, as the run's, got 16 in"),
        ("\n", [], "inputs must have text, got none in"),
        ("abc", [*parts, str(text)], "tokenizer must be a tokenizer.json, or a folder that has one, got 'model'"),
    ):
        text.write_text(content)
        assert command_line.run("predict", options or [str(path), str(text)]) == 2
        assert message in capsys.readouterr().err
    assert command_line.run("predict", [*parts, str(text), "--tokenizer", str(folder)]) == 0
    other = language.copy(folder, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"j"', '"z"'))
    capsys.readouterr()
    assert command_line.run("predict", [*parts, str(text), "--tokenizer", str(other)]) == 2
    assert "data.tokenizer must be that of the run, of hash sha256:" in capsys.readouterr().err


def test_a_tokenizers_hash_is_of_what_it_makes_of_texts(run, tmp_path):
    _, folder = run
    text = tmp_path / "text.txt"
    text.write_text(language.LETTERS * 3)
    options = {"length": 4, "cache_dir": tmp_path / "cache"}
    own = data.from_text(text, tokenizer=folder, **options).tokenizer
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    cut = tmp_path / "tokenizer.json"
    cut.write_text(json.dumps(tree, indent=1))
    assert data.from_text(text, tokenizer=cut, start=1, **options).tokenizer == own
    assert data.from_text(text, tokenizer=folder, start=2, **options).tokenizer != own


def test_transformers_computes_the_same_with_the_exported_folder(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'msjax[bench]'")
        transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'msjax[bench]'")
        path, _ = run
        trained = pair.load_pair(path)
        assert pair.save_network(tmp_path / "out", trained) == "pytorch"
        network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "tokenizer.json"))
        tokens = np.int32([1, *tokenizer("abcdefghija")["input_ids"]])
        with torch.no_grad():
            theirs = network(torch.from_numpy(tokens[None]).long()).logits.numpy()
    ours = pair.predict(trained, tokens[None], compressed=False)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)

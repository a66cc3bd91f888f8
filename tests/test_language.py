"""Decoders in a config: fine-tuned through a cut from a folder of Hugging Face's, used, and written as one again."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax import build, config, data, models, pair
from msjax.cli import main as command_line
from msjax.cli import options
from msjax.runs import RunFolder
from msjax.split.trees import TreeSpec
from msjax.training import from_config

from . import decoders
from .language import config_of, make_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of a tied decoder with weights and a tokenizer, and a text of letters in a fixed order beside it."""
    monkeypatch.setenv("MSJAX_CACHE", str(tmp_path / "cache"))
    return make_folder(tmp_path / "model", repeats=40)


def test_a_config_keeps_what_the_folder_says(folder):
    cfg = build.resolved(config_of(folder))
    assert models.DecoderConfig.from_json(json.loads(cfg.model.decoder)) == models.DecoderConfig.load(folder)
    assert cfg.data.tokenizer == str(folder) and build.resolved(cfg) == cfg
    assert config.from_json(json.loads(json.dumps(config.to_json(cfg)))) == cfg
    plain = config.without_paths(cfg)
    assert (plain.data.tokenizer, plain.data.name, plain.model.weights) == ("model", "text.txt", "model")
    named = dataclasses.replace(cfg.model, decoder=str(folder / "config.json"), weights=None)
    assert build.resolved(dataclasses.replace(cfg, model=named)).model.decoder == cfg.model.decoder
    other = config.Config()
    assert build.resolved(other) is other


def test_what_is_not_computed_makes_no_other_network(folder):
    """More tokens that end a text; and of Qwen 2 a field that says nothing there."""
    cfg = build.resolved(config_of(folder))
    found = []
    for ends in (2, [2, 7]):
        text = json.dumps(decoders.CONFIGS["llama 3"] | {"eos_token_id": ends})
        found.append(build.identity(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, decoder=text))))
    assert found[0] == found[1]
    shutil.rmtree(folder)
    folder = make_folder(folder, "qwen 2.5", repeats=40)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"attention_bias": True}))
    options.check_early(config_of(folder))


def test_a_run_learns_predicts_and_is_written_for_transformers(folder, tmp_path, capsys):
    cfg = config_of(folder)
    run = from_config.load_run(cfg)
    cfg = build.resolved(dataclasses.replace(cfg, out=str(tmp_path / "runs")))
    with contextlib.closing(RunFolder.create(cfg, "run")) as made:
        summary = from_config.train_config(cfg, made, run=run)
        history = made.read_history()
    assert summary["headline"] == "perplexity"
    assert history[1]["test"]["perplexity"] < 0.7 * history[0]["train"]["perplexity"]
    found = pair.load_pair(tmp_path / "runs" / "run")
    logits = pair.predict(found, run.dataset.test_inputs[:3])
    assert logits.shape == (3, 12, 19)
    assert command_line.run("export", [str(tmp_path / "runs" / "run"), "--out", str(tmp_path / "out")]) == 0
    described = models.DecoderConfig.load(tmp_path / "out")
    assert not described.tie_word_embeddings
    whole = models.load_weights(tmp_path / "out", models.decoder(described, length=12))
    again = jax.jit(lambda p, x: whole.apply(p, {}, x, train=False)[0])(whole.params, run.dataset.test_inputs[:3])
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-5)
    assert command_line.run("eval", [str(tmp_path / "runs" / "run")]) == 0
    assert f"{summary['test']['perplexity']:.2f}" in capsys.readouterr().out


def test_a_step_starts_from_the_published_weights(folder):
    built = from_config.load_run(config_of(folder))
    network = models.decoder(models.DecoderConfig.load(folder), length=12)
    whole = models.load_weights(folder, network)
    x = jnp.asarray(built.dataset.test_inputs[:2])
    h, _ = built.spec.client(built.state.client.params, {}, x, train=False)
    got, _ = built.spec.server(built.state.server.params, {}, h, train=False)
    want, _ = whole.apply(whole.params, {}, x, train=False)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tail_cut", [None, "last"])
def test_specs_follow_from_shapes_alone(dtype, tail_cut):
    described = json.dumps(models.DecoderConfig.from_json(decoders.CONFIGS["qwen 3"]).to_json())
    tokens = TreeSpec.of(jax.ShapeDtypeStruct((12,), np.int32))
    cfg = config.Config(
        model=config.ModelConfig(name="decoder", cut="0", decoder=described, remat=True),
        task=config.TaskConfig(name="next_token"),
        mode=config.ModeConfig(tail_cut=tail_cut),
        dtype=dtype,
    )
    summary = build.DataSummary(tokens, tokens)
    parts = jax.eval_shape(lambda: build.make_parts(cfg, summary))
    spec = build.build(cfg, summary, samples=8, test_samples=8, parts=parts).spec
    assert str(spec.features) == f"{dtype}[12, 16]"
    last = spec.outputs if spec.tail_outputs is None else spec.tail_outputs
    assert str(last) == "float32[12, 19]"


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "model",
            {"weights": None},
            "model.decoder or model.weights must say what model.name='decoder' is, got neither",
        ),
        ("model", {"weights": "none"}, r"model\.weights: none must be a config\.json that can be read, or a"),
        (
            "model",
            {"decoder": json.dumps(decoders.CONFIGS["llama 3"] | {"rms_norm_eps": 0.5})},
            r"model.decoder must describe the network of model.weights, whose .* rms_norm_eps=1e-0., got 0\.5: give",
        ),
        (
            "model",
            {"decoder": '{"model_type": "gpt2"}'},
            "model.decoder must be the text of a config.json, but: model_t",
        ),
        ("model", {"width": 0.5}, r"model\.width must be 1\.0 for model\.name='decoder', got 0\.5"),
        (
            "model",
            {"cut": "4"},
            r"model\.cut must be one of 0, 1, 2, 3 or shallow = 0, medium = 1, deep = 2 for decoder",
        ),
        ("model", {"cut_before_activation": True}, "cut_before_activation must be at a block that ends with one"),
        ("model", {"name": "convnet", "weights": None, "remat": True}, r"model\.remat must be False for .*, got True"),
        ("task", {"name": "classification"}, "task.name must be 'next_token' for model.name='decoder'"),
        ("data", {"text_length": 65}, r"data\.text_length must be in 1\.\.64 \(max_position_embeddings\), got 65"),
        (
            "data",
            {"name": "digits"},
            r"data\.name must be the path of a text, a \.txt, .* or \.csv file, for .*'decoder', got 'digits'",
        ),
        (
            "data",
            {"test": "test.json"},
            r"data\.test must be the path of a text, a \.txt, .* or \.csv file, for .*, got 'test\.json'",
        ),
        ("data", {"tokenizer": "none"}, "tokenizer must be a tokenizer.json, or a folder that has one, got 'none'"),
    ],
)
def test_what_does_not_fit_is_named_as_in_the_config(section, changes, message, folder):
    cfg = config_of(folder)
    cfg = dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **changes)})
    with pytest.raises((ValueError, data.DataError), match=message):
        options.check_early(cfg)
        from_config.load_run(cfg)


def test_texts_are_for_decoders_with_a_tokenizer(folder, tmp_path):
    cfg = config_of(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"data\.tokenizer must be given for the texts of '.*text\.txt', got None"):
        from_config.load_run(cfg)
    other = dataclasses.replace(cfg, model=config.ModelConfig(), data=dataclasses.replace(cfg.data, test="x.txt"))
    other = dataclasses.replace(other, data=dataclasses.replace(other.data, name="digits"))
    with pytest.raises(ValueError, match=r"data\.test must be None for model\.name='convnet', got 'x\.txt'"):
        from_config.load_run(other)

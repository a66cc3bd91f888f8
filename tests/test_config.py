"""Configs: presets, text, and what is refused."""

import json
import pathlib

import pytest

from msjax import compress, config, models

PRESETS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_name_models_and_cuts_that_exist(path):
    cfg = config.load_preset(str(path))
    shape = {"imagenet2012": (224, 224, 3)}.get(cfg.data.name, (32, 32, 3))
    model = models.build(
        cfg.model.name, input_shape=shape, num_classes=10, width=cfg.model.width, first_block=cfg.model.first_block
    )
    for cut in ("shallow", "medium", "deep"):
        models.resolve_cut(model, cut)
    assert config.from_json(json.loads(json.dumps(config.to_json(cfg)))) == cfg


def test_there_are_presets():
    assert {p.stem for p in PRESETS} >= {"vgg19_cifar10", "resnet18_cifar100", "resnet34_imagenet", "cifar10_lite"}


def test_save_and_load(tmp_path):
    cfg = config.Config(
        codec=compress.TopK(0.9, granularity="sample"),
        grad_codec=compress.StochasticUniform(4),
        optim=config.OptimConfig(schedule="steps", milestones=(3, 6)),
    )
    config.save(cfg, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == cfg


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clients", 0, "clients must be at least 1, got 0"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("dtype", "float64", "dtype must be one of 'float32', 'bfloat16', got 'float64'"),
        ("optim.label_smoothing", 1.0, "optim.label_smoothing must be in .*, got 1.0"),
        ("optim.learning_rate", 0.0, "optim.learning_rate must be above 0, got 0.0"),
        ("optim.warmup_epochs", -1.0, "optim.warmup_epochs must be at least 0, got -1.0"),
        ("optim.schedule", "cosin", "optim.schedule must be one of 'cosine', 'steps', 'constant', got 'cosin'"),
        ("optim.schedule", "steps", r"optim.milestones must name at least one epoch .*, got \(\)"),
        ("task.name", "sorting", "task.name must be one of 'classification', .*, got 'sorting'"),
        ("mode.kind", "parallell", "mode.kind must be one of 'parallel', 'splitfed', 'sequential', got 'parallell'"),
        ("data.alpha", 0.0, "data.alpha must be positive and finite, or None for an even partition, got 0.0"),
        ("data.alpha", float("nan"), "data.alpha must be positive and finite, .*, got nan"),
        ("data.augment", "mirror", "data.augment must be one of None, 'crop_flip', 'flip', 'none', got 'mirror'"),
        ("array_codecs", [["skip", "Zip"]], r"codec must be one of Identity, .*, got 'Zip'"),
        ("codec", "MaskEncoded(bits=9)", "bits must be an integer in 1..8, got 9"),
        ("codec", "Zip()", r"codec must be one of Identity, .*, got 'Zip\(\)'"),
    ],
)
def test_bad_values_are_named(unchecked, field, value, message):
    tree = config.to_json(config.Config())
    *groups, name = field.split(".")
    part = tree
    for group in groups:
        part = part[group]
    part[name] = value
    with pytest.raises(ValueError, match=message):
        config.from_json(tree)


def test_bad_presets_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        config.load_preset(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"Python file with get_config.*which has none"):
        config.load_preset(str(tmp_path / "empty.py"))
    (tmp_path / "other.py").write_text("def get_config(): return 3")
    with pytest.raises(ValueError, match="returns a Config"):
        config.load_preset(str(tmp_path / "other.py"))
    with pytest.raises(ValueError, match="does not fit this version"):
        config.from_json(config.to_json(config.Config()) | {"colour": "red"})


OWN_PRESET = """
from msjax import config, tasks


def make_model(summary):
    return "the model for", summary


def make_task():
    return tasks.regression()


def get_config():
    return config.Config(
        model=config.ModelConfig(name=":make_model"),
        data=config.DataConfig(name=":MISSING"),
        task=config.TaskConfig(name=":make_task"),
        mode=config.ModeConfig(tail_cut="last"),
    )
"""


def test_a_preset_names_functions_of_its_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_PRESET)
    message = "data.name must name a function of .*own.py, got 'MISSING'; it has get_config, make_model, make_task"
    with pytest.raises(ValueError, match=message):
        config.load_preset(str(file))
    file = tmp_path / "whole.py"
    file.write_text(OWN_PRESET.replace("MISSING", "make_task"))
    cfg = config.load_preset(str(file))
    assert cfg.model.name == f"{file}:make_model"
    assert config.call_reference("model.name", cfg.model.name, 5) == ("the model for", 5)
    assert config.call_reference("task.name", cfg.task.name, 5).name == "regression"
    assert config.from_json(json.loads(json.dumps(config.to_json(cfg)))) == cfg
    assert config.without_paths(cfg).model.name == "whole.py:make_model"
    with pytest.raises(ValueError, match=r"model.name must be a Python file, got 'whole.py', which does not exist"):
        config.resolve("model.name", "whole.py:make_model")


def test_fields_that_were_renamed_are_read_under_their_first_names():
    cfg = config.Config(mode=config.ModeConfig(tail_cut="4"))
    tree = config.earlier_names(config.to_json(cfg))
    assert tree["mode"]["head_cut"] == "4" and "tail_cut" not in tree["mode"]
    assert config.from_json(tree) == cfg

"""Configs: presets, text, and what is refused."""

import dataclasses
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
    ("change", "message"),
    [
        ({"clients": 0}, "clients must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"optim": config.OptimConfig(learning_rate=0.0)}, "optim.learning_rate must be above 0, got 0.0"),
        (
            {"optim": config.OptimConfig(warmup_epochs=10.0)},
            r"optim.warmup_epochs must be in \[0, epochs = 10\), got 10",
        ),
        ({"optim": config.OptimConfig(schedule="steps")}, "optim.milestones must name at least one epoch"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config.Config(), **change)


def test_bad_presets_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        config.load_preset(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="returns a Config"):
        config.load_preset(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match="does not fit this version"):
        config.from_json(config.to_json(config.Config()) | {"colour": "red"})

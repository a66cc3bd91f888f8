"""Configs: presets, text, and what is refused."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest

from msjax import build, compress, config, data, models, plan, references
from msjax.build._data import check_classes
from msjax.cli.options import check_new_config
from msjax.training import from_config

PRESETS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_name_models_and_cuts_that_exist(path):
    cfg = config.load_preset(str(path))
    assert config.from_json(json.loads(json.dumps(config.to_json(cfg)))) == cfg
    if cfg.model.name == models.DECODER:  # whose blocks a file says
        return
    shape = {"imagenet2012": (224, 224, 3)}.get(cfg.data.name, (32, 32, 3))
    model = models.build(
        cfg.model.name, input_shape=shape, num_classes=10, width=cfg.model.width, first_block=cfg.model.first_block
    )
    for cut in ("shallow", "medium", "deep"):
        models.resolve_cut(model, cut)


def test_there_are_presets():
    assert {p.stem for p in PRESETS} >= {"vgg19_cifar10", "resnet18_cifar100", "resnet34_imagenet", "cifar10_lite"}


def test_fields_reach_what_they_are_of(tmp_path):
    """By themselves in no other test: each would be passed over in silence."""
    ds = data.load("digits")
    summary = build.DataSummary.of(ds)
    cfg = config.Config(data=config.DataConfig(crop_padding=3), optim=config.OptimConfig(label_smoothing=0.2))
    assert build.make_preprocess(cfg, summary).padding == 3
    assert build.make_task(cfg, summary).loss.label_smoothing == 0.2
    with pytest.raises(ValueError, match=r"optim\.label_smoothing must be 0 for task\.name='regression', got 0\.2"):
        build.make_task(dataclasses.replace(cfg, task=config.TaskConfig("regression")), summary)
    (tmp_path / "task.py").write_text("")
    with pytest.raises(
        ValueError, match=r"optim\.label_smoothing must be 0 for task\.name='.*task\.py:make', got 0\.2"
    ):
        check_new_config(dataclasses.replace(cfg, task=config.TaskConfig(f"{tmp_path}/task.py:make")), None)
    pixels = config.Config(task=config.TaskConfig("segmentation"))
    with pytest.raises(ValueError, match=r"data\.classes must name the classes for task\.name='segmentation'"):
        build.make_task(pixels, summary._replace(num_classes=None))
    check_classes(dataclasses.replace(pixels, data=config.DataConfig("masks.npz", classes=("road", "sky"))))
    assert from_config.load_run(dataclasses.replace(cfg, shard_server=True)).shard_server
    assert not from_config.load_run(cfg).shard_server


def test_save_and_load(tmp_path):
    cfg = config.Config(
        codec=compress.TopK(0.9, granularity="sample"),
        grad_codec=compress.StochasticUniform(4),
        optim=config.OptimConfig(schedule="steps", milestones=(3, 6)),
    )
    (tmp_path / "config.json").write_text(config.to_text(cfg))
    assert config.load(tmp_path / "config.json") == cfg


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clients", 0, "clients must be at least 1, got 0"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("seed", -1, "seed must be in 0..4294967295, got -1"),
        ("seed", 2**32, "seed must be in 0..4294967295, got 4294967296"),
        ("seed", True, "seed must be an integer, got True"),
        ("clients", "2", "clients must be an integer, got '2'"),
        ("clients", None, "clients must be an integer, got None"),
        ("batch_size", 2.0, "batch_size must be an integer, got 2.0"),
        ("compare", 1, "compare must be True or False, got 1"),
        ("out", None, "out must be a text, got None"),
        ("model", "vgg19", "model must be an object with fields, got 'vgg19'"),
        ("model.name", 5, "model.name must be a text, got 5"),
        ("model.cut", 2.0, "model.cut must be a text, got 2.0"),
        ("model.width", "1", "model.width must be a finite number, got '1'"),
        ("model.width", 0, "model.width must be above 0, got 0"),
        ("model.cut_before_activation", "no", "model.cut_before_activation must be True or False, got 'no'"),
        ("mode.turn_steps", "3", "mode.turn_steps must be an integer or None, got '3'"),
        ("data.alpha", 0.0, "data.alpha must be above 0, got 0.0"),
        ("data.alpha", float("inf"), "data.alpha must be a finite number or None, got inf"),
        ("data.mean", "grey", "data.mean must be a tuple of finite numbers or None, got 'grey'"),
        ("data.mean", [0.5, "x"], "data.mean must be a tuple of finite numbers or None"),
        ("data.classes", ["a", "b", "a"], r"data.classes must be different names, got \('a', 'b', 'a'\)"),
        ("data.test_share", 1.0, "data.test_share must be above 0 and below 1, got 1.0"),
        ("data.image_size", 0, "data.image_size must be at least 1, got 0"),
        ("optim.gamma", -1.0, "optim.gamma must be above 0, got -1.0"),
        ("optim.warmup_epochs", 1e308, r"optim.warmup_epochs must be at most 1000000.0, got 1e\+308"),
        ("model.width", 1e308, r"model.width must be at most 10000.0, got 1e\+308"),
        ("optim.learning_rate", 1e308, r"optim.learning_rate must be at most 3e\+38, got 1e\+308"),
        ("optim.accumulate_steps", 1 << 31, "optim.accumulate_steps must be at most 2147483647, got 2147483648"),
        ("mode.average_steps", 10**20, "mode.average_steps must be at most 2147483647, got 100000000000000000000"),
        ("optim.milestones", (1, 1 << 31), "optim.milestones must be at most 2147483647, got 2147483648"),
        ("optim.momentum", 1.0, r"optim.momentum must be in \[0, 1\), got 1.0"),
        ("optim.warmup_epochs", float("nan"), "optim.warmup_epochs must be a finite number, got nan"),
        ("optim.learning_rate", float("inf"), "optim.learning_rate must be a finite number, got inf"),
        ("optim.milestones", 5, "optim.milestones must be a tuple of integers, got 5"),
        ("optim.milestones", ["3"], "optim.milestones must be a tuple of integers, got"),
        ("optim.colour", "red", "does not fit this version of msjax: unknown field optim.colour"),
        ("array_codecs", [["skip"]], "array_codecs must be a tuple of pairs of texts"),
        ("array_codecs", "skip", "array_codecs must be a tuple of pairs of texts, got 'skip'"),
        ("codec", 5, "codec must be the text of a codec, got 5"),
        ("grad_codec", "Zip()", r"^grad_codec must be one of Identity, .*, got 'Zip\(\)'"),
        ("dtype", "float64", "dtype must be one of 'float32', 'bfloat16', got 'float64'"),
        ("optim.label_smoothing", 1.0, "optim.label_smoothing must be in .*, got 1.0"),
        ("optim.learning_rate", 0.0, "optim.learning_rate must be above 0, got 0.0"),
        ("optim.warmup_epochs", -1.0, "optim.warmup_epochs must be at least 0, got -1.0"),
        ("optim.schedule", "cosin", "optim.schedule must be one of 'cosine', 'steps', 'constant', got 'cosin'"),
        ("optim.schedule", "steps", r"optim.milestones must name at least one epoch .*, got \(\)"),
        ("task.name", "sorting", "task.name must be one of 'classification', .*, got 'sorting'"),
        ("mode.kind", "parallell", "mode.kind must be one of 'parallel', 'splitfed', 'sequential', got 'parallell'"),
        ("data.augment", "mirror", "data.augment must be one of None, 'crop_flip', 'flip', 'none', got 'mirror'"),
        ("array_codecs", [["skip", "Zip"]], r"^array_codecs of 'skip' must be one of Identity, .*, got 'Zip'"),
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


def test_presets_values_of_another_type_are_named(unchecked):
    for fields, message in (
        ({"clients": "2"}, "clients must be an integer, got '2'"),
        ({"codec": "TopK"}, "codec must be a codec of msjax.compress, got 'TopK'"),
        ({"model": "vgg19"}, "model must be a ModelConfig, got 'vgg19'"),
        ({"optim": config.OptimConfig(milestones=[3])}, r"optim.milestones must be a tuple of integers, got \[3\]"),
        ({"seed": 2**63}, "seed must be in 0..4294967295, got 9223372036854775808"),
    ):
        with pytest.raises(ValueError, match=message):
            config.Config(**fields)
    assert config.Config(model=config.ModelConfig(cut=3), mode=config.ModeConfig(tail_cut=5)).cut == 3
    assert config.Config(optim=config.OptimConfig(learning_rate=1)).optim.learning_rate == 1
    assert config.Config(cut_bits=1.0, cut_seconds=1.0, link_bytes_per_second=1 << 32).link_bytes_per_second == 1 << 32


def test_damaged_files_are_named(tmp_path):
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json must be a config in JSON, but it is damaged: Expecting"),
        ("[]", r"config must be an object with fields, got \[\]"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            config.load(file)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"config.json: 'utf-8' codec can't decode"):
        config.load(file)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"config.json: config does not fit .* it has no codec"):
        config.load(file)


def test_presets_that_cannot_be_run_are_named(tmp_path):
    file = tmp_path / "own.py"
    for text, message in (
        ("import no_such_module", "the preset '.*own.py' imports what is not there: No module named 'no_such_module'"),
        ("def get_config(:", "the preset '.*own.py' must be Python, but for line 1: "),
        (
            "def get_config(a, b=1): pass",
            "the preset .*: get_config must be a function that needs no argument",
        ),
    ):
        file.write_text(text)
        references._execute.cache_clear()
        with pytest.raises((ValueError, ImportError), match=message):
            config.load_preset(str(file))


def test_functions_get_as_many_arguments_as_they_take():
    assert references.call("f", lambda: 1, "summary") == 1
    assert references.call("f", lambda a: a, "summary") == "summary"
    assert references.call("f", lambda a, b=2: (a, b), "summary") == ("summary", 2)
    assert references.call("f", lambda *a: a, "summary", "more") == ("summary", "more")
    assert references.call("f", "no function", "summary") == "no function"
    assert references.call("f", functools.cache(lambda a: (a,)), "summary") == ("summary",)
    assert references.call("f", functools.partial(lambda a, b: (a, b), 1), "summary") == (1, "summary")
    assert references.call("f", dict, "summary") is dict
    assert references.call("f", lambda a, seed: (a, seed), "summary", seed=3) == ("summary", 3)
    assert references.call("f", lambda a, *, seed=1: (a, seed), "summary", seed=3) == ("summary", 3)
    assert references.call("f", lambda a, width=2: (a, width), "summary", seed=3) == ("summary", 2)
    assert references.call("f", lambda seed, a: (a, seed), "summary", seed=3) == ("summary", 3)
    assert references.call("f", lambda a, b=1, seed=2: (a, b, seed), "summary", seed=3) == ("summary", 1, 3)
    assert references.call("f", lambda seed, *a: (seed, a), "summary", seed=3) == (3, ("summary",))
    bound = functools.partial(lambda a, seed: (a, seed), seed=7)
    assert references.call("f", bound, "summary", seed=3) == ("summary", 7)
    with pytest.raises(ValueError, match="f must be a function that needs at most 1 argument, got one that needs a, s"):
        references.call("f", lambda a, seed, /: 0, "summary", seed=3)
    for function, needs in ((lambda a, b: 0, "a, b"), (lambda a, *, key: 0, "a, key")):
        rule = f"model.name 'x.py:f' must be a function that needs at most 1 argument, got one that needs {needs}"
        with pytest.raises(ValueError, match=rule):
            references.call("model.name 'x.py:f'", function, "summary")


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


def test_where_functions_are_now(tmp_path):
    """In a file of the same name; no other file, and no data, are taken for those of a run."""
    (tmp_path / "theirs.py").write_text("")
    run = config.Config(
        model=config.ModelConfig(name="/gone/mine.py:make_model"),
        data=config.DataConfig(name="/mnt/pets"),
        task=config.TaskConfig(name=f"{tmp_path}/theirs.py:Loss"),
    )
    new = dataclasses.replace(
        run,
        model=config.ModelConfig(name="/new/mine.py:another"),
        data=config.DataConfig(name="./pets"),
        task=config.TaskConfig(name="/new/mine.py:Loss"),
    )
    found = config.with_functions_of(run, new)
    assert found == dataclasses.replace(run, model=config.ModelConfig(name="/new/mine.py:make_model"))
    renamed = dataclasses.replace(new, model=config.ModelConfig(name="/new/other.py:make_model"), task=run.task)
    assert config.with_functions_of(run, renamed).model.name == "/new/other.py:make_model"
    renamed = dataclasses.replace(renamed, model=config.ModelConfig(name="/new/other.py:another"))
    with pytest.raises(
        ValueError, match=r"model.name of the run is '/gone/mine.py:make_model', which is gone, and the"
    ):
        config.with_functions_of(run, renamed)


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
    plain = config.without_paths(cfg)
    assert plain.model.name == "whole.py:make_model"
    # Of a run that was changed on the command line the preset says where its functions are, and nothing else.
    changed = dataclasses.replace(plain, model=dataclasses.replace(plain.model, activation="silu"))
    assert config.with_places_of(plain, cfg) == dataclasses.replace(cfg, out=plain.out)
    assert config.with_places_of(changed, cfg).model == dataclasses.replace(cfg.model, activation="silu")
    # Also where it had taken another function of that file, or one for which the preset names none.
    other = dataclasses.replace(
        plain, task=config.TaskConfig("whole.py:other"), data=config.DataConfig(augment="whole.py:aug")
    )
    found = config.with_places_of(other, cfg)
    assert (found.task.name, found.data.augment) == (f"{file}:other", f"{file}:aug")
    with pytest.raises(ValueError, match=r"model.name must be a Python file, got 'whole.py', which does not exist"):
        config.resolve("model.name", "whole.py:make_model")


OWN_CODEC = """
from __future__ import annotations

import dataclasses

from msjax import compress, config


@dataclasses.dataclass(frozen=True, repr=False)
class Rounded(compress.Identity):
    digits: int = 2


@dataclasses.dataclass(frozen=True, repr=False)
class Limited(compress.Identity):
    limit: object = float("inf")


@dataclasses.dataclass(frozen=True, repr=False)
class Unrelated:
    digits: int = 2


def local():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Local(compress.Identity):
        pass

    return Local()


def get_config():
    return config.Config(codec=Rounded(3), grad_codec=Rounded())
"""


def test_a_codec_of_ones_own_is_written_with_its_file(tmp_path, monkeypatch, unchecked):
    file = tmp_path / "own.py"
    file.write_text(OWN_CODEC)
    cfg = config.load_preset(str(file))
    (tmp_path / "config.json").write_text(config.to_text(cfg))
    assert config.load(tmp_path / "config.json") == cfg
    tree = config.to_json(cfg)
    assert tree["codec"] == f"{file}:Rounded(digits=3)"
    assert config.to_json(cfg, paths=False)["codec"] == "own.py:Rounded(digits=3)"
    # What comes from elsewhere runs nothing that is not there already.
    with pytest.raises(ValueError, match=r"^codec must be .* side's own preset, got '.*own.py:Rounded.*': code does"):
        config.from_json(tree)
    elsewhere = config.to_json(cfg, paths=False) | {"codec": "own.py:Rounded(digits=5)"}
    assert config.from_json(elsewhere, preset=cfg).codec == dataclasses.replace(cfg.codec, digits=5)
    for text, message in (
        ("Rounded(size=3)", " .*unexpected keyword argument 'size'"),
        ("Missing()", " must name a subclass of msjax.compress.Codec in .*own.py, got 'Missing'"),
        ("Unrelated()", " must name a subclass of msjax.compress.Codec in .*own.py, got 'Unrelated'"),
    ):
        with pytest.raises(ValueError, match=f"^codec{message}"):
            config.from_json(tree | {"codec": f"{file}:{text}"}, own_code=True)
    with pytest.raises(ValueError, match=r"^codec must be a Python file, got 'gone.py', which does not exist"):
        config.from_json(tree | {"codec": "gone.py:Rounded()"}, own_code=True)
    with pytest.raises(ValueError, match=r"^codec must .* got .no_such_module.: No module named 'no_such_module'"):
        config.from_json(tree | {"codec": "no_such_module:Rounded()"}, own_code=True)
    local = references.resolve_in("codec", str(file), "local")()
    with pytest.raises(ValueError, match=r"codec must be of a class at the top of its module, got .*local"):
        config.to_json(dataclasses.replace(cfg, codec=local))
    # What could not be read again is refused before it is written.
    limited = references.resolve_in("codec", str(file), "Limited")
    for limit in (float("inf"), np.float16, frozenset((1,))):
        with pytest.raises(ValueError, match=r"codec must have options that are Python literals, .* got .*Limited\("):
            config.to_json(dataclasses.replace(cfg, codec=limited(limit)))
    # A party's own file may have another name; and a folder's may have brackets.
    assert config.from_json(elsewhere | {"codec": "server.py:Rounded(digits=5)"}, preset=cfg).codec.digits == 5
    (tmp_path / "a (1)").mkdir()
    (tmp_path / "a (1)" / "own (2).py").write_text(OWN_CODEC)
    other = config.load_preset(str(tmp_path / "a (1)" / "own (2).py"))
    assert config.from_json(config.to_json(other), own_code=True) == other
    with pytest.raises(ValueError, match=r"array_codecs must be of codecs of msjax.compress, got 'own.py:Rounded\(\)'"):
        dataclasses.replace(cfg, array_codecs=(("a", "own.py:Rounded()"),))
    # A module that can be imported goes by its name.
    monkeypatch.syspath_prepend(tmp_path)
    text = config.to_json(config.from_json(tree | {"codec": "own:Rounded"}, own_code=True))["codec"]
    assert text == "own:Rounded(digits=2)"


def test_fields_that_were_renamed_are_read_under_their_first_names():
    cfg = config.Config(mode=config.ModeConfig(tail_cut="4"))
    tree = config.earlier_names(config.to_json(cfg))
    assert tree["mode"]["head_cut"] == "4" and "tail_cut" not in tree["mode"]
    assert config.from_json(tree) == cfg


def test_what_a_run_sets_of_data_model_and_task_is_in_each_partys_own_preset():
    """A preset's own counts, so what the server was given would be passed over in silence."""
    own = config.Config(clients=5, batch_size=7, data=config.DataConfig(name="mine.csv", augment="FILE.py:mine"))
    given = config.Config(data=config.DataConfig(name="theirs.csv", data_dir="there", augment="flip"))
    for divided in (True, False):
        config.check_own(given, own, divided=divided)
    assert config.passed_over(given, own) == ["clients", "batch_size"]
    assert config.passed_over(given, given) == []
    sets_alpha = dataclasses.replace(given, data=dataclasses.replace(given.data, alpha=0.1))
    for run, preset, divided in ((sets_alpha, given, False), (given, sets_alpha, True)):
        with pytest.raises(
            ValueError, match=r"data\.alpha must be the same .* got (0\.1 there and None|None there and 0)"
        ):
            config.check_own(run, preset, divided=divided)
    # A client's own data are not divided, and the server need not say how it sets a test set aside.
    config.check_own(given, sets_alpha, divided=False)
    theirs, mine = (
        dataclasses.replace(given, optim=config.OptimConfig(kind=f"{name}.py:f")) for name in ("/a/b", "/home/b")
    )
    config.check_own(theirs, mine, divided=False)
    assert config.with_own(theirs, mine).optim.kind == "/home/b.py:f" and config.passed_over(theirs, mine) == []
    assert config.with_own(given, mine).optim.kind == "sgd" and config.passed_over(given, mine) == ["optim"]
    with pytest.raises(ValueError, match=r"optim\.kind must be a function of this party's own preset .* got 'sgd'"):
        config.check_own(theirs, given, divided=False)
    tail = dataclasses.replace(given, mode=config.ModeConfig(tail_cut="last"))
    config.check_own(tail, given, divided=False)
    config.check_own(tail, tail, divided=False)
    with pytest.raises(ValueError, match=r"mode\.tail_cut must be the same .* got None there and 'last' in the preset"):
        config.check_own(given, tail, divided=False)
    deeper = dataclasses.replace(given, model=dataclasses.replace(given.model, activation="gelu"))
    with pytest.raises(ValueError, match=r"model\.activation must be .* got 'gelu' there and 'relu' in the preset"):
        config.check_own(deeper, given, divided=False)


def test_what_a_preset_sets_may_be_used_with_what_is_typed():
    """And what it uses need not be used with that; what neither uses is refused."""
    preset = config.Config(lora=config.LoraConfig(alpha=32.0))
    config.check_used(dataclasses.replace(preset, lora=config.LoraConfig(rank=8, alpha=32.0)), preset)
    with pytest.raises(ValueError, match=r"lora\.alpha must be 16\.0, its default, with lora\.rank=None"):
        config.check_used(preset, preset)
    steps = config.Config(optim=config.OptimConfig(schedule="steps", milestones=(3,), gamma=0.5))
    cosine = dataclasses.replace(steps, optim=dataclasses.replace(steps.optim, schedule="cosine"))
    config.check_used(cosine, steps)
    with pytest.raises(ValueError, match=r"optim\.milestones must be \(\), its default"):
        config.check_used(cosine)


OWN_MODEL = """
import jax.numpy as jnp


def apply(params, x):
    return x @ params["w"]


def make_model():
    return (apply, {"w": jnp.eye(4)}), (apply, {"w": jnp.eye(4)})
"""


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"activation": "gelu"}, r"model\.activation must be 'relu' for model\.name='.*', got 'gelu'"),
        ("model", {"weights": "w.pt"}, r"model\.weights must be None for model\.name='.*', got 'w\.pt'"),
        ("model", {"cut_before_activation": True}, r"model\.cut_before_activation must be False for model\.name="),
        ("lora", {"rank": 4}, r"lora\.rank must be None for model\.name='.*', got 4"),
    ],
    ids=str,
)
def test_what_a_model_of_ones_own_would_pass_over_is_refused(section, changes, message, tmp_path, caplog):
    """Labels would leave a client whose user had asked for a U-shaped network."""
    file = tmp_path / "own.py"
    file.write_text(OWN_MODEL)
    cfg = config.Config(model=config.ModelConfig(f"{file}:make_model"))
    changed = dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **changes)})
    with pytest.raises(ValueError, match=message):
        check_new_config(changed, None)
    summary = build.DataSummary.of(data.from_arrays((np.ones((6, 4)), np.arange(6) % 4)))
    for there in (cfg, changed):  # a run that is there was made without
        assert len(build.make_parts(there, summary)) == 2
    u_shaped = dataclasses.replace(cfg, mode=config.ModeConfig(tail_cut="last"))
    spec = build.build(u_shaped, summary, samples=6, test_samples=0).spec
    with pytest.raises(
        ValueError, match=r"mode\.tail_cut must be None where .*:make_model returns no tail, got 'last'"
    ):
        build.check_tail(u_shaped, spec)
    with pytest.raises(ValueError, match=r"mode\.tail_cut must be None"):
        plan.describe_run(u_shaped, summary, None)
    build.check_tail(cfg, spec)
    assert not caplog.records
    build.make_parts(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, cut=2)), summary)
    assert "model.cut=2 is ignored: " in caplog.text and "returns a model that is already in parts" in caplog.text


def test_what_only_decoders_read_is_refused_elsewhere():
    for name, value in (("text_column", "review"), ("tokenizer", "tokenizer.json"), ("test", "test.txt")):
        cfg = config.Config(data=config.DataConfig(**{name: value}))
        with pytest.raises(ValueError, match=rf"data\.{name} must be .* with model\.name='convnet'"):
            config.check_used(cfg)
        # Of a model of one's own that is trained on a text, too.
        config.check_used(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name="corpus.txt")))

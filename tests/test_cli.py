"""The command line: what it does, and what it says of bad input."""

import builtins
import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent import futures

import jax
import numpy as np
import pytest

from msjax import compress, config, data
from msjax.cli import main as cli
from msjax.cli.options import check_new_config, naming_the_way_on
from msjax.data._reader import count_cores
from msjax.distributed.messages import ProtocolError
from msjax.distributed.options import ClientOptions
from msjax.parts import load_part
from msjax.runs import RunFolder, plots
from msjax.runs.environment import VARIABLES
from msjax.runs.progress import Progress
from msjax.runs.signals import stop_on_signal

PRESET = str(pathlib.Path(__file__).parent.parent / "configs" / "resnet18_cifar100.py")


def run_cli(*arguments, expect=0, **options):
    done = subprocess.run(
        [sys.executable, "-m", "msjax", *arguments], capture_output=True, text=True, timeout=240, **options
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_command_line_trains_evaluates_and_compares(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--epochs", "1", "--model.width", "0.125"]
    assert cli.run("train", [*options, "--name", "a", "--codec", "Uniform(bits=4)"]) == 0
    out = capsys.readouterr().out
    assert "Identity()" in out and "Uniform(" in out and "saved" in out
    assert (tmp_path / "a" / "uncompressed" / "summary.json").exists()
    saved = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert saved["config"]["codec"] == repr(compress.Uniform(bits=4))
    assert cli.run("eval", [str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["top1_percent"] == saved["test"]["top1_percent"]
    assert cli.run("eval", [str(tmp_path / "a"), "--uncompressed"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == "no compression"
    files = [tmp_path / "a" / f"{part}.safetensors" for part in ("client", "server")]
    client, server = load_part(files[0]), files[1].read_bytes()
    files[0].unlink()
    assert cli.run("train", ["--resume", str(tmp_path / "a")]) == 0
    assert f"written anew from the last checkpoint: {files[0]}" in capsys.readouterr().out
    anew = load_part(files[0])
    assert (anew.run_id, anew.step) == (client.run_id, client.step) and files[1].read_bytes() == server
    jax.tree.map(np.testing.assert_array_equal, anew[1:3], client[1:3])
    # A run that failed to start leaves no folder, so its name can be used again.
    assert cli.run("train", [*options, "--name", "b", "--model.cut", "nowhere"]) == 2
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_what_is_refused_changes_nothing_in_a_finished_run(tmp_path, capsys):
    """Nor are its data taken for others: what classes and inputs mean came from those that it began with."""
    file, run = tmp_path / "d.npz", tmp_path / "runs" / "one"
    x, y = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32), np.arange(48) % 3

    def save(file, labels=y, last=48):
        np.savez(file, x_train=x, y_train=labels, x_test=x[:last], y_test=y[:last])

    save(file)
    options = ["--data.name", str(file), "--model.name", "mlp", "--model.width=0.1", "--clients=2", "--batch-size=4"]
    options += ["--model.cut=shallow", "--epochs=1", "--codec", "Uniform(bits=8)"]
    assert cli.run("train", [*options, "--out", str(run.parent), "--name", run.name]) == 0
    files = [run / "summary.json", run / "config.json", run / "uncompressed" / "config.json"]
    whole = [file.read_text() for file in files]

    def refused(command, *arguments):
        assert cli.run(command, list(arguments)) == 2
        assert [file.read_text() for file in files] == whole
        return capsys.readouterr().err

    others = "data must be those that the run began with, got others to train"
    save(file, labels=y[::-1])
    assert others in refused("train", "--resume", str(run), "--epochs=2") and others in refused("eval", str(run))
    (tmp_path / "other").mkdir()
    file.rename(tmp_path / "other" / file.name)
    assert "d.npz" in refused("train", "--resume", str(run), "--epochs=2")
    assert others in refused("train", "--resume", str(run), "--data.name", str(tmp_path / "other" / file.name))
    save(file, last=47)
    assert cli.run("eval", [str(run)]) == 0 and "data to test are not those" in capsys.readouterr().err
    save(file)
    assert cli.run("train", ["--resume", str(run), "--epochs=2"]) == 0
    assert [json.loads(file.read_text())["epochs"] for file in files[1:]] == [2, 2]


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tmp_path, capsys, monkeypatch):
    original = Progress.epoch

    def epoch(self, *arguments):
        original(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    options = ["--out", str(tmp_path), "--epochs", "1", "--model.width", "0.125", "--name", "a"]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "epoch", epoch)
        assert cli.run("train", options) == 130
    assert f"msjax train --resume {tmp_path / 'a'}" in capsys.readouterr().out
    assert not (tmp_path / "a" / "summary.json").exists()
    assert cli.run("train", ["--resume", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "Identity()" in out and "13." in out  # the saving by MS, in the table


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--config", "none.py"], "config must be a Python file, got 'none.py', which does not exist"),
        ("train", ["--resume", "none"], "resume must be a folder with config.json, got 'none'"),
        ("train", ["--out", "OUT", "--model.cut", "nowhere"], "--model.cut must be one of"),
        ("train", ["--out", "OUT", "--data.name", "nothing", "--data.data-dir", "OUT"], "looked for nothing in"),
        ("train", ["--out", "OUT", "--clients", "0"], "clients must be at least 1"),
        ("eval", ["none"], "the run must be a folder with config.json"),
        ("models", ["vgg19", "--width", "0"], "width must be above 0"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, capsys, command, arguments, message):
    assert cli.run(command, [str(tmp_path) if a == "OUT" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--clients", "0"], "--clients must be at least 1, got 0"),
        ("train", ["--codec", "TopK(ratio=2)"], "--codec: ratio must be a number in [0, 1), got 2.0"),
        ("train", ["--grad-codec=Zip"], "--grad-codec must be one of Identity, Cast, MaskEncoded"),
        ("train", ["--codec", "none.py:Zip()"], "--codec must be a Python file, got 'none.py', which does not exist"),
        ("train", ["--clients", "x"], "--clients: invalid literal for int() with base 10: 'x'"),
        ("eval", ["--data.test-share", "2"], "--data.test-share must be above 0 and below 1, got 2.0"),
        ("serve", ["--policy.deadline-seconds", "0"], "--policy.deadline-seconds must be above 0, got 0.0"),
        ("serve", ["--part", "a", "--max-megabytes", "x"], "--max-megabytes: invalid literal for int() with base 10"),
        ("client", ["--client-id", "one"], "--client-id: invalid literal for int() with base 10: 'one'"),
        # What would be passed over in silence.
        ("train", ["--mode.turn-steps", "5"], "--mode.turn-steps must be None, its default, with mode.kind='parallel'"),
        ("serve", ["--mode.average-steps", "5"], "--mode.average-steps must be 10, its default, with mode.kind='paral"),
        (
            "plan",
            ["--optim.momentum", "0", "--optim.nesterov"],
            "--optim.nesterov must be False, its default, with optim.momentum=0.0, which",
        ),
        ("plan", ["--lora.alpha", "32"], "--lora.alpha must be 16.0, its default, with lora.rank=None, which does"),
        ("plan", ["--optim.milestones", "2"], "--optim.milestones must be (), its default, with optim.schedule='cosi"),
        ("train", ["--task.ignore", "2"], "--task.ignore must be None, its default, with task.name='classification'"),
        ("train", ["--data.name", "a.npz", "--data.image-size=8"], "--data.image-size must be None, its default, wi"),
        ("train", ["--data.name", "breast_cancer", "--data.image-size=8"], "--data.image-size must be None, its def"),
        ("train", ["--data.name", "a.csv", "--data.normalize"], "--data.normalize must be False, its default, with "),
        ("eval", ["--data.name", "a.npz", "--data.label=y"], "--data.label must be 'label', its default, with data.n"),
        ("plan", ["--test-samples", "5"], "--test-samples must be 0 where samples are not given, got 5"),
        (
            "eval",
            ["RUN", "--config", "a.py"],
            "--config must be a Python file, got 'a.py', which does not exist",
        ),
        ("eval", ["--config", PRESET, "RUN"], "the run must be a folder with config.json, got 'RUN'"),
        ("eval", ["--data-dir", "D", "RUN"], "the run must be a folder with config.json, got 'RUN'"),
        ("eval", ["--test=F", "RUN"], "the run must be a folder with config.json, got 'RUN'"),
        ("generate", ["DIR", "--prompt", "a", "--top-k", "5"], "--top-k must be None where temperature is 0, which d"),
    ],
)
def test_values_that_are_refused_make_one_line(capsys, command, arguments, message):
    assert cli.run(command, arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"msjax {command}: {message}") and said.err.count("\n") == 1 and not said.out


def test_what_a_preset_has_may_be_of_no_use(capsys):
    """Where an option changes what it goes with; in the preset itself, and typed, it may not."""
    with_preset = ["--config", PRESET, "--optim.schedule", "cosine"]
    assert cli.run("plan", [*with_preset, "--json"]) == 0
    capsys.readouterr()
    assert cli.run("plan", [*with_preset, "--optim.milestones", "1"]) == 2
    assert "--optim.milestones must be (), its default, with optim.schedule='cosine'" in capsys.readouterr().err
    wrong = config.Config(mode=config.ModeConfig(turn_steps=5))
    with pytest.raises(ValueError, match=r"mode\.turn_steps must be None"):
        check_new_config(dataclasses.replace(wrong, epochs=2), wrong)


def test_options_that_there_are_not_are_shown_as_before(capsys):
    assert cli.run("train", ["--nonsense"]) == 2
    assert "Unrecognized options: --nonsense" in capsys.readouterr().err


IN_THE_WAY = "must be a folder that can be written to, got 'file"


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--out", "file"], f"out {IN_THE_WAY}': file is a file"),
        ("train", ["--out=file/x"], f"out {IN_THE_WAY}/x': file is a file"),
        ("train", ["--out=gs://b/runs"], "out must be a path in a file system, got the URL 'gs://b/runs': mount the"),
        ("serve", ["--out=file/x"], f"out {IN_THE_WAY}/x': file is a file"),
        ("train", ["--out", ""], "out must be a path, got ''"),
        ("train", ["--out=~nobody-of-this-name/x"], "out must be a path, got '~nobody-of-this-name/x': Could not"),
        ("train", ["--name", ""], "name must be the name of a folder, without a path to it, got ''"),
        ("train", ["--name", "../x"], "name must be the name of a folder, without a path to it, got '../x'"),
        ("serve", ["--name", ".."], "name must be the name of a folder, without a path to it, got '..'"),
        ("train", ["--name=file", "--out=."], f"name {IN_THE_WAY}': file is a file"),
        ("train", ["--config", "."], "config must be a Python file, got '.', which is no Python file"),
        ("train", ["--config", ""], "config must be a path, got ''"),
        ("train", ["--resume", "file"], "resume must be a folder with config.json, got 'file'"),
        ("serve", ["--resume", ""], "resume must be a path, got ''"),
        ("train", ["--model.weights", "."], "model.weights must be a file that can be read, got '.': Is a directory"),
        ("serve", ["--part", "."], "part must be a file that can be read, got '.': Is a directory"),
        ("serve", ["--part", "a", "--resume", "b"], "--part takes no run, got also --resume or --name"),
        ("serve", ["--part", "a", "--name", "b"], "--part takes no run, got also --resume or --name"),
        ("serve", ["--part", ""], "part must be a path, got ''"),
        ("serve", ["--tokens", "."], "tokens must be a file that can be read, got '.': Is a directory"),
        ("serve", ["--tokens=~/none"], "tokens must be a file that can be read, got '~/none': No such file"),
        ("eval", ["none", "--server", "localhost:1"], "part must be a file that can be read, got 'none': No such file"),
        (
            "client",
            ["--client-id=0", "--token-file=."],
            "--token-file must be a file that can be read, got '.': Is a dir",
        ),
        ("client", ["--client-id=0", "--state=file"], f"state {IN_THE_WAY}': file is a file"),
        (
            "client",
            ["--client-id=0", "--weights=."],
            "weights must be a file that can be read, got '.': Is a directory",
        ),
        (
            "client",
            ["--client-id=0", "--tls.authority=."],
            "tls.authority must be a file that can be read, got '.': Is",
        ),
    ],
)
def test_paths_are_named_with_what_is_wrong(tmp_path, monkeypatch, capsys, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.run(command, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_paths_are_expanded_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder.create(config.Config(out="~/runs"), "a")
    assert folder.path == tmp_path / "runs/a" and (folder.path / "config.json").exists()
    assert RunFolder.open("~/runs/a")[0].path == folder.path
    assert ClientOptions(client_id=0, state="~/state").folder() == tmp_path / "state"


GOOD = {
    "traffic": dict.fromkeys(("uplink_feature_bytes", "uplink_bytes", "downlink_bytes", "uplink_gradient_bytes"), 1),
    "config": {"codec": "TopK()", "grad_codec": "Identity()"},
    "test": {"top1_percent": 50.0},
    "uncompressed_feature_bytes": 10,
    "wall_seconds": 1.0,
}


@pytest.mark.parametrize(
    ("file", "content", "command", "message"),
    [
        (
            "run",
            "",
            ["train", "--resume", "a"],
            "resume must be a run of msjax train, got 'a', which goes on with",
        ),
        ("run", "", ["eval", "a"], "the run must be one of msjax train, got 'a' of msjax serve, whose clients have"),
        (
            "checkpoints/x",
            "",
            ["serve", "--resume", "a"],
            "resume must be a run of msjax serve, got 'a', which goes on",
        ),
        (
            "run",
            "x",
            ["serve", "--resume", "a", "--listen=localhost:0"],
            "a/run must hold the run's name, 32 hexadecimal",
        ),
        (
            "serve.json",
            '{"tls": 1}',
            ["serve", "--resume", "a"],
            "a/serve.json must be options of msjax serve, but it is",
        ),
        (
            "config.json",
            "{",
            ["train", "--resume", "a"],
            "a/config.json must be a config in JSON, but it is damaged: Expecting",
        ),
        ("config.json", "[]", ["eval", "a"], "a/config.json: config must be an object with fields, got []"),
        (
            "summary.json",
            "{",
            ["train", "--resume", "a"],
            "a/summary.json must be an object in JSON",
        ),
        (
            "summary.json",
            "[1]",
            ["serve", "--resume", "a"],
            "a/summary.json must be an object in JSON",
        ),
        (
            "summary.json",
            "{}",
            ["train", "--resume", "a"],
            "a/summary.json must be the summary of a run of msjax train",
        ),
    ],
)
def test_runs_of_another_command_and_damaged_files(tmp_path, monkeypatch, capsys, file, content, command, message):
    monkeypatch.chdir(tmp_path)
    file = RunFolder.create(config.Config(out=".", compare=False), "a").path / file
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    assert cli.run(command[0], command[1:]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_summaries_are_checked_before_they_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create(config.Config(out=".", compare=False), "a")
    folder.write_summary(GOOD)
    assert cli.run("train", ["--resume", "a"]) == 0
    assert "10.00×" in capsys.readouterr().out
    for section, name in (
        ("traffic", "uplink_bytes"),
        ("config", "codec"),
        ("test", "top1_percent"),
        ("", "wall_seconds"),
    ):
        bad = json.loads(json.dumps(GOOD))
        (bad[section] if section else bad)[name] = []
        folder.write_summary(bad)
        assert cli.run("train", ["--resume", "a"]) == 2
        message = f"msjax train: a/summary.json must be the summary of a run of msjax train, but {name} is not there"
        assert message in capsys.readouterr().err
    for name in ("traffic", "test"):
        folder.write_summary(GOOD | {name: 5})
        assert cli.run("train", ["--resume", "a"]) == 2


def at_once(name, path):
    """Eight runs that start in the same second: their folders' names, and what the others are told."""
    cfg, start, found = config.Config(out=str(path / "new")), threading.Barrier(8), []

    def create(_):
        start.wait()
        try:
            return RunFolder.create(cfg, name).path.name
        except ValueError as error:
            return error

    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(create, range(8)))
    names = [it for it in found if isinstance(it, str)]
    return names, [str(it) for it in found if not isinstance(it, str)]


def test_a_folders_name_is_no_longer_than_a_name_may_be(tmp_path):
    name = f"/data/{'folder/' * 40}{'ö' * 200}.npz"
    model = config.ModelConfig(name=f"/code/{'folder/' * 40}net.py:make_model")
    cfg = config.Config(data=config.DataConfig(name), model=model, out=str(tmp_path))
    folder = RunFolder.create(cfg).path
    assert len(folder.name.encode()) < 255 and "net.py_make_model-öö" in folder.name and "folder" not in folder.name


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path):
    names, refused = at_once(None, tmp_path)
    assert len(set(names)) == 8 and not refused
    assert all((tmp_path / "new" / name / "config.json").stat().st_size for name in names)
    names, refused = at_once("a", tmp_path)
    assert names == ["a"] and len(refused) == 7
    assert all("name must be that of a new run, got 'a'" in it for it in refused)


def test_a_folder_in_which_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"out must be a folder that can be written to, got .*: {tmp_path} may not be"):
        RunFolder.create(config.Config(out=str(tmp_path / "runs")))
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(ValueError, match=f"{tmp_path} is on a read-only file system"):
        ClientOptions(client_id=0, state=str(tmp_path / "state")).check()


def test_models_table_has_the_papers_feature_maps(capsys):
    assert cli.run("models", ["vgg19"]) == 0
    out = capsys.readouterr().out
    assert "38.96 M" in out and "16×16×64" in out and "4×4×256" in out and "2×2×512" in out
    assert "65,536" in out  # bytes a sample at cut 2, uncompressed


def test_models_table_of_a_decoder(tmp_path, capsys):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), 32)
    config = {"model_type": "llama", "vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = ["decoder", "--decoder", str(tmp_path)]
    assert cli.run("models", [*given, "--codec", "Identity()"]) == 0
    out = capsys.readouterr().out
    assert "decoder, 32 tokens of 64" in out and "decoder2" in out and "4,096" in out  # 32 tokens of 32 features
    for arguments, message in (
        (["decoder"], "--decoder must be given for decoder, and for no other, got None"),
        (["mlp", *given[1:]], "--decoder must be given for decoder, and for no other, got '"),
        ([*given, "--input-shape", "8", "8"], "--input-shape must be one number of tokens for decoder, got [8, 8]"),
        ([*given, "--width", "2"], "--width must not be given for decoder, whose file says what it is, got 2.0"),
        ([*given, "--input-shape", "64"], "length must be in 1..32 (max_position_embeddings), got 64"),
    ):
        assert cli.run("models", arguments) == 2
        assert message in capsys.readouterr().err


def test_help_shows_defaults_as_they_are_typed(capsys):
    assert cli.run("train", ["--help"]) == 0
    help = capsys.readouterr().out
    assert 'rounding="nearest"' in help and """'"'"'""" not in help
    assert compress.from_string(repr(compress.MaskEncoded()).replace("'", '"')) == compress.MaskEncoded()


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ("--config", "--name", "--resume")),
        ("serve", ("--config", "--name", "--resume", "--part")),
        ("client", ("--config", "--server")),
        ("eval", ("--config", "--server")),
        ("generate", ("--config", "--server")),
    ],
)
def test_help_lists_where_a_config_and_the_other_part_come_from(capsys, command, options):
    assert cli.run(command, ["--help"]) == 0
    lines = [line.lstrip("│ ") for line in capsys.readouterr().out.splitlines()]
    assert [option for option in options if not any(line.startswith(f"{option} ") for line in lines)] == []


def test_tables_can_be_shown_in_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["msjax", "models", "convnet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out.flush()
    assert b"convnet, 8x8x1, 10 classes" in out.buffer.getvalue()


def test_a_user_without_a_home_folder_is_told_what_to_give(monkeypatch, tmp_path, capsys):
    def load(*args, **options):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(data, "load", load)
    assert cli.run("train", ["--data.data-dir=sets", f"--out={tmp_path}"]) == 2
    message = "data.data_dir and data.cache_dir must be given where the user has no home folder, got 'sets' and None"
    assert message in capsys.readouterr().err


def test_help_needs_no_jax():
    code = "import sys; sys.argv = ['msjax', '--help']; from msjax.cli import main; main.main()"
    code += "; assert 'jax' not in sys.modules"  # whose import would take a second
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "msjax train" in out and "--resume" in out


@pytest.mark.slow
@pytest.mark.skipif(count_cores() < 2, reason="needs two cores")
def test_clients_are_spread_over_the_cores_and_arrays_over_large_pages(tmp_path):
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # and no number of devices
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | flags
    options = ["--clients", "2", "--epochs", "1", "--model.width", "0.125", "--no-compare"]
    run_cli("train", *options, "--out", str(tmp_path), "--name", "a", env=environment)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["environment"]["devices"].startswith("2 ×")
    assert summary["environment"]["variables"] == flags | (cli.LARGE_PAGES if sys.platform == "linux" else {})


def test_unknown_command_is_refused():
    assert "unknown command 'fly'" in run_cli("fly", expect=1).stderr


@pytest.mark.parametrize("says", ["print('y')", "tables.console().print('y')"])
def test_a_reader_that_has_gone_is_no_error(says):
    code = "import sys; from msjax.cli import options; from msjax.runs import tables; "
    code += f"sys.exit(options.run_command('x', lambda _: {says}, []))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(120) == 141


def test_a_log_that_nobody_reads_ends_no_training():
    code = """if True:
        from msjax.cli import serve
        serve._print_line = lambda record, program: print("epoch", record, flush=True)
        for epoch in (1, 2):
            serve._print_epoch(epoch, None)
        print("done", flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(120) == 0 and said.count("training goes on") == 1


def test_an_answer_that_makes_no_sense_makes_one_line(tmp_path, monkeypatch, capsys):
    program = pytest.importorskip("msjax.distributed.client_program", reason="needs the extra `net`").ClientProgram

    def train(self):
        raise ProtocolError("labels must have 1 arrays, got 2")

    monkeypatch.setattr(program, "train", train)
    assert cli.run("client", ["--client-id", "0", "--state", str(tmp_path)]) == 2
    told = "msjax client: the server's answer makes no sense to this client: labels must have 1 arrays, got 2\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize(
    ("name", "status"), [("Interrupted", 75), ("Refused", 2), ("ConnectionError", 75), ("OSError", 2)]
)
def test_a_client_that_may_be_started_again_has_a_status_of_its_own(tmp_path, monkeypatch, capsys, name, status):
    runs = pytest.importorskip("msjax.distributed.client_run", reason="needs the extra `net`")
    program = pytest.importorskip("msjax.distributed.client_program").ClientProgram
    kind = getattr(runs, name, None) or getattr(builtins, name)

    def train(self):
        raise kind("why")

    monkeypatch.setattr(program, "train", train)
    assert cli.run("client", ["--client-id", "0", "--state", str(tmp_path)]) == status
    assert capsys.readouterr().err.endswith("msjax client: why\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_client_that_gets_a_signal_says_how_to_go_on(tmp_path, monkeypatch, capsys, number):
    signal.signal(number, lambda *_: pytest.fail("the signal was not waited for"))  # conftest sets the former again
    program = pytest.importorskip("msjax.distributed.client_program", reason="needs the extra `net`").ClientProgram

    def train(self):
        signal.raise_signal(number)
        time.sleep(60)

    monkeypatch.setattr(program, "train", train)
    assert cli.run("client", ["--client-id", "3", "--state", str(tmp_path)]) == 130
    assert "msjax client 3: stopped by a signal; the same command goes on\n" in capsys.readouterr().out


def test_a_handler_that_could_not_be_set_again_is_left_alone(monkeypatch):
    """Where Python is a part of another program, that has handlers which Python does not know."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *args: pytest.fail("it is set"))
    with stop_on_signal(lambda: None):
        pass


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    history = [{"epoch": 1, "train": {"loss": 1.0, "accuracy": 0.5}}]
    plots.draw_curves(history, "accuracy", "a run", tmp_path / "none" / "curves.png")
    assert caplog.text.count("no picture: ") == 1


def test_an_error_of_a_file_that_ends_a_run_names_the_way_on():
    again = "msjax train --resume runs/a"
    full = OSError(28, "No space left on device", "runs/a/metrics.jsonl")
    told = f"No space left.*; once this is mended, continue with: {again}"
    with pytest.raises(OSError, match=told), naming_the_way_on(again):
        raise full
    for other in (BrokenPipeError(), ValueError("x")):
        with pytest.raises(type(other)) as caught, naming_the_way_on(again):
            raise other
        assert caught.value is other

"""What a user imports: little at first, and one line that says what is missing."""

import ast
import dataclasses
import importlib.metadata
import pathlib
import subprocess
import sys
import typing

import pytest

import msjax
from msjax import config, tasks
from msjax.config import _checks as config_checks
from msjax.split.modes import MODES

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {missing} else found(name, package)
sys.meta_path.insert(0, Blocker())
"""
EXTRAS = ("flax", "optax", "orbax", "tyro", "rich", "safetensors", "matplotlib", "tensorboardX", "grpc")


def run(code, missing=EXTRAS):
    """Runs code in a process that lacks these packages."""
    code = BLOCKED.format(missing=set(missing)) + code
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_names_are_there_when_they_are_named():
    assert {"compress", "data", "models", "tasks", "train", "load_part", "wire", "__version__"} <= set(dir(msjax))
    assert all(getattr(msjax, name) is not None for name in msjax.__all__)
    with pytest.raises(AttributeError, match="module 'msjax' has no attribute 'trian'"):
        _ = msjax.trian


def test_the_core_needs_the_core_alone():
    code = """
import msjax, sys
assert "jax" not in sys.modules
import jax.numpy as jnp
codec = msjax.compress.MaskEncoded(0.5)
payload = codec.encode(jnp.arange(8.0))
msjax.wire.decode(msjax.wire.encode(payload, codec, jnp.arange(8.0)))
print(msjax.__version__)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == msjax.__version__


@pytest.mark.parametrize(
    "name", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("models", "tasks", "load_part"))]
)
def test_a_missing_extra_is_named(name):
    done = run(f"import msjax\ntry: msjax.{name}\nexcept ImportError as error: print(error)")
    assert "which is not installed: pip install 'msjax[train]'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("train", EXTRAS, "train"),
        ("serve", ("grpc",), "train,net"),
        pytest.param("client", ("prometheus_client",), "train,net", marks=pytest.mark.slow),
    ],
)
def test_a_command_says_what_to_install(command, missing, extra):
    done = run(f"from msjax.cli import main; sys.argv = ['msjax', {command!r}]; main.main()", missing)
    assert done.returncode == 2
    assert done.stderr.startswith(f"msjax {command} needs ") and f"pip install 'msjax[{extra}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_without_an_extra_says_what_to_install():
    code = "from msjax.cli import main; sys.argv = 'msjax serve --help'.split(); main.main()"
    done = run(code, ("grpc",))
    assert done.returncode == 0 and done.stdout.startswith("usage: msjax COMMAND")
    assert "needs grpc, which is not installed: pip" in done.stderr


def test_an_option_says_what_to_install():
    code = "from msjax.cli import main; sys.argv = 'msjax eval c.safetensors --server h:1'.split(); main.main()"
    done = run(code, ("grpc",))
    needed = "--server needs grpc, which is not installed: pip install 'msjax[train,net]'"
    assert done.returncode == 2 and done.stderr.strip() == f"msjax eval: {needed}", done.stderr


def test_type_checkers_know_every_public_name():
    """What is imported when it is asked for is imported for them by name."""
    source = ast.parse(pathlib.Path(msjax.__file__).read_text("utf-8"))
    (checking,) = [node for node in source.body if isinstance(node, ast.If)]
    names = [alias.asname for node in checking.body for alias in node.names]
    assert sorted(names) == sorted(msjax._WHERE) == sorted(set(msjax.__all__) - {"__version__"})


ROOMS = {  # of each, what it must not know: rooms above it, and those beside it
    "compress": ("split", "models", "training", "distributed", "cli", "config", "data", "tasks", "build", "runs"),
    "wire": ("split", "models", "training", "distributed", "cli", "config", "data", "tasks", "build", "runs"),
    "tasks": ("split", "models", "training", "distributed", "cli", "config", "data", "build", "runs"),
    "models": ("split", "training", "distributed", "cli", "config", "tasks", "build", "runs"),
    "data": ("split", "models", "training", "distributed", "cli", "config", "tasks", "build", "runs"),
    "split": ("training", "distributed", "cli", "config", "build", "runs"),
    "build": ("training", "distributed", "cli"),
    "training": ("distributed", "cli"),
    "distributed": ("training", "cli"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    package = pathlib.Path(msjax.__file__).parent
    files = [package / f"{room}.py"] if (package / f"{room}.py").exists() else sorted((package / room).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if found == ["msjax"]:
                found = [f"msjax.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            above = [name for name in found for other in ROOMS[room] if f"{name}.".startswith(f"msjax.{other}.")]
            assert not above, (file.name, above)


def test_without_plots_a_run_has_no_curves(tmp_path):
    options = ["--epochs", "1", "--model.width", "0.125", "--clients", "1", "--no-compare", "--out", str(tmp_path)]
    code = f"from msjax.cli import main; sys.argv = ['msjax', 'train', '--name', 'a', *{options}]; main.main()"
    done = run(code, ("matplotlib", "tensorboardX"))
    assert done.returncode == 0, done.stderr
    assert "pip install 'msjax[plots]'" in done.stdout
    assert (tmp_path / "a" / "summary.json").exists() and not (tmp_path / "a" / "curves.png").exists()


def test_the_version_is_in_one_place():
    assert importlib.metadata.version("msjax") == msjax.__version__


def test_what_the_config_names_is_there():
    """The choices of the config, which the command line shows without importing what they name."""
    assert tuple(tasks.TASKS) == config_checks._TASKS
    hints = typing.get_type_hints(config.ModeConfig)
    assert typing.get_args(hints["kind"]) == tuple(MODES)
    fields = set(typing.get_type_hints(config.ModeConfig)) - {"kind", "tail_cut"}
    # The seed of a mode that draws is the run's.
    assert fields | {"seed"} == {field.name for mode in MODES.values() for field in dataclasses.fields(mode)}

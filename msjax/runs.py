"""The run folder: what a run leaves behind, and what it is resumed from.

config.json     the resolved configuration
metrics.jsonl   one line an epoch
summary.json    the result: accuracy, bytes, wall time, versions, hardware
client.safetensors, server.safetensors    the trained halves; see msjax.halves
curves.png      loss and accuracy by epoch
tensorboard/    the same as events
checkpoints/    the training state (Orbax); the last two are kept
"""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

import jax
import orbax.checkpoint as ocp

from msjax import config as config_lib
from msjax.config import Config


class RunFolder:
    """One run's folder. `history` holds the finished epochs' records."""

    def __init__(self, path: pathlib.Path, *, read_only: bool = False):
        self.path = path
        self._read_only = read_only

    @functools.cached_property
    def _checkpoints(self) -> ocp.CheckpointManager:
        # Made when it is needed: it starts JAX, and before that the number of CPU devices may have to be set.
        # Orbax writes under a temporary name and renames, so a checkpoint that is there is whole.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self._read_only else 2,
            create=not self._read_only,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
        )
        return ocp.CheckpointManager((self.path / "checkpoints").absolute(), options=options)

    @classmethod
    def create(cls, config: Config, name: str | None = None) -> "RunFolder":
        """Makes a new folder under `config.out`, named after time, model, data, cut and codec, or `name`.

        Raises:
          ValueError: there is a run of that name.
        """
        if name is None:
            time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            m = config.model
            name = f"{time}-{m.name}-{config.data.name.replace('/', '_')}-{m.cut}-{type(config.codec).__name__}"
        path = pathlib.Path(config.out) / name
        if (path / "config.json").exists():
            raise ValueError(
                f"name must be that of a new run, got {name!r}: {path} exists; --resume {path} continues it"
            )
        path.mkdir(parents=True, exist_ok=True)
        config_lib.save(config, path / "config.json")
        return cls(path)

    @classmethod
    def open(cls, path: str | os.PathLike, *, read_only: bool = False) -> tuple["RunFolder", Config]:
        """Opens the folder of an earlier run, with its config; `read_only` while the run may still be under way.

        Raises:
          ValueError: there is no run at `path`.
        """
        path = pathlib.Path(path)
        if not (path / "config.json").is_file():
            raise ValueError(f"the run must be a folder with config.json, got {str(path)!r}")
        return cls(path, read_only=read_only), config_lib.load(path / "config.json")

    @classmethod
    def open_or_create(cls, config: Config, name: str) -> tuple["RunFolder", Config]:
        """Opens the run `name` under `config.out` where it was begun, with the config that it has, or makes it."""
        path = pathlib.Path(config.out) / name
        if (path / "config.json").is_file():
            return cls.open(path)
        return cls.create(config, name), config

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Saves the training state and what else a resumed run needs, as one checkpoint."""
        if self._checkpoints.latest_step() == step:
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        self._checkpoints.save(step, args=args)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Returns the last checkpoint's state, in the structure of `like`, and progress; None where there is none."""
        step = self._checkpoints.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        found = self._checkpoints.restore(step, args=args)
        return found.state, found.progress

    def close(self) -> None:
        if "_checkpoints" in vars(self):
            self._checkpoints.close()


def write_history(folder: pathlib.Path, history: list[dict[str, Any]]) -> None:
    """Rewrites metrics.jsonl, whole or not at all."""
    write_whole(folder / "metrics.jsonl", "".join(to_json(record) + "\n" for record in history))


def write_summary(folder: pathlib.Path, summary: dict[str, Any]) -> None:
    """Writes summary.json, which a run that is finished has."""
    write_whole(folder / "summary.json", to_json(summary, indent=2) + "\n")


def to_json(record: Any, **options: Any) -> str:
    """Returns `record` as JSON; NaN and infinity, of a run that diverged, as null, since JSON has neither."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), allow_nan=False, **options)


# Settings outside the config that change how fast a run is.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "LD_PRELOAD")
_COMPILERS = ("jax-cuda12-pjrt", "jax-cuda13-pjrt", "libtpu")  # where they are installed


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware that a result depends on."""
    packages = ("msjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages} | {n: v for n in _COMPILERS if (v := _version(n))},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "devices": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model():
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes or rewrites a file, whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)

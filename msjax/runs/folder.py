"""The run folder: what a run leaves behind, and what it is resumed from.

config.json     the resolved configuration
metrics.jsonl   one line an epoch
data.json       what the data are: a SHA-256 each of those to train and to test; of data that are streamed, how many
summary.json    the result: metrics, bytes, wall time, versions, hardware
client.safetensors, server.safetensors    the trained parts; see msjax.parts
curves.png      loss and first metric by epoch
tensorboard/    the same as events
counts.json     of a served run: bytes as serialized and seconds of all its processes, also those that were stopped; and
                how long exchanges took that had to be compiled
built_from.json of a served run with a checkpoint: its samples, and what the clients said of their data
checkpoints/    the training state; the last two are kept; checkpoints.lock is of the process that writes there
"""

import datetime
import itertools
import json
import os
import pathlib
from typing import Any

from msjax import config as config_lib
from msjax.config import Config
from msjax.paths import cannot_write, check_folder_name, expand, folder_to_be
from msjax.runs.checkpoints import Checkpoints
from msjax.runs.files import to_json, write_atomically, write_new

_SPLITS = ("train", "test")


class RunFolder:
    """The folder of one run, at `path`, with its `checkpoints`."""

    def __init__(self, path: str | os.PathLike, *, read_only: bool = False):
        self.path = pathlib.Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep=2, read_only=read_only)

    @classmethod
    def create(cls, config: Config, name: str | None = None) -> "RunFolder":
        """Makes a new folder under `config.out`, named `name`, or after time, model, data, codec and a cut, if any.

        Raises:
          ValueError: there is a run of that name, or no folder can be made there.
        """
        check_new(config, name)
        out = expand("out", config.out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            if name is None:
                path = _make_unique(out, config)
            else:
                path = out / name
                path.mkdir(exist_ok=True)
            # Of two processes one makes it.
            write_new(path / "config.json", config_lib.to_text(config))
        except FileExistsError as error:
            if name is None or pathlib.Path(error.filename).name != "config.json":
                raise cannot_write("out", config.out, error.strerror) from None
            raise _taken(name, path) from None
        except OSError as error:
            raise cannot_write("out", config.out, error.strerror) from None
        return cls(path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        *,
        read_only: bool = False,
        name: str = "the run",
        preset: Config | None = None,
    ) -> tuple["RunFolder", Config]:
        """Opens the folder of an earlier run, with its config; `read_only` while the run may still be under way.

        Args:
          preset: where functions and codecs of the run are now, if their file has moved.

        Raises:
          ValueError: there is no run at `path`; `name` is what the error calls it.
        """
        folder = expand(name, path)
        if is_of_python(folder):
            raise ValueError(
                f"{name} must be of a command, got {str(path)!r} of a run from Python, which has no config: "
                "msjax.load_part reads its parts"
            )
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} must be a folder with config.json, got {str(path)!r}")
        config = config_lib.load(folder / "config.json", preset=preset)
        if preset is not None:
            config = config_lib.with_functions_of(config, preset)
        return cls(folder, read_only=read_only), config

    @classmethod
    def open_or_create(cls, config: Config, name: str) -> tuple["RunFolder", Config]:
        """Opens the run `name` under `config.out` where it was begun, with the config that it has, or makes it."""
        path = expand("out", config.out) / name
        if (path / "config.json").is_file():
            return cls.open(path)
        return cls.create(config, name), config

    def set_config(self, config: Config) -> None:
        """Gives a run another config to go on with, so that it is no longer finished."""
        (self.path / "summary.json").unlink(missing_ok=True)  # first: a run without one goes on, whatever its config
        write_atomically(self.path / "config.json", config_lib.to_text(config))

    def set_places(self, config: Config) -> None:
        """Gives a run a config that says where its files are now, and nothing else anew; a finished run stays so."""
        write_atomically(self.path / "config.json", config_lib.to_text(config))

    def other_data(self, digests: list[str | int]) -> list[str]:
        """Returns which of a run's data, "train" and "test", are not those that it began with, as far as is known.

        Args:
          digests: of both, by `data.digests`.
        """
        given = dict(zip(_SPLITS, digests, strict=True))
        known = given if (kept := self.read_data()) is None else kept
        return [name for name in _SPLITS if known.get(name) != given[name]]

    def read_data(self) -> dict[str, Any] | None:
        """Returns the digests of the data that the run began with; None where none are kept."""
        file = self.path / "data.json"
        return json_object(str(file), file.read_text("utf-8")) if file.exists() else None

    def check_data(self, digests: list[str | int]) -> None:
        """Raises ValueError where a run began with other data; `digests` as of `other_data`."""
        if names := " and ".join(self.other_data(digests)):
            file = self.path / "data.json"
            raise ValueError(f"data must be those that the run began with, got others to {names} ({file})")

    def keep_data(self, digests: list[str | int]) -> None:
        """As `check_data`, and keeps what the data of a new run are."""
        self.check_data(digests)
        if not (file := self.path / "data.json").exists():
            write_atomically(file, to_json(dict(zip(_SPLITS, digests, strict=True)), indent=2) + "\n")

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Rewrites metrics.jsonl from the records of the finished epochs."""
        write_atomically(self.path / "metrics.jsonl", "".join(to_json(record) + "\n" for record in history))

    def read_history(self) -> list[dict[str, Any]]:
        """Returns the records of the finished epochs; raises ValueError where the file is damaged."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text("utf-8").splitlines()
        return [json_object(f"line {number} of {file}", line) for number, line in enumerate(lines, 1)]

    def read_spec(self) -> dict[str, Any]:
        """Returns what a run from Python says of itself; raises ValueError where that is damaged."""
        file = self.path / "spec.json"
        return json_object(str(file), file.read_text("utf-8"))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, which a run that is finished has."""
        write_atomically(self.path / "summary.json", to_json(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """Returns the summary of a finished run, else None; raises ValueError where the file is damaged."""
        file = self.path / "summary.json"
        try:
            return json_object(str(file), file.read_text("utf-8")) if file.exists() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be an object in JSON, but it is damaged: {error}") from None

    @property
    def is_served(self) -> bool:
        """Whether the run is one of `msjax serve`, which has other checkpoints than one of `msjax train`."""
        return (self.path / "run").exists()

    def close(self) -> None:
        """Lets go of the checkpoints."""
        self.checkpoints.close()


def is_of_python(folder: pathlib.Path) -> bool:
    """Whether a folder is one of `msjax.train`, called from Python, which has no config."""
    return (folder / "spec.json").is_file() and not (folder / "config.json").exists()


def check_new(config: Config, name: str | None) -> None:
    """Raises ValueError where `RunFolder.create` would; makes nothing."""
    out = folder_to_be("out", config.out)
    if name is not None:
        check_folder_name("name", name)
        folder_to_be("name", out / name)
        if (out / name / "config.json").exists():
            raise _taken(name, out / name)
        if is_of_python(out / name) or any((out / name / "checkpoints").glob("[0-9]*")):
            raise ValueError(f"name must be that of a new run, got {name!r}: {out / name} has another's checkpoints")


def json_object(what: str, text: str) -> dict[str, Any]:
    """Returns the object that a text in JSON has; ValueError, which names `what` it is of, if it has none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be an object in JSON, but it is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be an object in JSON, but it is damaged: it is a {type(found).__name__}")
    return found


def _taken(name, path):
    return ValueError(f"name must be that of a new run, got {name!r}: {path} exists; --resume {path} continues it")


def _make_unique(out, config):
    """Makes a folder of a name that no other run has, also of those that start in the same second."""
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    plain = config_lib.without_paths(config)
    cut = [plain.model.cut] if plain.has_cut else []
    words = [plain.model.name, plain.data.name, *cut, type(config.codec).__name__]
    words = ["".join(c if c.isalnum() or c in "._" else "_" for c in str(word)) for word in words]
    # A name may have 255 bytes, and letters may take four.
    name = "-".join([time, *(word.encode()[:48].decode(errors="ignore") for word in words)])
    for n in itertools.count(1):
        path = out / (name if n == 1 else f"{name}-{n}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path

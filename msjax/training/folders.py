"""The folder of a run that was started from Python, on objects rather than a config."""

import json
import pathlib
from typing import Any

from msjax.config import OptimConfig
from msjax.data import split_digest
from msjax.models import ModelPart
from msjax.parts import save_part
from msjax.runs import RunFolder, write_atomically
from msjax.runs.folder import json_object
from msjax.split.spec import RunSpec
from msjax.training import processes
from msjax.training.loaded import LoadedRun


def open_folder(path: str, run: LoadedRun, optimizer: Any, alpha: float | None) -> RunFolder:
    """Opens or makes the folder of a run, whose optimizer is told from others if it is an `OptimConfig`.

    Where there are several processes, the first one looks at it and makes it.

    Raises:
      ValueError: it holds another run's checkpoints, or the path is empty or that of a file.
    """
    processes.from_first(lambda: _make(path, run, optimizer, alpha))
    return RunFolder(path)


def _make(path, run, optimizer, alpha):
    folder = pathlib.Path(path)
    if not str(path) or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"folder must be the path of a folder, got {path!r}")
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = run.spec.preprocess
    described = run.spec.describe() | {
        "seed": run.seed,
        "alpha": alpha,
        "optimizer": describe_optimizer(optimizer),
        "loss": _describe_loss(run.spec.task.loss),
        "augment": preprocess.augment if isinstance(preprocess.augment, str) else "a function",
        "mean": preprocess.mean,
        "std": preprocess.std,
        "data": [split_digest(split) for split in (run.dataset.train, run.dataset.test)],
    }
    digest = json.loads(json.dumps(described))
    file = folder / "spec.json"
    if file.exists():
        found = {"loss": digest["loss"]} | json_object(str(file), file.read_text())  # older folders do not say it
        if found != digest:
            differing = sorted(n for n in found.keys() | digest.keys() if found.get(n) != digest.get(n))
            raise ValueError(
                f"folder must be new or that of the same run, got {path!r}, whose run differs in {', '.join(differing)}"
            )
    elif (folder / "config.json").exists():
        raise ValueError(f"folder must not be that of a run of the command line, got {path!r}")
    else:
        write_atomically(file, json.dumps(digest, indent=2) + "\n")


def describe_optimizer(optimizer: Any) -> str:
    """Returns what tells an optimizer from others, as far as that can be told."""
    return repr(optimizer) if isinstance(optimizer, OptimConfig) else type(optimizer).__name__


def _describe_loss(loss):
    """Tells losses of the library by their options; of others no more than their class."""
    return repr(loss) if type(loss).__module__.startswith("msjax.") else type(loss).__name__


def write_parts(
    folder: RunFolder, parts: tuple[ModelPart, ...], spec: RunSpec, *, step: int, up_bits: float | None
) -> None:
    """Writes the trained parts: client.safetensors, server.safetensors, and where there is one tail.safetensors."""
    for name, part in zip(("client", "server", "tail"), parts, strict=False):
        names = {"description": spec.describe(), "step": step, "up_bits": up_bits if name == "client" else None}
        save_part(folder.path / f"{name}.safetensors", name, part, **names)

"""The folder of a run that was started from Python, on objects rather than a config."""

import json
import pathlib
from typing import Any

from msjax.build import DataSummary
from msjax.config import OptimConfig
from msjax.data import digests
from msjax.models import ModelPart
from msjax.parts import save_part
from msjax.runs import RunFolder, write_atomically
from msjax.runs.folder import json_object
from msjax.split.spec import RunSpec
from msjax.split.state import digest
from msjax.training import processes
from msjax.training.loaded import LoadedRun


def open_folder(
    path: str, run: LoadedRun, optimizer: Any, alpha: float | None, *, own_division: bool = False
) -> RunFolder:
    """Opens or makes the folder of a run, whose optimizer is told from others if it is an `OptimConfig`.

    Where there are several processes, the first one looks at it, makes it and locks its checkpoints.

    Raises:
      ValueError: it holds another run's checkpoints, which another program may be using, the path is empty or that of
        a file, or not all processes see the folder.
    """
    processes.from_first(lambda: _make(path, run, optimizer, alpha, own_division))
    folder = RunFolder(path)
    processes.check_shared("folder", folder.path, "spec.json")
    processes.from_first(folder.checkpoints.lock)
    return folder


def _make(path, run, optimizer, alpha, own_division):
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
        "data": digests(run.dataset),
    }
    if own_division:
        described["division"] = digest(run.client_indices)
    described = json.loads(json.dumps(described))
    file = folder / "spec.json"
    if file.exists():
        found = {"loss": described["loss"]} | json_object(str(file), file.read_text())  # older folders do not say it
        if found != described:
            differing = sorted(n for n in found.keys() | described.keys() if found.get(n) != described.get(n))
            longer = ". To train it further, give its parts, see load_part, to a run in another folder"
            raise ValueError(
                f"folder must be new or that of the same run, got {path!r}, whose run differs in {', '.join(differing)}"
                + (longer if differing == ["epochs"] else "")
            )
    elif (folder / "config.json").exists():
        raise ValueError(f"folder must not be that of a run of the command line, got {path!r}")
    else:
        write_atomically(file, json.dumps(described, indent=2) + "\n")


def describe_optimizer(optimizer: Any) -> str:
    """Returns what tells an optimizer from others, as far as that can be told."""
    return repr(optimizer) if isinstance(optimizer, OptimConfig) else type(optimizer).__name__


def _describe_loss(loss):
    """Tells losses of the library by their options; of others no more than their class."""
    return repr(loss) if type(loss).__module__.startswith("msjax.") else type(loss).__name__


def write_parts(
    folder: RunFolder,
    parts: tuple[ModelPart, ...],
    spec: RunSpec,
    summary: DataSummary,
    *,
    step: int,
    up_bits: float | None,
) -> None:
    """Writes the trained parts: client.safetensors, server.safetensors, and where there is one tail.safetensors."""
    more = {"description": spec.describe(), "summary": summary, "step": step}
    for name, part in zip(("client", "server", "tail"), parts, strict=False):
        save_part(
            folder.path / f"{name}.safetensors", name, part, up_bits=up_bits if name == "client" else None, **more
        )

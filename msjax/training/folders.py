"""The folder of a run that was started from Python, on objects rather than a config."""

import json
import pathlib

from msjax.models import ModelPart
from msjax.parts import save_part
from msjax.runs import RunFolder, write_atomically
from msjax.split.spec import RunSpec


def open_folder(path: str, spec: RunSpec) -> RunFolder:
    """Opens or makes the folder of a run.

    Raises:
      ValueError: it holds another run's checkpoints.
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    file, digest = folder / "spec.json", spec.describe()
    if file.exists():
        found = json.loads(file.read_text())
        if found != json.loads(json.dumps(digest)):
            differing = sorted(n for n in found.keys() | digest.keys() if found.get(n) != digest.get(n))
            raise ValueError(
                f"folder must be new or that of the same run, got {path!r}, whose run differs in {', '.join(differing)}"
            )
    elif (folder / "config.json").exists():
        raise ValueError(f"folder must not be that of a run of the command line, got {path!r}")
    else:
        write_atomically(file, json.dumps(digest, indent=2) + "\n")
    return RunFolder(folder)


def write_parts(folder: RunFolder, parts: tuple[ModelPart, ...], spec: RunSpec, *, step: int) -> None:
    """Writes the trained parts: client.safetensors, server.safetensors, and where there is one tail.safetensors."""
    for name, part in zip(("client", "server", "tail"), parts, strict=False):
        save_part(folder.path / f"{name}.safetensors", name, part, description=spec.describe(), step=step)

"""Decoded arrays on disk: one folder an entry, written atomically, checked when read.

An entry holds NAME.npy files (memory-mapped when read) and meta.json, which records each file's shape, dtype, bytes and
CRC-32.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from msjax.data._error import DataError
from msjax.paths import crc32_of, left_behind

FORMAT = 2  # raise it when the layout or the meaning of an entry changes; older entries are then rebuilt


class Damaged(Exception):
    """An entry is there but cannot be used; says why."""


def directory(cache_dir: str | os.PathLike | None) -> Path:
    """The cache folder: `cache_dir`, else $MSJAX_CACHE, else $XDG_CACHE_HOME/msjax, else ~/.cache/msjax."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if os.environ.get("MSJAX_CACHE"):
        return Path(os.environ["MSJAX_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msjax"


def read(entry: Path, digest: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The entry's arrays (read-only memory maps) and metadata, or None where there is none.

    Raises `Damaged` where a file is missing, cut short or changed, the format is an older one, or the source is no
    longer `digest`.
    """
    if not entry.exists():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise Damaged(f"format {meta['format']}, this version writes {FORMAT}")
        if digest is not None and meta["digest"] != digest:
            raise Damaged("the data set it was made from has changed")
        arrays = {}
        for name, spec in meta["arrays"].items():
            path = entry / f"{name}.npy"
            if path.stat().st_size != spec["bytes"] or crc32_of(path) != spec["crc32"]:
                raise Damaged(f"{path.name} is not what was written")
            array = np.load(path, mmap_mode="r")
            if list(array.shape) != spec["shape"] or str(array.dtype) != spec["dtype"]:
                raise Damaged(f"{path.name} has shape {array.shape} and dtype {array.dtype}")
            arrays[name] = array
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    return arrays, meta


def source(entry: Path) -> str | None:
    """What an entry says it was made from, unchecked."""
    try:
        return str(json.loads((entry / "meta.json").read_text())["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _writes(entry: Path) -> Iterator[None]:
    """Around what touches the entry's own files: an OSError means that they cannot be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space there, or name another cache_dir" if full else "name another cache_dir"
        raise DataError(f"cannot write the array cache {entry} ({error}): {advice}") from error


class Draft:
    """An entry being written: make its arrays with `array`, put what is worth knowing into `meta`."""

    def __init__(self, folder: Path, entry: Path):
        self.folder, self.entry = folder, entry
        self.arrays: dict[str, np.ndarray] = {}
        self.meta: dict[str, Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A writable array on disk; what it holds at the end of the `with` block is kept."""
        path = self.folder / f"{name}.npy"
        with _writes(self.entry):
            self.arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
            if hasattr(os, "posix_fallocate"):  # else a full disk kills the process at the first write (SIGBUS)
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return self.arrays[name]

    def finish(self) -> None:
        """Flush every file to disk and write meta.json."""
        specs = {}
        for name, array in self.arrays.items():
            array.flush()
            path = self.folder / f"{name}.npy"
            specs[name] = {
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "bytes": path.stat().st_size,
                "crc32": crc32_of(path),
            }
        with (self.folder / "meta.json").open("w") as file:
            json.dump({"format": FORMAT, **self.meta, "arrays": specs}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def writing(entry: Path) -> Iterator[Draft]:
    """Write an entry beside its place and move it there once complete; an exception leaves nothing behind."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        for left in left_behind(entry.parent, f".{entry.name}.*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        raise DataError(
            f"cannot write the array cache {entry.parent} ({error}): name a writable folder by cache_dir or "
            f"$MSJAX_CACHE"
        ) from error
    try:
        draft = Draft(folder, entry)
        yield draft  # what is raised here comes from what is read, and says so itself
        with _writes(entry):
            draft.finish()
            _move(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, entry: Path) -> None:
    """Rename `folder` to `entry`; a folder cannot be replaced in one step, so an old one is moved aside first."""
    with tempfile.TemporaryDirectory(prefix=f".{entry.name}.old.", dir=entry.parent) as aside:
        for _ in range(10):
            with contextlib.suppress(FileNotFoundError):
                entry.rename(Path(aside) / str(len(os.listdir(aside))))
            try:
                folder.rename(entry)
                return
            except OSError:  # another process moved its own there in between
                if not entry.exists():
                    raise
    raise DataError(f"other processes keep writing the array cache {entry}")

"""Checkpoints of a state by step, kept by Orbax; each is complete or not there, and read as it was written."""

import contextlib
import functools
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from msjax.runs.files import write_atomically

_SUMS = "checksums.json"


_IS_READ_ONLY = "Given directory is read only"  # a warning of Orbax, of what was asked for


class DamagedError(OSError):
    """A checkpoint's files are not what was written."""


class Checkpoints:
    """The checkpoints in one folder: a tree of arrays each, and what else is to be remembered, as JSON.

    Args:
      path: the folder; made when the first is saved.
      keep: how many are kept, the newest; None keeps all until `prune`.
      read_only: leave the folder as it is, as while another process writes to it.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int | None = None, read_only: bool = False):
        self._path, self._keep, self._read_only = pathlib.Path(path), keep, read_only

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Made when it is needed: it starts JAX, and before that the number of CPU devices may have to be set.
        # Orbax writes under a temporary name and renames, so a checkpoint that is there is complete.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self._read_only else self._keep,
            create=not self._read_only,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
        )
        with _without_warning(_IS_READ_ONLY):
            return ocp.CheckpointManager(self._path.absolute(), options=options)

    def steps(self) -> list[int]:
        """Returns the steps of which there is one, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Returns the step of the newest, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, tree: Any, progress: dict[str, Any] | None = None) -> None:
        """Saves the state of a step, unless it is saved already.

        Raises:
          OSError: it cannot be written.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress or {}))
        try:
            self._manager.save(step, args=args)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk comes as any of them
            raise OSError(str(error).splitlines()[0]) from error
        if jax.process_index():  # of several processes, which save together
            return
        folder = self._path / str(step)
        # One that a process left without them was written whole all the same, and is read unchecked.
        write_atomically(folder / _SUMS, json.dumps({name: _crc(folder / name) for name in _files(folder)}))

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of a step, in the structure of `like`, and what was remembered beside it.

        Raises:
          DamagedError: a file is missing or not as it was written; it names that, and the newest intact checkpoint.
          ValueError: the checkpoint has another structure, or cannot be read.
        """
        if (damaged := self._damaged(step)) is not None:
            intact = max((s for s in self.steps() if s < step and self._damaged(s) is None), default=None)
            hint = "there is no intact one before it" if intact is None else f"that of step {intact} is intact"
            where = "the beginning" if intact is None else "there"
            raise DamagedError(
                f"the checkpoint of step {step} is damaged ({damaged}): {hint}; "
                f"delete {self._path / str(step)} to go on from {where}"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError, OSError) as error:
            why = (str(error).splitlines() or [repr(error)])[0]
            raise ValueError(f"{self._path / str(step)} must be a checkpoint of this run: {why[:300]}") from error
        return found.state, found.progress

    def _damaged(self, step):
        """The first file of a checkpoint that is not as it was written, or None."""
        folder = self._path / str(step)
        try:
            written = json.loads((folder / _SUMS).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return _SUMS
        found = set(_files(folder))
        return next((name for name, crc in written.items() if name not in found or _crc(folder / name) != crc), None)

    def prune(self, before: int) -> None:
        """Deletes those of steps before `before`."""
        for step in self.steps():
            if step < before:
                self._manager.delete(step)

    def close(self) -> None:
        """Waits for what is being written, and lets go of the folder."""
        if "_manager" in vars(self):
            self._manager.close()


@contextlib.contextmanager
def _without_warning(beginning: str) -> Iterator[None]:
    """Keeps one warning of Orbax from the log, by how it begins; all others are shown."""

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(beginning)

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _files(folder):
    """The names of all files in a checkpoint's folder, relative to it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _SUMS)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _crc(path):
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc

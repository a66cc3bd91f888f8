"""Checkpoints of a state by step, kept by Orbax; each is complete or not there, and read as it was written.

They are written while training goes on: `save` returns once the state is copied to the host, and a thread writes it
under a temporary name, with the sums of its files, and renames it. What counts as saved is what has its final name.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
import traceback
from collections.abc import Container, Iterator
from typing import Any

import filelock
import jax
import orbax.checkpoint as ocp

from msjax.paths import crc32_of
from msjax.runs.files import write_atomically

_log = logging.getLogger("msjax")

_SUMS = "checksums.json"
_ITEMS = ("state", "progress")
"""The folders in that of a checkpoint; what else is there Orbax writes after the sums: times, and that it is done."""

# Warnings of Orbax: of what was asked for, and of what `wait` has taken, which it takes for time that training lost.
_IS_READ_ONLY = "Given directory is read only"
_HAS_WAITED = "Waiting for previous save to complete took"


_FAILED = ("Handler Commit operations", "Save Finalize thread", "_SignalingThread", "Failed to write metadata")
"""In what Orbax logs, with a traceback, of a failed save."""
_BEGINNING = threading.Lock()
"""Orbax numbers the saves of a program, and one that begins takes the last number for its own: so one does at a time.
With another's number it would write before its folder is there."""


def _is_not_told(record: logging.LogRecord) -> bool:
    """Whether a line of Orbax's log says something that no error of `Checkpoints` says."""
    return not (record.exc_info and any(words in str(record.msg) for words in _FAILED))


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's log is of something else than what Orbax has left behind after a failed save."""
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
    return not any(f"{os.sep}orbax{os.sep}" in frame.filename for frame in frames)


@functools.cache
def _pass_over_late_reports() -> None:
    """Keeps from the standard error what says nothing: of a failed save, tensorstore's other writes report too late.

    Orbax has closed the event loop by then, and there is no caller that could take the error.
    """
    tell = sys.unraisablehook

    def hook(unraisable):
        names = [frame.name for frame in traceback.extract_tb(unraisable.exc_traceback)]
        if unraisable.object is not None or names != ["call_soon_threadsafe", "_check_closed"]:
            tell(unraisable)

    sys.unraisablehook = hook


class DamagedError(OSError):
    """A checkpoint's files are not what was written.

    Attributes:
      damage: what is not as it was.
      path: the checkpoint's folder.
    """

    def __init__(self, damage: str, path: pathlib.Path, advice: str):
        super().__init__(f"{damage}: {advice}")
        self.damage, self.path = damage, path


class NotSavedError(OSError):
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints in one folder: a tree of arrays each, and what else is to be remembered, as JSON.

    Args:
      path: the folder; made when the first is saved.
      keep: how many are kept, the newest; None keeps all until `prune`.
      read_only: leave the folder as it is, as while another process writes to it.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int | None = None, read_only: bool = False):
        self._path, self._keep, self._read_only = pathlib.Path(path), keep, read_only
        self._writing: int | None = None  # the step of what was begun last, until it was waited for
        self._lock: filelock.BaseFileLock | None = None

    def lock(self) -> None:
        """Keeps other processes from writing here, until `close` or the end of this one; done before the first use.

        It is a lock of the operating system on a file beside the folder, which a process that is killed lets go of.
        Where the file system has none, or the file cannot be made, a warning says so, and nobody is kept out.

        Raises:
          ValueError: another process has it.
        """
        if self._read_only or self._lock is not None:
            return
        # One for all of this process, which may open a folder again.
        path = self._path.absolute()
        options = {"is_singleton": True, "thread_local": False, "fallback_to_soft": False}
        lock = filelock.FileLock(path.with_name(f"{path.name}.lock"), **options)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"one process at a time may write to {self._path}, and another one does") from None
        except (OSError, NotImplementedError) as error:
            _log.warning("other processes are not kept from writing to %s: %s", self._path, error)
            return
        self._lock = lock

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Made when it is needed: it starts JAX, and before that the number of CPU devices may have to be set.
        # Orbax writes under a temporary name and renames, so a checkpoint that is there is complete. The callback comes
        # before it renames, and makes it fail where it raises.
        writes = None if self._read_only else ocp.AsyncOptions(post_finalization_callback=self._write_sums)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if self._read_only else self._keep,
            create=not self._read_only,
            enable_async_checkpointing=not self._read_only,
            async_options=writes,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
        )
        if jax.process_index() == 0:
            self.lock()
        logging.getLogger("absl").addFilter(_is_not_told)
        logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
        _pass_over_late_reports()
        with _without_warning(_IS_READ_ONLY):
            return ocp.CheckpointManager(self._path.absolute(), options=options)

    def steps(self) -> list[int]:
        """Returns the steps of which there is one, complete on disk, oldest first."""
        return sorted(step for step in self._manager.all_steps() if step != self._writing or self._is_there(step))

    def latest(self) -> int | None:
        """Returns the step of the newest, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, tree: Any, progress: dict[str, Any] | None = None) -> None:
        """Begins to save the state of a step, unless it is saved already; first waits for what was begun before.

        The arrays are copied before it returns: the caller may give them away.

        Raises:
          OSError: it cannot be written, or what was begun before could not.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        progress = json.loads(json.dumps(progress or {}))  # as it is now: it is written later
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress))
        self._writing = step
        try:
            self._try_to_make(step)
            with _BEGINNING, _without_warning(_HAS_WAITED):
                self._manager.save(step, args=args)
        except _FAILURES as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Does nothing but say what went wrong with the last `save`, once it has; does not wait.

        Raises:
          OSError: it could not be written.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until what was begun is complete on disk.

        Raises:
          OSError: it could not be written; older ones are as they were.
        """
        if self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
        except _FAILURES as error:
            raise self._failed(error) from error
        self._writing = None

    def _failed(self, error):
        """The error of what could not be written, which it forgets, and makes room."""
        step, self._writing = self._writing, None
        for folder in self._temporary(step):
            shutil.rmtree(folder, ignore_errors=True)
        self._manager.reload()  # it has crossed out those that this one was to replace
        why = (str(error).splitlines() or [repr(error)])[0]
        return NotSavedError(f"the checkpoint of step {step} in {self._path} could not be written: {why}")

    def _try_to_make(self, step):
        """Raises OSError where no folder can be made: Orbax's threads would wait twenty minutes for theirs."""
        folder = self._path / f"{step}.orbax-checkpoint-tmp-{jax.process_index()}"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # as Orbax clears what earlier processes have left, at its time
            folder.rmdir()

    def _is_there(self, step):
        return (self._path / str(step)).exists()

    def _temporary(self, step):
        return list(self._path.glob(f"{step}.orbax-checkpoint-tmp*"))

    def _write_sums(self):
        """Writes the sums of the files of what is being written, which all are there; of several processes one does."""
        if jax.process_index():
            return
        (folder,) = self._temporary(self._writing)
        write_atomically(folder / _SUMS, json.dumps({name: crc32_of(folder / name) for name in _files(folder)}))

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of a step, in the structure of `like`, and what was remembered beside it.

        Raises:
          OSError: as of `wait`, which comes first.
          DamagedError: a file is missing or not as it was written; it names that, and the newest intact checkpoint.
          ValueError: the checkpoint has another structure, or cannot be read.
        """
        self.wait()
        if (damaged := self._damaged(step)) is not None:
            intact = max((s for s in self.steps() if s < step and self._damaged(s) is None), default=None)
            hint = "there is no intact one before it" if intact is None else f"that of step {intact} is intact"
            where = "the beginning" if intact is None else "there"
            path, damage = self._path / str(step), f"the checkpoint of step {step} is damaged ({damaged})"
            raise DamagedError(damage, path, f"{hint}; delete {path} to go on from {where}")
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
        if not isinstance(written, dict):
            return _SUMS
        found = set(_files(folder))
        return next(
            (name for name, crc in written.items() if name not in found or crc32_of(folder / name) != crc), None
        )

    def prune(self, kept: Container[int]) -> None:
        """Deletes those of all other steps than these."""
        for step in self.steps():
            if step not in kept:
                self._manager.delete(step)

    def drop_after(self, after: int) -> None:
        """Deletes those of steps behind `after`."""
        for step in self.steps():
            if step > after:
                self._manager.delete(step)

    def close(self) -> None:
        """Waits for what is being written, and lets go of the folder.

        Raises:
          OSError: as of `wait`.
        """
        with contextlib.ExitStack() as at_the_end:
            if self._lock is not None:
                at_the_end.callback(self._lock.release)
                self._lock = None
            if "_manager" in vars(self):
                at_the_end.callback(self._manager.close)
                self.wait()


_FAILURES = (OSError, ValueError, RuntimeError)
"""A full disk comes as any of them."""


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
    """The names of the files of a checkpoint that it has sums of, relative to its folder."""
    files = (path for item in _ITEMS for path in (folder / item).rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)

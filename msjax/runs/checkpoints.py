"""Checkpoints of a state by step, kept by Orbax; each is complete or not there."""

import functools
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


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
        )
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

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of a step, in the structure of `like`, and what was remembered beside it.

        Raises:
          ValueError: the checkpoint is damaged, or has another structure.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError, OSError) as error:
            why = (str(error).splitlines() or [repr(error)])[0]
            raise ValueError(f"{self._path / str(step)} must be a checkpoint of this run: {why[:300]}") from error
        return found.state, found.progress

    def prune(self, before: int) -> None:
        """Deletes those of steps before `before`."""
        for step in self.steps():
            if step < before:
                self._manager.delete(step)

    def close(self) -> None:
        """Waits for what is being written, and lets go of the folder."""
        if "_manager" in vars(self):
            self._manager.close()

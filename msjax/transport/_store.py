"""Checkpoints of one party, by step; each is whole or not there."""

import functools
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from msjax.parties import NONE, Server
from msjax.simulate import Sums
from msjax.step import HalfState


class ClientStore:
    """A client's half at some steps.

    The server's last checkpoint is never newer than the clients', so a client keeps what the server may go back to.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path

    @functools.cached_property
    def _manager(self):
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False, max_to_keep=None)
        return ocp.CheckpointManager(self._path.absolute(), options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: HalfState) -> None:
        """Raises OSError where it cannot be written."""
        _save(self._manager, step, state, {})

    def restore(self, step: int, like: HalfState) -> HalfState:
        return _restore(self._manager, step, like)[0]

    def prune(self, saved_step: int) -> None:
        """Deletes what is older than the server's last checkpoint."""
        for step in self.steps():
            if step < saved_step:
                self._manager.delete(step)

    def close(self) -> None:
        self._manager.close()


class ServerStore(ClientStore):
    """The server's half, the half that goes round in sequential mode, and the sums of the epoch under way."""

    def __init__(self, path: pathlib.Path, progress: dict[str, Any]):
        super().__init__(path)
        self._progress = progress

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, party: Server) -> None:
        tree = {"state": party.state} | ({} if party.relayed is None else {"relayed": party.relayed})
        _save(self._manager, step, tree, {"train": party.train, "test": party.test, **self._progress})
        self.prune(step)

    def restore(self, step: int, party: Server) -> None:
        tree = {"state": party.state} | ({"relayed": party.relayed_like} if party.relays else {})
        tree, progress = _restore(self._manager, step, tree)
        party.state, party.relayed = tree["state"], tree.get("relayed")
        party.train, party.test = (Sums(*progress.pop(name)) for name in ("train", "test"))
        self._progress.clear()
        self._progress.update(progress)

    def forget(self, party: Server) -> None:
        """What there is before the first step."""
        party.train = party.test = NONE
        self._progress.clear()


def _save(manager, step, tree, progress):
    if step in manager.all_steps():
        return
    args = ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress))
    try:
        manager.save(step, args=args)
    except (OSError, ValueError, RuntimeError) as error:  # a full disk comes as any of them
        raise OSError(str(error).splitlines()[0]) from error


def _restore(manager, step, like):
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
    found = manager.restore(step, args=args)
    return found.state, found.progress

"""Checkpoints of one party by step, as they are kept in a run over a network."""

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from msjax.distributed.membership import LET_IN_WITHOUT
from msjax.runs.checkpoints import Checkpoints, DamagedError
from msjax.split.metrics import MetricSums
from msjax.split.parties import Server
from msjax.split.state import check_constants, digest

_CONSTANTS = "constants"
"""In a server's checkpoint: the digest of what never changes, which the checkpoint leaves out."""


class ClientStore(Checkpoints):
    """A client's part at some steps, each `Client.checkpoint()`.

    The server's last checkpoint is never newer than the clients', so a client keeps what the server may go back to.
    """

    def restore(self, step: int, like: Any) -> Any:
        """Returns what was saved before a step; raises as `Checkpoints.restore` does."""
        try:
            return super().restore(step, like)[0]
        except DamagedError as error:  # an older one does not help: the others go on from this step
            advice = f"put {error.path} back from a backup; or {LET_IN_WITHOUT}"
            raise DamagedError(error.damage, error.path, advice) from None


class Held(NamedTuple):
    """What a server's checkpoint is to have, while training goes on: arrays that do not change, and copies."""

    tree: dict[str, Any]
    progress: dict[str, Any]


class ServerStore(Checkpoints):
    """The server's part, the part that goes round in sequential mode, and the sums of the epoch under way.

    Args:
      path: the folder.
      progress: what else is remembered with a checkpoint, and put back with it; JSON-ready.
      before_save: called before a checkpoint is written.
    """

    def __init__(
        self, path: str | os.PathLike, progress: dict[str, Any], before_save: Callable[[], None] = lambda: None
    ):
        super().__init__(path, keep=1)
        self._progress, self._before_save = progress, before_save
        self._digest: tuple[Any, str | None] | None = None

    def _digest_of_constants(self, party):
        """That of what never changes in the server's part, found once for a run; None where there is no such."""
        names = party.spec.server_constants
        if not names:
            return None
        if self._digest is None or self._digest[0] is not party.spec:
            self._digest = party.spec, digest({name: party.state.stats[name] for name in sorted(names)})
        return self._digest[1]

    def hold(self, party: Server) -> Held:
        """Returns what is to be saved of the server as it is now."""
        tree = _to_save(party)
        if party.part_in_transit is not None:
            tree["relayed"] = party.part_in_transit
        sums = {"train": _to_json(party.train), "test": _to_json(party.test)}
        digest_ = self._digest_of_constants(party)
        constants = {} if digest_ is None else {_CONSTANTS: digest_}
        return Held(tree, copy.deepcopy(sums | constants | self._progress))

    def save(self, step: int, held: Held, **more: Any) -> None:
        """Begins to save the server's state before a step, in place of older ones; raises OSError as of a client.

        Args:
          more: JSON-ready values by name, remembered beside `progress` and put back with it.
        """
        self._before_save()
        super().save(step, held.tree, held.progress | more)

    def restore(self, step: int, party: Server) -> None:
        """Puts the server's state before a step into `party`.

        Raises:
          ValueError: what never changes, which checkpoints leave out, is not in `party` as it was.
        """
        tree = _to_save(party)
        if party.spec.mode.hands_parts_on(party.spec.schedule):
            tree["relayed"] = np.zeros(party.spec.client_state_values, np.float32)
        tree, progress = super().restore(step, tree)
        check_constants(self._digest_of_constants(party), progress.pop(_CONSTANTS, None))
        party.state = tree["state"].with_constants_of(party.state, party.spec.server_constants)
        party.memory = tree.get("memory", ())
        party.part_in_transit = tree.get("relayed")
        party.train, party.test = (_from_json(progress.pop(name), party) for name in ("train", "test"))
        self._progress.clear()
        self._progress.update(progress)

    def forget(self, party: Server) -> None:
        """Makes the party and what is remembered as they are before the first step."""
        party.train = party.test = MetricSums()
        self._progress.clear()


def _to_save(party):
    """Of the server: its part without what never changes, and what it remembers of averages."""
    state = party.state.without(party.spec.server_constants)
    return {"state": state} | ({"memory": party.memory} if party.memory else {})


def _to_json(sums):
    values = None if sums.sums is None else {name: np.asarray(v).tolist() for name, v in sums.sums.items()}
    return {"loss": float(sums.loss), "samples": int(sums.samples), "sums": values}


def _from_json(tree, party):
    likes = party.spec.metric_sums_like
    if isinstance(tree, list):  # loss, top-1, top-5, samples: what the first version saved
        loss, top1, top5, samples = tree
        sums = {"top1_percent": np.int32([top1, samples]), "top5_percent": np.int32([top5, samples])}
        return MetricSums(loss, samples, sums if samples else None)
    sums = tree["sums"]
    if sums is not None:
        sums = {name: np.asarray(sums[name], like.dtype) for name, like in likes.items()}
    return MetricSums(tree["loss"], tree["samples"], sums)

"""The parts of the network that a party has, of which alone it makes the arrays."""

import optax

from msjax import build, config, models
from msjax.split.early import warn_of_narrow
from msjax.split.make_spec import init_part
from msjax.split.state import PartState

CLIENT = ("client", "tail")
SERVER = ("server",)
SECONDS_BETWEEN_TRIES = 30.0
"""Of a trained part that cannot be written, as where the disk is full."""


class OwnParts:
    """A party's parts: their arrays until its state is made of them, and the shapes of the whole network's.

    Args:
      cfg: of the run; weights are read where it says.
      own: `CLIENT` or `SERVER`; or nothing, where shapes are all that is wanted.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """

    def __init__(self, cfg: config.Config, summary: build.DataSummary, own: tuple[str, ...] = ()):
        self.summary = summary
        parts = build.make_parts(cfg, summary, weights=cfg.model.weights, own=own)
        self.shapes = tuple(part.shapes() for part in parts)
        """All parts of the network, with shapes and dtypes in place of arrays."""
        named = zip(models.PARTS, parts, strict=False)
        self._own: list[models.ModelPart] | None = [part for name, part in named if name in own]

    def first_state(self, optimizer: optax.GradientTransformation) -> PartState:
        """Returns what the party begins with, once: the arrays are then the state's alone."""
        own, self._own = self._own, None
        if not own:
            raise RuntimeError("the first state is made of a party's parts once")
        warn_of_narrow(own)
        return init_part(optimizer, *own)

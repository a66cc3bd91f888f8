"""The parts of the network that a party has, of which alone it makes the arrays."""

import optax

from msjax import build, config
from msjax.models import ModelPart
from msjax.split.make_spec import init_part
from msjax.split.state import PartState

CLIENT = ("client", "tail")
SERVER = ("server",)


class OwnParts:
    """A party's parts: their arrays until its state is made of them, and the shapes of the whole network's.

    Args:
      cfg: of the run; weights are read where it says.
      own: `CLIENT` or `SERVER`.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """

    def __init__(self, cfg: config.Config, summary: build.DataSummary, own: tuple[str, ...]):
        self._cfg, self.summary, self._own = cfg, summary, own
        self._made: tuple[ModelPart, ...] | None = self._make()
        self.shapes = tuple(part.shapes() for part in self._made)
        """All parts of the network, with shapes and dtypes in place of arrays."""

    def first_state(self, optimizer: optax.GradientTransformation) -> PartState:
        """Returns what the party begins with; called again, it makes the arrays again, as it keeps none."""
        parts, self._made = self._make() if self._made is None else self._made, None
        return init_part(optimizer, *(parts[::2] if self._own == CLIENT else parts[1:2]))

    def _make(self):
        return build.make_parts(self._cfg, self.summary, weights=self._cfg.model.weights, own=self._own)

"""How the clients work together: one class a mode, each in a file of its own.

A mode says what is exchanged in a step, what the parties do with it beyond the passes forward and backward, and how the
same is computed in one program. A new mode is a new file and a line in `MODES`.
"""

from msjax.split.modes._mode import Mode
from msjax.split.modes._parallel import Parallel
from msjax.split.modes._sequential import Sequential
from msjax.split.modes._splitfed import SplitFed

MODES: dict[str, type[Mode]] = {"parallel": Parallel, "splitfed": SplitFed, "sequential": Sequential}
"""The modes by name, as the config and the command line name them."""

__all__ = ["MODES", "Mode", "Parallel", "Sequential", "SplitFed"]

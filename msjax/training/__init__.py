"""Training in one program: simulated clients, their devices, the loop, evaluation. `train` is what users call."""

from msjax.split.finite import NonFiniteError
from msjax.training.api import TrainResult, train
from msjax.training.loop import Interrupted
from msjax.training.processes import ProcessLostError

__all__ = ["Interrupted", "NonFiniteError", "ProcessLostError", "TrainResult", "train"]

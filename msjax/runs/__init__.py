"""What a run leaves behind: its folder, checkpoints, progress while it trains, tables and pictures."""

from msjax.runs.checkpoints import Checkpoints
from msjax.runs.environment import environment
from msjax.runs.files import to_json, write_atomically
from msjax.runs.folder import RunFolder

__all__ = ["Checkpoints", "RunFolder", "environment", "to_json", "write_atomically"]

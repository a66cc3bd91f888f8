"""Codecs of others, after their sources, to be measured in the same harness as those of `msjax.compress`.

Each sees the features of one client's batch, (batch, …). What each does otherwise than its source says is in its
docstring. They are no part of the library: their payloads may change, and they have no NumPy encoder.

SplitFC, C3-SL and FedLite are written from what their abstracts say, and have not been compared with their authors'
programs; of SplitFC the rule by which columns are kept is the least certain. Compare with care before you cite them.
"""

from experiments.rivals.c3sl import C3SL
from experiments.rivals.product import ProductQuantizer
from experiments.rivals.splitfc import SplitFC
from experiments.rivals.tah import TAHQuant

__all__ = ["C3SL", "ProductQuantizer", "SplitFC", "TAHQuant"]

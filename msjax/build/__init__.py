"""From a config and a summary of the data to the description of a run and its first state."""

from msjax.build._data import batch_of_small_share, divide, load_data, make_preprocess, pixel_maximum, shares
from msjax.build._decoder import decoder_config, resolved
from msjax.build._network import check_own_model, identity, make_model, make_parts, may_be_negative, to_go_on
from msjax.build._run import Built, build, check_tail, check_without_data, make_mode, make_task, spec_of
from msjax.build._summary import DataSummary, check_tokenizer

__all__ = [
    "Built",
    "DataSummary",
    "batch_of_small_share",
    "build",
    "check_own_model",
    "check_tail",
    "check_tokenizer",
    "check_without_data",
    "decoder_config",
    "divide",
    "identity",
    "load_data",
    "make_mode",
    "make_model",
    "make_parts",
    "make_preprocess",
    "make_task",
    "may_be_negative",
    "pixel_maximum",
    "resolved",
    "shares",
    "spec_of",
    "to_go_on",
]

"""The configuration of a run: frozen dataclasses, saved with every result and set from the command line.

A preset is a Python file with `get_config() -> Config`; see `configs/`.
"""

from msjax.config._checks import MAX_SEED, check_used
from msjax.config._codecs import named, parse_codec
from msjax.config._json import earlier_names, from_json, load, load_preset, to_json, to_text
from msjax.config._references import (
    call_reference,
    check_own,
    check_received,
    is_local_path,
    is_same_name,
    passed_over,
    references,
    resolve,
    with_fields,
    with_functions_of,
    with_own,
    with_own_paths,
    with_places_of,
    without_paths,
)
from msjax.config._sections import (
    CodecFlag,
    Config,
    DataConfig,
    LoraConfig,
    ModeConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    by_name,
)
from msjax.references import is_reference

__all__ = [
    "MAX_SEED",
    "CodecFlag",
    "Config",
    "DataConfig",
    "LoraConfig",
    "ModeConfig",
    "ModelConfig",
    "OptimConfig",
    "TaskConfig",
    "by_name",
    "call_reference",
    "check_own",
    "check_received",
    "check_used",
    "earlier_names",
    "from_json",
    "is_local_path",
    "is_reference",
    "is_same_name",
    "load",
    "load_preset",
    "named",
    "parse_codec",
    "passed_over",
    "references",
    "resolve",
    "to_json",
    "to_text",
    "with_fields",
    "with_functions_of",
    "with_own",
    "with_own_paths",
    "with_places_of",
    "without_paths",
]

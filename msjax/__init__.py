"""Split learning in JAX with compressed features.

    import msjax
    result = msjax.train(model=(client, server), data=(inputs, labels), codec=msjax.compress.MaskEncoded())

`compress` has the codecs, `wire` their payloads as bytes; both need JAX alone. `data`, `models`, `tasks` and `modes`
are what a run is made of, `train` runs it, `load_part` reads a trained part, `load_pair` both, with which `predict`
predicts; a `Generator` continues texts with a decoder. Modules are imported when they are named.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msjax import compress as compress
    from msjax import data as data
    from msjax import models as models
    from msjax import tasks as tasks
    from msjax import wire as wire
    from msjax.generation import Generator as Generator
    from msjax.pair import load_pair as load_pair
    from msjax.pair import predict as predict
    from msjax.parts import load_part as load_part
    from msjax.parts import save_part as save_part
    from msjax.split import modes as modes
    from msjax.training import train as train

_WHERE = {
    "Generator": "msjax.generation:Generator",
    "compress": "msjax.compress",
    "data": "msjax.data",
    "load_pair": "msjax.pair:load_pair",
    "load_part": "msjax.parts:load_part",
    "models": "msjax.models",
    "modes": "msjax.split.modes",
    "predict": "msjax.pair:predict",
    "save_part": "msjax.parts:save_part",
    "tasks": "msjax.tasks",
    "train": "msjax.training:train",
    "wire": "msjax.wire",
}
"""Where each public name is."""

__all__ = ["__version__", *_WHERE]


def _needs(error: ModuleNotFoundError, extras: str) -> str:
    """Says what to install; raises the error where it is a module of msjax itself that is not there."""
    if (error.name or "").partition(".")[0] == "msjax":
        raise error
    return f"needs {error.name}, which is not installed: pip install 'msjax[{extras}]'"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'msjax' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"msjax.{name} {_needs(error, 'train')}", name=error.name) from error
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)

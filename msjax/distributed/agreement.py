"""What the parties of a run must agree on: shapes, task, codecs; compared before the first step, as code never travels.

Each party builds the run from its own code, and a client says what came of it in its Ready message.
"""

import hashlib
import json
import math
from typing import Any

import numpy as np

from msjax.build import DataSummary
from msjax.split.spec import RunSpec

_COUNTS = ("samples", "test_samples")
"""Of the description: each client's own, until the server has said how many all draw."""

_CLASS_NAMES, _COLUMN_NAMES = "hash of class names", "hash of column names"
_SHARED = "hash of shared data"
_NOT_ALL_SAY = (_CLASS_NAMES, _SHARED)
"""Not all data have names of classes, and earlier versions do not say the hash of data."""
_NAME_ALL = " (data.classes, or a preset's from_arrays(…, classes=…), names all classes for those that lack some)"
_HELP = {
    "num_classes": _NAME_ALL,
    _CLASS_NAMES: _NAME_ALL,
    _COLUMN_NAMES: " (a column of texts has a name for each text; data.drop leaves columns out)",
    "inputs": " (of images, data.image_size and data.channels make the clients' alike)",
    _SHARED: (
        " (each client takes its share of data that all have alike; clients with data of their own have --own-data. "
        "Other versions of a library may read the same images in another way)"
    ),
    "own_tests": " (all clients have --own-data, or none has)",
}
"""What may help where clients with own data differ."""

_OWN = ("mean", "std", "columns", "classes")
"""Of a summary: what follows from the values of a client's data, and names of classes; a server need not know it."""


def describe(
    spec: RunSpec,
    summary: DataSummary,
    identity: dict[str, str] | None = None,
    *,
    shared: list[str | int] | None = None,
) -> str:
    """Returns what a client has, as JSON: its data's shapes, and the description of the run that it has built.

    Args:
      identity: of its network; see `build.identity`.
      shared: the digests of the data, see `data.digests`, where each client takes a share of what all have.
    """
    data = {name: value for name, value in summary.to_json().items() if name not in _OWN}
    data["normalized channels"] = None if summary.mean is None else len(summary.mean)
    if summary.columns is not None:  # two tables may be equally wide, and one miss what the other has
        data[_COLUMN_NAMES] = _hash([name for column in summary.columns for name in column.names])
    if summary.classes is not None:  # likewise, two may have equally many classes
        data[_CLASS_NAMES] = _hash(summary.classes)
    if shared is not None:
        data[_SHARED] = _hash(shared)
    return json.dumps({"data": data, "run": _of_run(spec, identity)})


def _hash(values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def summary_of(description: dict[str, Any]) -> DataSummary:
    """Returns what a server knows of its clients' data: all but what inputs are normalised by.

    Raises:
      ValueError: the description lacks something, or a number in it is none that data can have.
    """
    try:
        _check_numbers(description["data"])
        channels = description["data"]["normalized channels"]
        mean, std = (None if channels is None else (value,) * channels for value in (0.0, 1.0))
        return DataSummary.from_json(description["data"] | {"mean": mean, "std": std})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"description must be that of a client's data and run: {error!r}") from None


def _check_numbers(tree):
    """Raises ValueError for shapes and counts that no data has: memory is taken by them before more is known."""
    arrays = [*tree["inputs"], *tree["labels"], ["", "uint8", tree.get("input_shape", ())]]
    values = 0
    for name, dtype, shape in arrays:
        where = f" of {name!r}" if name else ""
        if not (isinstance(shape, list | tuple) and all(_is_count(size) for size in shape)):
            raise ValueError(f"a shape must have sizes of at least 1, got {_short(shape)}{where}")
        values += math.prod(shape)
        if not (_is_count(values)):
            raise ValueError(f"an example must have fewer than 2^31 values, got the shape {_short(shape)}{where}")
        if np.dtype(dtype).kind not in "biufV" or np.dtype(dtype).itemsize > 16:
            raise ValueError(f"arrays must be of numbers, got {_short(dtype)}{where}")
    classes, channels = tree["num_classes"], tree["normalized channels"]
    if not (classes is None or _is_count(classes)):
        raise ValueError(f"num_classes must be an integer of at least 1, got {_short(classes)}")
    widest = max((shape[-1] for _, _, shape in tree["inputs"] if shape), default=1)
    if not (channels is None or (_is_count(channels) and channels <= widest)):
        raise ValueError(f"normalized channels must be at most those of the inputs, {widest}, got {_short(channels)}")


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def parse(description: str) -> dict[str, Any]:
    """Returns what `describe` made.

    Raises:
      ValueError: it is no such description.
    """
    try:
        found = json.loads(description)
        if found.keys() != {"data", "run"} or not all(isinstance(value, dict) for value in found.values()):
            raise ValueError("it lacks the parts that it should have")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"description must be that of a client's data and run: {error}") from None
    return found


def differences(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Returns in which fields two descriptions differ, as "task is 'a' here and 'b' there"; empty if in none."""
    found = []
    for part in ("data", "run"):
        mine, theirs = here.get(part, {}), there.get(part, {})
        for name in sorted(mine.keys() | theirs.keys()):
            if name in _NOT_ALL_SAY and not (name in mine and name in theirs):
                continue
            if (a := mine.get(name)) != (b := theirs.get(name)):
                found.append(f"{name} is {_short(a)} here and {_short(b)} there{_HELP.get(name, '')}")
    return "; ".join(found)


def of_run(spec: RunSpec, identity: dict[str, str] | None = None) -> dict[str, Any]:
    """Returns the description of the run that this party has built, as `parse` gives a client's."""
    return json.loads(json.dumps(_of_run(spec, identity)))


def _of_run(spec, identity):
    found = {name: value for name, value in spec.describe().items() if name not in _COUNTS}
    return found | {f"model {name}": value for name, value in (identity or {}).items()}


def _short(value):
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"

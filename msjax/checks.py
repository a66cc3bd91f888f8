"""Checks of options that functions of several rooms take."""

from typing import Any

import numpy as np


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Returns an option that is an integer.

    Raises:
      ValueError: it is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or (least is not None and value < least):
        rule = "an integer" if least is None else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return int(value)

"""Checks of options that functions of several rooms take, and how they quote an error."""

from collections.abc import Callable
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Returns an option that is an integer.

    Raises:
      ValueError: it is none, below `least` or above `most`.
    """
    if not is_integer(value) or (least is not None and value < least) or (most is not None and value > most):
        rule = "" if least is None else f" of at least {least}" if most is None else f" in {least}..{most}"
        raise ValueError(f"{name} must be an integer{rule}, got {value!r}")
    return int(value)


def number(name: str, value: Any, rule: str, fits: Callable[[float], bool]) -> float:
    """Returns an option that is a number; one of NumPy's as the decimal that it prints.

    Args:
      rule: what it must be, as errors say it.
      fits: whether it is that.

    Raises:
      ValueError: it is none, or does not fit.
    """
    ok = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    found = float(str(value)) if ok and isinstance(value, np.floating) else value
    if not ok or not fits(found):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return float(found)


def quoted(error: Exception) -> str:
    """Returns an error's class and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"

"""The fields of codecs: checked, and as plain Python values."""

import numpy as np


def plain(value, wanted):
    """A NumPy scalar, or an int for a float or bool, as what it is meant for: equal codecs print the same text."""
    if isinstance(value, np.generic):
        # As the decimal that it prints as: float32's 0.99 in more digits is another number.
        number = value.item()
        value = float(str(value)) if isinstance(number, (float, np.floating)) else number
    if "float" in wanted and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    return bool(value) if "bool" in wanted and type(value) in (int, float) and value in (0, 1) else value


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bits(bits: int) -> None:
    check_integer("bits", bits, 1, 8)


def check_integer(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer in {least}..{most}, got {value!r}")


def check_ratio(ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(f"ratio must be a number in [0, 1), got {ratio!r}")

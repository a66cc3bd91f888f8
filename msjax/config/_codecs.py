"""Codecs as text: those of `msjax.compress` as `repr` gives them, others with where their class is before it.

That is a module that can be imported, "package.module:MyCodec(rate=0.5)", or a file, "mine.py:MyCodec(rate=0.5)".
"""

import importlib
import os
import re
import sys
from collections.abc import Iterable

from msjax import compress
from msjax.compress import Codec
from msjax.compress._parse import codec_from_string
from msjax.references import MODULE_PREFIX, load_module

_OWN = re.compile(r"(?P<place>.+?):(?P<name>[^\W\d]\w*)(?P<rest>|\(.*\))", re.DOTALL)


def codec_text(codec: Codec, *, paths: bool = True) -> str:
    """Returns the text that `parse_codec` reads; `paths=False` leaves the folder of a codec's file out.

    Raises:
      ValueError: the codec's class is in no file, or not at the top of its module, or an option cannot be read again.
    """
    head = _head(type(codec), paths=paths)
    text = head + repr(codec)
    if head:
        try:
            same = codec_from_text(text, known=(codec,)) == codec
        except ValueError:
            same = False
        if not same:
            what = "options that are Python literals, and be equal to a codec that is made again from its text"
            raise ValueError(f"codec must have {what}, since a run keeps it as text, got {text}")
    return text


def parse_codec(name: str, text: str, *, own_code: bool = False, known: Iterable[Codec] = ()) -> Codec:
    """`codec_from_text`, whose errors begin with the field's `name`."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be the text of a codec, got {text!r}")
    try:
        return codec_from_text(text, own_code=own_code, known=known)
    except (ValueError, TypeError) as error:
        raise ValueError(named(name, str(error))) from None


def is_own_text(text: str) -> bool:
    """Whether a text says where the codec's class is, which is then not of `msjax.compress`."""
    return isinstance(text, str) and _OWN.fullmatch(text) is not None


def named(name: str, error: str) -> str:
    """Returns what is wrong with a codec with the name of its field or option: "codec must be …" is said of it."""
    return name + error.removeprefix("codec") if error.startswith("codec ") else f"{name}: {error}"


def codec_from_text(text: str, *, own_code: bool = False, known: Iterable[Codec] = ()) -> Codec:
    """Returns the codec that `text` names.

    Args:
      own_code: whether a codec that is not of `msjax.compress` is looked for where the text says, which imports that
        module or runs that file: for what the user of this machine has written, never for what came from elsewhere.
      known: codecs whose classes may be meant even so.

    Raises:
      ValueError: there is no such codec or option, or its value is not allowed.
    """
    if (found := _OWN.fullmatch(text)) is None:
        return compress.from_string(text)
    place, name = found["place"], found["name"]
    by_head = {_head(type(codec), paths=False) + type(codec).__name__: type(codec) for codec in known}
    cls = by_head.get(f"{os.path.basename(place)}:{name}")
    if cls is None:  # a party's own file may have another name
        others = {other for other in by_head.values() if other.__name__ == name and _head(other, paths=False)}
        cls = others.pop() if len(others) == 1 else None
    if cls is None and not own_code:
        raise ValueError(
            f"codec must be one of msjax.compress or of this side's own preset, got {text!r}: code does not travel"
        )
    return codec_from_string(name + found["rest"], (cls or _find(place, name),))


def _head(cls, *, paths):
    """What is before the name of a class that is not of `msjax.compress`."""
    if cls in (*compress.CODECS, compress.Exact):
        return ""
    module = sys.modules.get(cls.__module__)
    if getattr(module, cls.__name__, None) is not cls:
        raise ValueError(f"codec must be of a class at the top of its module, got {cls.__module__}.{cls.__qualname__}")
    if cls.__module__ != "__main__" and not cls.__module__.startswith(MODULE_PREFIX):
        return f"{cls.__module__}:"
    file = getattr(module, "__file__", None)
    if file is None:
        raise ValueError(f"codec must be of a class in a file, got {cls.__name__}, which was typed in")
    return f"{os.path.abspath(file) if paths else os.path.basename(file)}:"


def _find(place, name):
    """The class of this name in a module or file."""
    if place.endswith(".py"):
        path = os.path.abspath(os.path.expanduser(place))
        main = sys.modules["__main__"]  # not to be run again
        is_main = os.path.abspath(getattr(main, "__file__", None) or "") == path
        module = main if is_main else load_module("codec", place)
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise ValueError(f"codec must be in a module that can be imported, got {place!r}: {error}") from None
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Codec)):
        raise ValueError(f"codec must name a subclass of msjax.compress.Codec in {place}, got {name!r}")
    return cls

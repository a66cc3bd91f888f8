"""Functions that a config names, as "FILE.py:FUNCTION": how a preset brings a model, data or a task of one's own."""

import functools
import importlib.util
import inspect
import os
import pathlib
import sys
import zlib
from types import ModuleType
from typing import Any

from msjax.paths import existing_file, expand

MODULE_PREFIX = "msjax_preset_"
"""What the names of modules begin with that are no modules but files of a user."""


def is_reference(value: Any) -> bool:
    """Whether a field's value names a function: "FILE.py:FUNCTION", or ":FUNCTION" of the preset that it is in."""
    if not isinstance(value, str):
        return False
    path, colon, name = value.rpartition(":")
    return bool(colon) and name.isidentifier() and (not path or path.endswith(".py"))


def load_module(name: str, path: str) -> ModuleType:
    """Returns the module of a Python file, which is executed once.

    Raises:
      ValueError: there is no such file; `name` is what the error calls it.
    """
    file = expand(name, path)
    if not file.is_file() or file.suffix != ".py":
        what = "which does not exist" if not file.exists() else "which is no Python file"
        raise ValueError(f"{name} must be a Python file, got {path!r}, {what}")
    existing_file(name, path)
    try:
        return _execute(os.path.abspath(file))
    except ImportError as error:
        raise ImportError(f"{name} {path!r} imports what is not there: {error}", name=error.name) from error
    except SyntaxError as error:
        raise ValueError(f"{name} {path!r} must be Python, but for line {error.lineno}: {error.msg}") from error


@functools.lru_cache(maxsize=64)  # so that its functions are the same objects, and compiled programs are shared
def _execute(path):
    name = f"{MODULE_PREFIX}{pathlib.Path(path).stem}_{zlib.crc32(path.encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def resolve_in(name: str, path: str, attribute: str) -> Any:
    """Returns the object `attribute` of a Python file.

    Raises:
      ValueError: there is no such file, or nothing of that name in it; `name` is what the error calls the field.
    """
    if not path:
        raise ValueError(f"{name} must name a function of a preset, got ':{attribute}', and there is no preset")
    module = load_module(name, path)
    if not hasattr(module, attribute):
        own = (n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__)
        known = ", ".join(sorted(own)) or "none"
        raise ValueError(f"{name} must name a function of {path}, got {attribute!r}; it has {known}")
    return getattr(module, attribute)


def call(name: str, function: Any, *arguments: Any, **named: Any) -> Any:
    """Returns what a function makes of as many of the arguments as it takes; what is no function, as it is.

    It is given those of `named` that are the names of its parameters.

    A class, and an object that can be called, such as a model or a task, are no functions; one that `functools.partial`
    or a decorator such as `functools.cache` has made is.

    Raises:
      ValueError: it needs more than there are; `name` is what the error calls it.
    """
    made = isinstance(function, functools.partial) or inspect.isfunction(getattr(function, "__wrapped__", None))
    if not (inspect.isfunction(function) or made):
        return function
    bound = function.keywords if isinstance(function, functools.partial) else {}
    parameters = list(inspect.signature(function).parameters.values())
    own = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name not in bound}
    named = {given: value for given, value in named.items() if given in own}
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in places if p.default is p.empty and p.name not in named]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in named]
    if len(needed) > len(arguments) or by_name:
        most = {0: "no argument", 1: "at most 1 argument"}.get(len(arguments), f"at most {len(arguments)} arguments")
        got = ", ".join([p.name for p in needed] + by_name)
        raise ValueError(f"{name} must be a function that needs {most}, got one that needs {got}")
    takes_all = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    values, rest = [], list(arguments)
    for p in places:  # one of `named` may come before the arguments
        if p.name not in named and not rest:
            break
        values.append(named.pop(p.name) if p.name in named else rest.pop(0))
    return function(*values, *(rest if takes_all else ()), **named)

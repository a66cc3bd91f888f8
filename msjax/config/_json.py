"""Configs as JSON, and presets."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from msjax.compress import Codec
from msjax.config._codecs import codec_text, parse_codec
from msjax.config._references import map_references, references, resolve
from msjax.config._sections import Config
from msjax.paths import expand
from msjax.references import call, load_module


def to_json(config: Config, *, paths: bool = True) -> dict[str, Any]:
    """Returns the config as JSON-ready dicts; codecs as their text, see `codec_text`.

    Raises:
      ValueError: a codec of one's own cannot be named by its module or file.
    """

    def plain(value):
        if isinstance(value, Codec):
            return codec_text(value, paths=paths)
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def earlier_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns what `to_json` makes with each field under the name that it first had: records are named by these."""
    return {
        section: {_FIRST_NAMES.get(f"{section}.{name}", name): v for name, v in value.items()}
        if isinstance(value, dict)
        else value
        for section, value in tree.items()
    }


_FIRST_NAMES = {"mode.tail_cut": "head_cut"}
"""Fields that were renamed, and the names that files and records of earlier runs have for them."""


def _present_names(section, fields):
    present = {first: name.partition(".")[2] for name, first in _FIRST_NAMES.items() if name.startswith(f"{section}.")}
    return {present.get(name, name): value for name, value in fields.items()}


def from_json(tree: dict[str, Any], *, own_code: bool = False, preset: Config | None = None) -> Config:
    """Returns the config that `to_json` made `tree` from, this version's or an earlier one's.

    Args:
      own_code: whether to import or run the modules of codecs that are not of `msjax.compress`: only where the tree was
        written on this machine.
      preset: whose codecs' classes the tree may name without that.

    Raises:
      ValueError: a field is unknown or has a value that is not allowed.
    """
    known = () if preset is None else (preset.codec, preset.grad_codec, preset.update_codec)
    tree = dict(_section("config", tree))
    sections = {}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            fields = _present_names(field.name, _section(field.name, tree.pop(field.name, {})))
            # JSON has lists alone.
            fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
            unknown = sorted(fields.keys() - {f.name for f in dataclasses.fields(field.type)})
            if unknown:
                raise ValueError(f"config does not fit this version of msjax: unknown field {field.name}.{unknown[0]}")
            sections[field.name] = field.type(**fields)
    for name in ("codec", "grad_codec", "update_codec"):
        if name == "update_codec" and name not in tree:  # of a version that had none
            continue
        if name not in tree:
            raise ValueError(f"config does not fit this version of msjax: it has no {name}")
        tree[name] = parse_codec(name, tree[name], own_code=own_code, known=known)
    if isinstance(pairs := tree.pop("array_codecs", []), list):
        pairs = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs)
    unknown = sorted(tree.keys() - {f.name for f in dataclasses.fields(Config)})
    if unknown:
        raise ValueError(f"config does not fit this version of msjax: unknown field {unknown[0]}")
    return Config(array_codecs=pairs, **sections, **tree)


def _section(name, value):
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object with fields, got {value!r}")
    return value


def to_text(config: Config) -> str:
    """Returns the resolved config as the text of a JSON file."""
    return json.dumps(to_json(config), indent=2) + "\n"


def load(path: pathlib.Path, *, preset: Config | None = None) -> Config:
    """Reads what `to_text` made on this machine: codecs of one's own are looked for where it says.

    Args:
      preset: has them in its place, where the file that they were in has moved.

    Raises:
      ValueError: the file is damaged, or of another version.
    """
    try:
        return from_json(json.loads(path.read_text("utf-8")), own_code=True, preset=preset)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be a config in JSON, but it is damaged: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_preset(path: str, *, name: str = "the preset") -> Config:
    """Returns `get_config()` of the Python file at `path`; what it names as ":FUNCTION" is looked for in that file.

    Raises:
      ValueError: there is no such file, it has no `get_config` that returns a `Config`, or lacks a function that the
        config names; `name` is what the error calls the file.
    """
    module = load_module(name, path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{name} must be a Python file with get_config(), got {path!r}, which has none")
    config = call(f"{name} {path!r}: get_config", module.get_config)
    if not isinstance(config, Config):
        raise ValueError(f"{name} must be a Python file whose get_config() returns a Config, got {path!r}")
    file = os.path.abspath(expand(name, path))
    config = map_references(config, lambda value: file + value if value.startswith(":") else value)
    for name, value in references(config).items():
        resolve(name, value)
    return config

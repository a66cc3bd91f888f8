"""Fields that name functions of a preset, files and folders."""

import dataclasses
import operator
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from msjax import data
from msjax.config._checks import REFERENCES, has_texts
from msjax.config._sections import Config
from msjax.references import call, is_reference, resolve_in

_OWN_SECTIONS = ("model", "lora", "data", "task")
_PLACES = (
    *(f"data.{name}" for name in ("name", "data_dir", "cache_dir", "streamed", "workers", "tokenizer", "test")),
    *(f"data.{name}" for name in ("label", "drop", "text_column", "image_size", "channels", "normalize")),
    "model.weights",
    "model.decoder",
)
"""What each party may have elsewhere, or read in another way; shapes are compared when they meet."""
_FILES = ("data.name", "data.test", "data.tokenizer", "model.weights")
"""What is called by its last name where a config comes `without_paths`."""
_DIVISION = ("data.alpha", "data.test_share")
"""What says which samples are whose, where all parties have the same data."""


def without_paths(config: Config) -> Config:
    """Returns the config without where data, presets and runs lie on one machine, and how many workers read them.

    This says nothing on another machine. Of presets, files of data and `model.weights` the last name is left, which is
    part of what a run is.
    """
    name = config.data.name
    name = _named(name) if _leads_out(name) or is_local_path(name) else name  # this machine need not have it
    files = {"tokenizer": _last(config.data.tokenizer), "test": _last(config.data.test)}
    plain = dataclasses.replace(config.data, data_dir=None, cache_dir=None, workers=None, name=name, **files)
    plain = dataclasses.replace(config, data=plain, out=Config.out)
    plain = with_fields(plain, {"model.weights": _last(config.model.weights)})
    return map_references(plain, os.path.basename)


def check_received(config: Config) -> None:
    """Checks that a config that another machine has sent does not choose where this one reads or writes.

    It names files and folders of data, which are looked for in a folder that this machine's user has chosen.

    Raises:
      ValueError: it says where they are.
    """
    for name in ("data_dir", "cache_dir", "workers"):
        if (value := getattr(config.data, name)) is not None:
            raise ValueError(f"data.{name} must be each machine's own, got {value!r} from the server")
    for name in ("name", "test"):
        if (value := getattr(config.data, name)) is not None and _leads_out(value):
            raise ValueError(
                f"data.{name} must not lead out of the folder where data are looked for, got {value!r} from the server"
            )


def _leads_out(path):
    """Whether a path leads out of any folder that it is taken to be in, on whatever system."""
    there = pathlib.PureWindowsPath(path)
    return bool(there.drive or there.root) or path.startswith("~") or ".." in there.parts


def _last(path):
    return path and os.path.basename(os.path.normpath(path))


def _named(path):
    """The last name of a file or folder of data; with ./ where it would be taken for a set that is known."""
    last = _last(path)
    return f"./{last}" if data.is_known(last) else last


def is_same_name(path: str, other: str) -> bool:
    """Whether two paths of data have one last name, and so may be of one file or folder that was moved."""
    names = (path, other)
    return not any(is_reference(name) or data.is_known(name) for name in names) and _last(path) == _last(other)


def with_own_paths(config: Config, *, data_dir: str | None, tokenizer: str | None) -> Config:
    """Returns a config with where its files of data are on this machine, by their last names.

    Args:
      data_dir: the folder that has the files of `data.name` and `data.test`, or the folder of images, where they are
        such; None leaves them.
      tokenizer: this machine's `data.tokenizer`; None leaves it.

    Raises:
      ValueError: `data_dir` is given, and a function of a preset makes the data; or it lacks a folder of images that is
        there without it; or `tokenizer` is given, and the data have no use for one.
    """
    found: dict[str, str] = {}
    if data_dir is not None:
        if is_reference(config.data.name):
            raise ValueError(
                "data_dir must be None where data.name is a function of the preset, which reads the data itself, got "
                f"{data_dir!r}"
            )
        for name in ("data.name", "data.test"):
            if (value := operator.attrgetter(name)(config)) is None:
                continue
            own = os.path.join(data_dir, _last(value))
            if value.lower().endswith(data.FILE_SUFFIXES) or _is_own_folder(value, own):
                found[name] = own
            elif is_local_path(value):
                raise ValueError(f"data_dir must have what {name} names, {value!r}, got {data_dir!r}")
    if tokenizer is not None:
        if not has_texts(config):
            raise ValueError(
                f"tokenizer must be None for data.name={config.data.name!r}, which no tokenizer.json splits, got "
                f"{tokenizer!r}"
            )
        found["data.tokenizer"] = tokenizer
    return with_fields(config, found)


def is_local_path(data_name: str) -> bool:
    """Whether the name of a data set is the path of a file or folder."""
    if is_reference(data_name):
        return False
    return data.is_path(data_name) or _is_own_folder(data_name, data_name)


def _is_own_folder(name, folder):
    return not data.is_known(name) and data.holds_images(folder)


def map_references(config: Config, change: Callable[[str], str]) -> Config:
    """Returns the config with each name of a function of a preset as `change` makes it."""
    return with_fields(config, {name: change(value) for name, value in references(config).items()})


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the config with these values of fields of its sections, by names such as "data.name"."""
    for name, value in values.items():
        section, _, field = name.partition(".")
        own = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: own})
    return config


def references(config: Config) -> dict[str, str]:
    """Returns the fields that name functions of a preset, and the names."""
    found = {name: operator.attrgetter(name)(config) for name in REFERENCES}
    return {name: value for name, value in found.items() if value is not None and is_reference(value)}


def with_own(config: Config, own: Config) -> Config:
    """Returns a run's config with what each party of a network brings itself, that of another.

    It is the model, the data and the task; and the optimizer, where it is a function of a preset.
    """
    found = dataclasses.replace(config, **{section: getattr(own, section) for section in _OWN_SECTIONS})
    return with_fields(found, {"optim.kind": own.optim.kind}) if is_reference(config.optim.kind) else found


def with_functions_of(config: Config, own: Config) -> Config:
    """Returns `config` with the functions of its preset looked up where `own` has them: in a file of the same name.

    If the old file is gone, a function of the same name in the same field is taken, too. The rest is unchanged.

    Raises:
      ValueError: a file is gone, and the other has no such function.
    """
    files, found = {os.path.basename(place): place for place in _files_of(own)}, {}
    for name, value in references(config).items():
        file, _, function = value.rpartition(":")
        place = files.get(os.path.basename(file))
        if place is None and not os.path.exists(file):
            other = references(own).get(name, "")
            if other.rpartition(":")[2] != function:
                raise ValueError(
                    f"{name} of the run is {value!r}, which is gone, and the preset given has no {function}"
                )
            place = other.rpartition(":")[0]
        if place is not None:
            found[name] = f"{place}:{function}"
    return with_fields(config, found)


def _files_of(config):
    return [reference.rpartition(":")[0] for reference in references(config).values()]


def with_places_of(config: Config, own: Config) -> Config:
    """Returns a config that came `without_paths` with where files and functions of presets are, as another has it.

    All else stays as it is: the other may be a preset, of which the run had changed some fields.
    """
    files, found = _files_of(own), {}
    for name in (*REFERENCES, *_FILES):
        value, other = (operator.attrgetter(name)(each) for each in (config, own))
        if value is not None:
            found[name] = _placed(value, other, files)
    folders = {f"data.{name}": getattr(own.data, name) for name in ("data_dir", "cache_dir", "workers")}
    return with_fields(config, found | folders)


def _placed(value, other, files):
    """A file's or function's last name with its place: that of `other`, the same field's, or of one of these files."""
    if not is_reference(value):
        same = other is not None and not is_reference(other) and _last(value) == _last(other)
        return other if same else value
    file, _, function = value.rpartition(":")
    has_one = other is not None and is_reference(other)
    own = [other.rpartition(":")[0]] if has_one else []
    places = {os.path.basename(place): place for place in (*files, *own)}  # the last counts
    if (place := places.get(os.path.basename(file))) is not None:
        return f"{place}:{function}"  # which need not be that of the preset
    return other if has_one else value


def check_own(config: Config, own: Config, *, divided: bool) -> None:
    """Checks that a party's own preset says of model, data and task what the run's config says, see `with_own`.

    Only what the config sets away from its default has to be the same: the party whose config this is need not have
    data. Files, folders and functions of presets are each party's own. A preset with a `mode.tail_cut`, which keeps
    labels with the clients, has to have that of the run. Where the run's optimizer is a function, the party has one.

    Args:
      divided: whether the party takes its share of data that all have; then all must divide them alike.

    Raises:
      ValueError: a field differs.
    """
    if own.mode.tail_cut not in (None, config.mode.tail_cut):
        raise ValueError(
            f"mode.tail_cut must be the same in the run's config and in this party's own preset where the preset has "
            f"one, as labels then stay here: got {config.mode.tail_cut!r} there and {own.mode.tail_cut!r} in the preset"
        )
    if is_reference(config.optim.kind) and not is_reference(own.optim.kind):
        raise ValueError(
            f"optim.kind must be a function of this party's own preset where it is one of the run's, "
            f"{config.optim.kind!r}, got {own.optim.kind!r}"
        )
    for section in _OWN_SECTIONS:
        run, mine = getattr(config, section), getattr(own, section)
        for field in dataclasses.fields(run):
            name, value, other = f"{section}.{field.name}", getattr(run, field.name), getattr(mine, field.name)
            needed = value != field.default or (divided and name in _DIVISION)
            if value == other or not needed or name in _PLACES:
                continue
            if not any(isinstance(one, str) and is_reference(one) for one in (value, other)):
                raise ValueError(
                    f"{name} must be the same in the run's config and in this party's own preset, which counts here: "
                    f"got {value!r} there and {other!r} in the preset"
                )


def passed_over(config: Config, own: Config) -> list[str]:
    """Returns the names of fields of a party's own preset that the run's config has otherwise: those of the run count.

    Without those of `with_own` and `out`; a field that has its default in the preset says nothing.
    """
    found, used = [], with_own(config, own)
    for field in dataclasses.fields(own):
        value = getattr(own, field.name)
        if field.name != "out" and value not in (getattr(used, field.name), field.default):
            found.append(field.name)
    return found


def resolve(name: str, reference: str) -> Any:
    """Returns the object that the field `name` refers to, as "FILE.py:OBJECT".

    Raises:
      ValueError: there is no such file, or nothing of that name in it.
    """
    path, _, attribute = reference.rpartition(":")
    return resolve_in(name, path, attribute)


def call_reference(name: str, reference: str, *arguments: Any, **named: Any) -> Any:
    """Returns what the function that a field refers to makes of those arguments that it takes; an object as it is.

    Raises:
      ValueError: see `resolve`.
    """
    return call(f"{name} {reference!r}", resolve(name, reference), *arguments, **named)

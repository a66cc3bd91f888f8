"""What commands share: options that come before all others, and errors as one line."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import logging
import operator
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tyro

import msjax
from msjax import build, config, data, models
from msjax.logs import shorten
from msjax.split.finite import NonFiniteError

log = logging.getLogger("msjax")

T = TypeVar("T")

TRY_AGAIN = 75
"""The exit status where another program was away or has ended, as sysexits.h has it: later it may be there again."""
EXPECTED = (ValueError, TypeError, OSError, ImportError, NonFiniteError)
"""What a command's user can do something about."""

DEFAULT = config.Config(
    optim=config.OptimConfig(learning_rate=0.1, warmup_epochs=1.0),
    batch_size=16,
    epochs=20,
    compare=True,
)
"""The run without a preset: The embedded digits, for which 16 samples a client make 9 steps an epoch."""


@dataclasses.dataclass(frozen=True)
class PresetFlag:
    """Where a config comes from, read before all other options (`split_options`) and listed with them."""

    config: str | None = None
    """A preset: a Python file with get_config(). The other options override it."""


@dataclasses.dataclass(frozen=True)
class PartFlag:
    """Where functions of a preset are, likewise, of a part that was trained."""

    config: str | None = None
    """The preset of a model, data or task of your own: a Python file with get_config(). It says where its functions
    are; all else comes from the file of the part."""


@dataclasses.dataclass(frozen=True)
class RunFlags(PresetFlag):
    """Which run folder, likewise."""

    name: str | None = None
    """Of the new run: the folder of this name in `out`; by default it is made of the time, network and codec."""
    resume: str | None = None
    """Go on with a run, from its last checkpoint: its folder, in place of a preset."""


def network() -> types.ModuleType:
    """Returns the module with the commands that take `--server`, where the other part runs elsewhere.

    Raises:
      ValueError: what that needs is not installed.
    """
    try:
        return importlib.import_module("msjax.cli.network")
    except ModuleNotFoundError as error:
        raise ValueError(f"--server {msjax._needs(error, 'train,net')}") from None


def split_options(arguments: list[str], *names: str, flag: str | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options with these names, which say where the config comes from, and the other arguments.

    Args:
      flag: the name of an option without a value, False where it is not given.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    if flag is not None:
        parser.add_argument(flag, action="store_true")
    return parser.parse_known_args(arguments)


_PLACES = {
    "--model.weights": "the weights that it starts from",
    "--data.name": "the file or folder of its data",
    "--data.test": "the file of its test data",
    "--data.data-dir": "the folder of prepared sets",
    "--data.tokenizer": "its tokenizer",
    "--data.cache-dir": "the folder of the array cache",
    "--data.workers": "how many processes read its data",
}
"""Options of a run that goes on: where its files are now, and how they are read."""


PLACES = ", ".join(_PLACES)
"""The same in words."""


def with_places(cfg: config.Config, arguments: list[str]) -> tuple[config.Config, list[str]]:
    """Returns the config of a run that goes on with the places of files that arguments give, and the other arguments.

    Raises:
      ValueError: what lies there is called otherwise than before, which would be another run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in _PLACES:
        parser.add_argument(*dict.fromkeys((option, option.replace("-dir", "_dir"))), dest=option)
    found, rest = parser.parse_known_args(arguments)
    for option, value in vars(found).items():
        if option == "--data.workers":
            if not value.isdecimal():
                raise ValueError(f"{option} must be an integer of at least 0, got {value!r}")
            value = int(value)
        name = option.removeprefix("--").replace("-", "_")
        before, new = operator.attrgetter(name)(cfg), config.with_fields(cfg, {name: value})
        moved = option == "--data.name" and config.is_same_name(before, value)
        if not moved and config.without_paths(new) != config.without_paths(cfg):
            raise ValueError(
                f"{option} must be where {_PLACES[option]} is now, under the name of {before!r}, got {value!r}"
            )
        cfg = new
    return cfg, rest


def preset_of(where: argparse.Namespace) -> config.Config | None:
    """Returns the preset that --config names, None without it."""
    return None if where.config is None else config.load_preset(where.config, name="config")


def fields_of(kind: type[T], flags: object) -> T:
    """Returns an instance of a dataclass from those of `flags` that it has."""
    return kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})


def parse(kind: type[T], arguments: list[str], **options: Any) -> T:
    """Returns the options that arguments give, as `tyro.cli` does; values that are refused are errors like all others.

    Raises:
      ValueError: a value is none of its kind, or what is made of them refuses it.
      SystemExit: help was asked for, or an option is unknown or lacks, which tyro has printed.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(kind, args=arguments, **options)
    except SystemExit as ended:
        refused, error = None, ended.__context__
        while error is not None and refused is None:
            refused, error = error if isinstance(error, ValueError) else None, error.__context__
        if refused is None and ended.code:
            return tyro.cli(kind, args=arguments, **options)  # prints the same, with colours where there are some
        if refused is None:
            raise
    # tyro says what was being made: an option, a section of options, or all of them, which is called by its class.
    found = re.search(r"Error parsing (--[\w.-]+|[a-z][\w.]*):", shown.getvalue())
    if found is None:
        raise ValueError(str(refused))
    raise ValueError(config.named(found[1], str(refused)) if found[1].startswith("--") else f"{found[1]}.{refused}")


def run_command(command: str, function: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs one command and returns its exit status; an expected error becomes one line."""
    try:
        status = _status(command, function, arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # who read standard output, as `head`, has gone
        silence_output()
        return 141  # as a shell says it of SIGPIPE
    return status


@contextlib.contextmanager
def naming_the_way_on(again: str) -> Iterator[None]:
    """Adds the command that goes on to an error that ends a run, of a file for example."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, data.DataError) as error:
        kind = next(kind for kind in (data.DataError, ConnectionError, OSError) if isinstance(error, kind))
        raise kind(f"{error}; once this is mended, continue with: {again}") from error


def silence_output() -> None:
    """Sends to nowhere what is written to standard output from now on, also by Python when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _status(command, function, arguments):
    try:
        return function(arguments)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:  # before or after the training loop, where there is nothing to save
        return 130
    except SystemExit as error:  # the argument parsers have printed what is wrong
        return error.code
    except EXPECTED as error:
        print(f"msjax {command}: {as_typed(shorten(str(error)), arguments)}", file=sys.stderr)
        return TRY_AGAIN if isinstance(error, ConnectionError) else 2


def number_of(epochs: str) -> int:
    """Returns what was typed as --epochs; raises ValueError where it is no number."""
    if not epochs.isdecimal():
        raise ValueError(f"epochs must be an integer of at least 1, got {epochs!r}")
    return int(epochs)


def as_typed(error: str, arguments: list[str]) -> str:
    """Returns an error that begins with a field's name with the option in its place, where that was typed.

    Errors name fields, as `data.test_share`, since configs come from presets and files, too.
    """
    found = re.match(r"(\w+(?:\.\w+)*)(?= must |:)", error)
    if found is None:
        return error
    typed = dict.fromkeys(argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    fields = {option: option.removeprefix("--").replace("-", "_") for option in typed}
    same = [option for option, field in fields.items() if field == found[1]]
    same = same or [option for option, field in fields.items() if field.rpartition(".")[2] == found[1]]
    return same[0] + error[found.end() :] if len(same) == 1 else error


def check_new_config(cfg: config.Config, preset: config.Config | None) -> config.Config:
    """As `check_early` of a run that is new, whose options change a preset; see `config.check_used`."""
    config.check_used(cfg, preset)
    build.check_own_model(cfg)
    if config.is_reference(cfg.task.name) and cfg.optim.label_smoothing:
        raise ValueError(
            f"optim.label_smoothing must be 0 for task.name={cfg.task.name!r}, got {cfg.optim.label_smoothing}"
        )
    if cfg.model.name == models.DECODER and cfg.model.weights is None:
        log.warning("model.weights is not given: all weights of the decoder are drawn at random")
    return check_early(cfg)


def check_early(cfg: config.Config) -> config.Config:
    """Returns the config as a run keeps it; see `build.resolved`.

    Raises:
      ValueError: it has a file that there is not, or see `build.check_without_data`.
    """
    cfg = build.resolved(cfg)
    build.check_without_data(cfg)
    return cfg

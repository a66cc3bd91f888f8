"""What the fields of a config may be; errors name the field, the rule and the value."""

import dataclasses
import math
import operator
import types
import typing
from typing import Annotated, Any, Literal

from msjax import data
from msjax.config._codecs import is_own_text, parse_codec
from msjax.references import is_reference

MAX_SEED = 2**32 - 1
"""JAX makes one key of seeds that are equal in their lower 32 bits."""

_RANGES = {
    **dict.fromkeys(("clients", "batch_size", "epochs", "test_every"), (1, math.inf)),
    **dict.fromkeys(("mode.average_steps", "mode.turn_steps", "lora.rank", "optim.accumulate_steps"), (1, math.inf)),
    **dict.fromkeys(("data.text_length", "data.image_size", "clients_per_group"), (1, math.inf)),
    "data.vocabulary": (2, math.inf),  # words, and padding
    **dict.fromkeys(("optim.warmup_epochs", "optim.weight_decay", "data.crop_padding"), (0, math.inf)),
    "data.workers": (0, math.inf),
    "seed": (0, MAX_SEED),
}
_POSITIVE = ("optim.learning_rate", "optim.gamma", "model.width", "data.alpha", "lora.alpha", "optim.clip_norm")
_MOST_WHOLE = 2**31 - 1
"""Of whole numbers, of which some are counted in 32 bits, where `_MOST` has no other."""
_MOST = {
    "seed": MAX_SEED,
    "optim.warmup_epochs": 1e6,
    "model.width": 1e4,
    **dict.fromkeys(("optim.learning_rate", "optim.weight_decay", "optim.gamma", "optim.clip_norm"), 3e38),
}
"""The largest values of these; those that are not whole become float32, or whole numbers."""
_CUTS = ("model.cut", "mode.tail_cut")
"""Fields that may be a number of a layer, too."""
REFERENCES = ("model.name", "data.name", "data.augment", "data.division", "task.name", "optim.kind")
"""Fields that may name a function of a preset."""
_OPTIMIZERS = ("sgd", "adamw")
_TASKS = ("classification", "multi_label", "regression", "segmentation", "next_token")


def check(config: Any) -> None:
    """Raises ValueError where a field of a config, or a pair of them, has a value that is not allowed."""
    for name, value, kind in _fields(config):
        choices = typing.get_origin(kind) is Literal  # see below
        if not (choices or _fits(value, kind) or (name in _CUTS and _fits(value, int))):
            raise ValueError(f"{name} must be {_in_words(kind)}, got {value!r}")
    for name, (least, most) in _RANGES.items():
        value = operator.attrgetter(name)(config)
        if value is not None and not least <= value <= most:
            rule = f"at least {least}" if most == math.inf else f"in {least}..{most}"
            raise ValueError(f"{name} must be {rule}, got {value}")
    for name, value, kind in _fields(config):
        most = _MOST.get(name, _MOST_WHOLE if int in _kinds(kind) else math.inf)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and number > most:
                raise ValueError(f"{name} must be at most {most}, got {number}")
    for name in _POSITIVE:
        if (value := operator.attrgetter(name)(config)) is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    # Literal types are checked on the command line alone; presets and files are checked here.
    for name, value, choices in _choices(config):
        if value not in choices and not (name in REFERENCES and is_reference(value)):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if (division := config.data.division) is not None and not is_reference(division):
        raise ValueError(f"data.division must be a function of a preset, as ':FUNCTION', got {division!r}")
    for name in ("optim.label_smoothing", "optim.momentum", "lora.dropout"):
        if not 0 <= (value := operator.attrgetter(name)(config)) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not 0 < config.mode.client_fraction <= 1:
        raise ValueError(f"mode.client_fraction must be above 0 and at most 1, got {config.mode.client_fraction}")
    if config.mode.client_fraction < 1 and config.mode.kind != "splitfed":
        raise ValueError(
            f"mode.client_fraction must be 1.0 where mode.kind is not 'splitfed', got {config.mode.client_fraction} "
            f"with {config.mode.kind!r}: there every client has a share in every part"
        )
    if len(set(config.data.classes)) < len(config.data.classes) or "" in config.data.classes:
        raise ValueError(f"data.classes must be different names, got {config.data.classes}")
    if not 0 < config.data.test_share < 1:
        raise ValueError(f"data.test_share must be above 0 and below 1, got {config.data.test_share}")
    if (config.data.mean is None) != (config.data.std is None):
        raise ValueError(f"data.mean and data.std must be given together, got {config.data.mean} and {config.data.std}")
    if config.data.std is not None and not all(s > 0 for s in config.data.std):
        raise ValueError(f"data.std must be above 0 and finite, got {config.data.std}")
    if config.optim.schedule == "steps" and not config.optim.milestones:
        raise ValueError("optim.milestones must name at least one epoch with optim.schedule='steps', got ()")
    for name, codec in config.array_codecs:
        if is_own_text(codec):
            raise ValueError(f"array_codecs must be of codecs of msjax.compress, got {codec!r} of {name!r}")
        parse_codec(f"array_codecs of {name!r}", codec)


def check_used(config: Any, preset: Any = None) -> None:
    """Checks that a new run uses what is set; a run that is there may have what it passed over.

    Args:
      preset: a config that `config` changes some fields of; what it uses itself need not be used.

    Raises:
      ValueError: a field has another value than by default, and another field makes it of no use.
    """
    uses, before = _uses(config), {} if preset is None else _uses(preset)
    for field, (other, is_used) in uses.items():
        section, _, own = field.partition(".")
        default = type(getattr(config, section)).__dataclass_fields__[own].default
        value = operator.attrgetter(field)(config)
        if is_used or value == default:
            continue
        if preset is not None and value == operator.attrgetter(field)(preset) and before[field][1]:
            continue
        raise ValueError(
            f"{field} must be {default!r}, its default, with {other}={operator.attrgetter(other)(config)!r}, which "
            f"does not use it, got {value!r}"
        )


def _uses(config):
    """By field, the field that says whether it is used, and whether it is."""
    name = config.data.name.lower()
    uses = {
        "mode.average_steps": ("mode.kind", config.mode.kind == "splitfed"),
        "mode.turn_steps": ("mode.kind", config.mode.kind == "sequential"),
        "optim.milestones": ("optim.schedule", config.optim.schedule == "steps"),
        "optim.gamma": ("optim.schedule", config.optim.schedule == "steps"),
        "optim.nesterov": ("optim.momentum", config.optim.momentum > 0),
        **{f"lora.{own}": ("lora.rank", config.lora.rank is not None) for own in ("alpha", "targets", "dropout")},
        "model.new_head": ("model.weights", config.model.weights is not None),
        "task.ignore": ("task.name", config.task.name in ("segmentation", "next_token")),
        "data.image_size": (
            "data.name",
            not name.endswith(data.FILE_SUFFIXES) and name != "breast_cancer" and not is_reference(config.data.name),
        ),
        "data.drop": ("data.name", not is_reference(config.data.name)),
        "data.test_share": ("data.name", not is_reference(config.data.name)),
        "data.normalize": ("data.name", name.endswith(".npz")),
        "data.label": ("data.name", name.endswith(".csv")),
    }
    if is_reference(config.optim.kind):
        uses |= dict.fromkeys(("optim.momentum", "optim.nesterov", "optim.weight_decay"), ("optim.kind", False))
    return uses | {f"data.{own}": ("model.name", has_texts(config)) for own in ("text_column", "tokenizer", "test")}


def has_texts(config: Any) -> bool:
    """Whether the data are texts that a tokenizer.json splits; those of a set of `data` become words."""
    return config.model.name == "decoder" or config.data.name.lower().endswith(data.TEXT_SUFFIXES)


def _choices(config):
    """(name, value, choices) of every field that has a few values."""
    yield "data.augment", config.data.augment, (None, *data.AUGMENTATIONS)
    yield "task.name", config.task.name, _TASKS
    yield "optim.kind", config.optim.kind, _OPTIMIZERS
    for name, value, kind in _fields(config):
        if typing.get_origin(kind) is Literal:
            yield name, value, typing.get_args(kind)


def _fields(config, prefix=""):
    """(name, value, type) of every field; of a section before those in it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield prefix + field.name, value, field.type
        if dataclasses.is_dataclass(field.type) and isinstance(value, field.type):
            yield from _fields(value, f"{field.name}.")


def _kinds(kind):
    """The types of a field's type that has several, or of a tuple's members."""
    return (kind, *(one for arg in typing.get_args(kind) for one in _kinds(arg)))


def _fits(value, kind):
    """Whether a value is of a field's type; numbers are finite, and True is none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _fits(value, args[0])
    if origin is Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        kinds = (args[0],) * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _in_words(kind):
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_in_words, args))
    if origin is tuple:
        return f"a tuple of {_PLURALS[args[0]]}"
    if origin is Annotated:
        return "a codec of msjax.compress"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    words = {int: "an integer", float: "a finite number", str: "a text", bool: "True or False", type(None): "None"}
    return words.get(kind) or f"a {kind.__name__}"


_PLURALS = {str: "texts", int: "integers", float: "finite numbers", tuple[str, str]: "pairs of texts"}

"""The configuration of a run: frozen dataclasses, saved with every result and set from the command line.

A preset is a Python file with `get_config() -> Config`; see `configs/`.
"""

import dataclasses
import json
import math
import operator
import os
import pathlib
import types
import typing
from typing import Annotated, Any, Literal

import tyro

from msjax import compress, data
from msjax.compress import Codec, Identity, MaskEncoded
from msjax.paths import expand
from msjax.references import call, is_reference, load_module, resolve_in

MAX_SEED = 2**32 - 1
"""JAX makes one key of seeds that are equal in their lower 32 bits."""

CodecFlag = Annotated[
    Codec,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="CODEC",
        instance_from_str=lambda args: compress.from_string(args[0]),
        is_instance=lambda value: isinstance(value, Codec),
        # In double quotes, which stay as they are where a shell's quotes are put around.
        str_from_instance=lambda value: [repr(value).replace("'", '"')],
    ),
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network and where it is cut."""

    name: str = "convnet"
    """vgg19, resnet9, resnet9t, resnet18, resnet34, resnet20, resnet32, resnet56, resnet110 or convnet for images, mlp
    for tables, transformer for texts; or ":FUNCTION" of a preset that makes the parts of a model of one's own."""
    cut: str = "medium"
    """shallow, medium, deep, or the number of the last layer on the client; `msjax models` lists them."""
    width: float = 1.0
    """Multiplier of the channel counts."""
    activation: str = "relu"
    """relu, leaky_relu, gelu, silu or tanh."""
    cut_before_activation: bool = False
    """Whether the server applies the activation that the client's last layer ends with, so that features have signs."""
    first_block: Literal["residual", "paper"] = "residual"
    """ResNets: "paper" takes the skip connection out of the first block, so that the paper's cut 2 exists."""
    shortcut: Literal["projection", "zero_padding"] = "projection"
    """ResNets: where the shape changes, a 1×1 convolution, or every second pixel and zero channels (option A)."""
    conv_init: Literal["he_normal", "dirac"] = "he_normal"
    """dirac: 3×3 convolutions start as identities, which helps short schedules."""
    running_variance: Literal["biased", "unbiased"] = "biased"
    """Of batch normalisation: as flax keeps it, or unbiased, as PyTorch does, to go on training from its weights."""
    weights: str | None = None
    """A safetensors file of the whole network in PyTorch's names, to start from; by default the weights are drawn."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and its share-out among the clients."""

    name: str = "digits"
    """digits and the table breast_cancer (embedded), cifar10, cifar100, mnist, fashion_mnist, imagenet2012, or in
    data_dir any set of images, texts (glue/sst2) or a table (adult). For data of one's own: the path of an .npz, a CSV
    file or a folder of images, or ":FUNCTION" of a preset."""
    data_dir: str | None = None
    """A TFDS data directory; by default TFDS's own, with download."""
    cache_dir: str | None = None
    """Where decoded arrays are kept; by default ~/.cache/msjax."""
    label: str = "label"
    """Of a CSV file: the column that is predicted."""
    drop: tuple[str, ...] = ()
    """Of a table: the columns that are not used, such as a row's number."""
    test_share: float = 0.2
    """Of data that come without a test set: how much of them is set aside for it."""
    normalize: bool = False
    """Of an .npz file: whether numbers that are no images are standardised by mean and std of the training data, as
    those of tables of other kinds always are."""
    missing: data.Missing = "refuse"
    """Of a table: refuse values that are missing or infinite, or take the median of the training rows for them, with a
    column that says which were missing. Not with clients' own data: each would measure its own rows."""
    image_size: int | None = None
    """Side of the images; by default the set's own."""
    text_length: int = data.TEXT_LENGTH
    """Tokens of a text; longer ones are cut, shorter ones padded."""
    vocabulary: int = data.VOCABULARY
    """How many different tokens there are; words get theirs by a hash."""
    augment: str | None = None
    """Augmentation of training inputs: none, flip, crop_flip, or ":FUNCTION" of a preset, from (inputs, key) to inputs
    of the same dtype; by default what is usual for the set."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from inputs, channel by channel of pixels in [0, 1], or column by column of a table; by
    default the set's own mean."""
    std: tuple[float, ...] | None = None
    """What they are then divided by; by default the set's own. Set both to what model.weights were trained with."""
    crop_padding: int = data.CROP_PADDING
    """Pixels that crop_flip pads on each side before it crops; fewer suit short schedules."""
    alpha: float | None = None
    """Dirichlet concentration of a label-skewed share-out; by default an even one, as in the paper. Every client still
    draws an equal number of samples an epoch: a small share goes round more than once, a large one not whole."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What the network is trained for."""

    name: str = "classification"
    """classification, multi_label, regression, segmentation, next_token, or ":FUNCTION" of a preset that returns a
    tasks.Task."""
    ignore: int | None = None
    """segmentation, next_token: a label that counts for nothing."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How all parts are updated."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """sgd, as in the paper, or adamw, which transformers need."""
    learning_rate: float = 0.1
    """The peak rate."""
    momentum: float = 0.9
    """Of sgd; of adamw, the decay of its first moment."""
    nesterov: bool = False
    weight_decay: float = 5e-4
    """sgd: L2 penalty's factor, added to the gradient of every parameter before the momentum, as PyTorch's SGD does.
    adamw: decoupled, times the learning rate (arXiv 1711.05101)."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """cosine to 0 over all epochs; steps multiplies by gamma at each of the milestones."""
    milestones: tuple[int, ...] = ()
    """Epochs at which `steps` lowers the rate."""
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0, half of the run at most; the schedule covers the rest."""
    label_smoothing: float = 0.0
    """Part of the training target that is spread over all classes, in [0, 1)."""


@dataclasses.dataclass(frozen=True)
class ModeConfig:
    """How the clients work together, and what stays with them."""

    kind: Literal["parallel", "splitfed", "sequential"] = "parallel"
    """parallel: all clients step together and their gradients are averaged in every step, as in the paper. splitfed:
    every client updates a part of its own, and the parts are averaged now and then. sequential: one client after
    another trains with the server, and hands its part to the next."""
    average_steps: int = 10
    """splitfed: steps between two averages of the parts; there is one at the end of an epoch in any case."""
    turn_steps: int | None = None
    """sequential: steps of a turn; by default a client's whole share of an epoch."""
    tail_cut: str | None = None
    """U-shaped: the layers behind this cut, and the labels, stay with the client. A cut as of the model, or "last"."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    task: TaskConfig = TaskConfig()
    mode: ModeConfig = ModeConfig()
    codec: CodecFlag = MaskEncoded()
    """Of the features, on their way up: a codec of msjax.compress, as "TopK" or "MaskEncoded(ratio=0.99, bits=2)"."""
    grad_codec: CodecFlag = Identity()
    """Of the gradient, on its way down; the paper sends it uncompressed."""
    array_codecs: tuple[tuple[str, str], ...] = ()
    """Where the features are a tree of arrays: pairs of an array's name, as "skips/0", and its codec; others take
    `codec`."""
    clients: int = 10
    """Number of clients K."""
    batch_size: int = 256
    """Samples that each client sends in a step."""
    epochs: int = 10
    seed: int = 0
    """Of the initial parameters, the share-out, the order, the augmentation and the codecs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the network, and of the features that are sent. Parameters are float32."""
    test_every: int = 1
    """Epochs between two tests, each of which costs time and a test set of features; the last epoch always has one."""
    eval_compressed: bool = True
    """Whether test features go through the codec, as in the paper."""
    allow_nonfinite: bool = False
    """Whether to go on where a loss is NaN or infinite; otherwise the run ends there with an error."""
    compare: bool = False
    """Also train without compression, and print both beside each other."""
    out: str = "runs"
    """Where the run folder is made."""

    def __post_init__(self):
        for name, value, kind in _fields(self):
            choices = typing.get_origin(kind) is Literal  # see below
            if not (choices or _fits(value, kind) or (name in _CUTS and _fits(value, int))):
                raise ValueError(f"{name} must be {_in_words(kind)}, got {value!r}")
        for name, (least, most) in _RANGES.items():
            value = operator.attrgetter(name)(self)
            if value is not None and not least <= value <= most:
                rule = f"at least {least}" if most == math.inf else f"in {least}..{most}"
                raise ValueError(f"{name} must be {rule}, got {value}")
        for name in _POSITIVE:
            if (value := operator.attrgetter(name)(self)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        # Literal types are checked on the command line alone; presets and files are checked here.
        for name, value, choices in _choices(self):
            if value not in choices and not (name in _REFERENCES and is_reference(value)):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        for name in ("optim.label_smoothing", "optim.momentum"):
            if not 0 <= (value := operator.attrgetter(name)(self)) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if not 0 < self.data.test_share < 1:
            raise ValueError(f"data.test_share must be above 0 and below 1, got {self.data.test_share}")
        if (self.data.mean is None) != (self.data.std is None):
            raise ValueError(f"data.mean and data.std must be given together, got {self.data.mean} and {self.data.std}")
        if self.data.std is not None and not all(s > 0 for s in self.data.std):
            raise ValueError(f"data.std must be above 0 and finite, got {self.data.std}")
        if self.optim.schedule == "steps" and not self.optim.milestones:
            raise ValueError("optim.milestones must name at least one epoch with optim.schedule='steps', got ()")
        for name, codec in self.array_codecs:
            _parse_codec(f"array_codecs of {name!r}", codec)

    @property
    def cut(self) -> int | str:
        """`model.cut` as `models.split` takes it."""
        return _cut(self.model.cut)

    @property
    def tail_cut(self) -> int | str | None:
        """`mode.tail_cut` as `models.split` takes it."""
        return None if self.mode.tail_cut is None else _cut(self.mode.tail_cut)


def _cut(cut):
    return int(cut) if str(cut).isdecimal() else cut


_RANGES = {
    **dict.fromkeys(("clients", "batch_size", "epochs", "test_every"), (1, math.inf)),
    **dict.fromkeys(("mode.average_steps", "mode.turn_steps"), (1, math.inf)),
    **dict.fromkeys(("data.text_length", "data.image_size"), (1, math.inf)),
    "data.vocabulary": (2, math.inf),  # words, and padding
    **dict.fromkeys(("optim.warmup_epochs", "optim.weight_decay", "data.crop_padding"), (0, math.inf)),
    "seed": (0, MAX_SEED),
}
_POSITIVE = ("optim.learning_rate", "optim.gamma", "model.width", "data.alpha")
_CUTS = ("model.cut", "mode.tail_cut")
"""Fields that may be a number of a layer, too."""
_REFERENCES = ("model.name", "data.name", "data.augment", "task.name")
"""Fields that may name a function of a preset."""
_TASKS = ("classification", "multi_label", "regression", "segmentation", "next_token")


def _choices(config):
    """(name, value, choices) of every field that has a few values."""
    yield "data.augment", config.data.augment, (None, *data.AUGMENTATIONS)
    yield "task.name", config.task.name, _TASKS
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


_PLURALS = {int: "integers", float: "finite numbers", tuple[str, str]: "pairs of texts"}


def _parse_codec(name, text):
    """A codec's text; errors begin with the field's name."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be the text of a codec, got {text!r}")
    try:
        return compress.from_string(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None


def by_name(codec: Codec, array_codecs: tuple[tuple[str, str], ...]) -> dict[str, Codec]:
    """Returns the codecs of features by the names of their arrays, with "" for all others."""
    return {"": codec} | {name: compress.from_string(text) for name, text in array_codecs}


def to_json(config: Config) -> dict[str, Any]:
    """Returns the config as JSON-ready dicts; codecs as their text."""

    def plain(value):
        if isinstance(value, Codec):
            return repr(value)
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


def from_json(tree: dict[str, Any]) -> Config:
    """Returns the config that `to_json` made `tree` from, this version's or an earlier one's.

    Raises:
      ValueError: a field is unknown or has a value that is not allowed.
    """
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
    for name in ("codec", "grad_codec"):
        if name not in tree:
            raise ValueError(f"config does not fit this version of msjax: it has no {name}")
        tree[name] = _parse_codec(name, tree[name])
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


def without_paths(config: Config) -> Config:
    """Returns the config without where data, presets and runs lie on one machine, which says nothing on another.

    Of presets, files of data and `model.weights` the file's name is left, which is part of what a run is.
    """
    name = config.data.name
    name = os.path.basename(os.path.normpath(name)) if is_local_path(name) else name
    plain = dataclasses.replace(config.data, data_dir=None, cache_dir=None, name=name)
    weights = config.model.weights and os.path.basename(config.model.weights)
    model = dataclasses.replace(config.model, weights=weights)
    plain = dataclasses.replace(config, model=model, data=plain, out=Config.out)
    return _map_references(plain, os.path.basename)


def is_local_path(data_name: str) -> bool:
    """Whether the name of a data set is the path of a file or folder."""
    return not is_reference(data_name) and (data_name.endswith((".npz", ".csv")) or os.path.isdir(data_name))


def _map_references(config, change):
    for name, value in references(config).items():
        section, _, field = name.partition(".")
        new = dataclasses.replace(getattr(config, section), **{field: change(value)})
        config = dataclasses.replace(config, **{section: new})
    return config


def references(config: Config) -> dict[str, str]:
    """Returns the fields that name functions of a preset, and the names."""
    found = {name: operator.attrgetter(name)(config) for name in _REFERENCES}
    return {name: value for name, value in found.items() if value is not None and is_reference(value)}


def with_own(config: Config, own: Config) -> Config:
    """Returns a run's config with model, data and task of another: what each party of a network brings itself."""
    return dataclasses.replace(config, model=own.model, data=own.data, task=own.task)


def resolve(name: str, reference: str) -> Any:
    """Returns the object that the field `name` refers to, as "FILE.py:OBJECT".

    Raises:
      ValueError: there is no such file, or nothing of that name in it.
    """
    path, _, attribute = reference.rpartition(":")
    return resolve_in(name, path, attribute)


def call_reference(name: str, reference: str, *arguments: Any) -> Any:
    """Returns what the function that a field refers to makes of those arguments that it takes; an object as it is.

    Raises:
      ValueError: see `resolve`.
    """
    return call(f"{name} {reference!r}", resolve(name, reference), *arguments)


def to_text(config: Config) -> str:
    """Returns the resolved config as the text of a JSON file."""
    return json.dumps(to_json(config), indent=2) + "\n"


def save(config: Config, path: pathlib.Path) -> None:
    """Writes the resolved config as JSON."""
    path.write_text(to_text(config))


def load(path: pathlib.Path) -> Config:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is damaged, or of another version.
    """
    try:
        return from_json(json.loads(path.read_text()))
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
    config = _map_references(config, lambda value: file + value if value.startswith(":") else value)
    for name, value in references(config).items():
        resolve(name, value)
    return config

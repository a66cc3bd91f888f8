"""The configuration of a run: frozen dataclasses, saved with every result and set from the command line.

A preset is a Python file with `get_config() -> Config`; see `configs/`.
"""

import dataclasses
import json
import math
import operator
import os
import pathlib
import typing
from typing import Annotated, Any, Literal

import tyro

from msjax import compress, data
from msjax.compress import Codec, Identity, MaskEncoded
from msjax.references import is_reference, load_module, resolve_in

CodecFlag = Annotated[
    Codec,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="CODEC",
        instance_from_str=lambda args: compress.from_string(args[0]),
        is_instance=lambda value: isinstance(value, Codec),
        str_from_instance=lambda value: [repr(value)],
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
    compare: bool = False
    """Also train without compression, and print both beside each other."""
    out: str = "runs"
    """Where the run folder is made."""

    def __post_init__(self):
        for name, least in _LEAST.items():
            value = operator.attrgetter(name)(self)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        # Literal types are checked on the command line alone; presets and files are checked here.
        for name, value, choices in _choices(self):
            if value not in choices and not (name in _REFERENCES and is_reference(value)):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if not self.optim.learning_rate > 0:
            raise ValueError(f"optim.learning_rate must be above 0, got {self.optim.learning_rate}")
        if not 0 <= self.optim.label_smoothing < 1:
            raise ValueError(f"optim.label_smoothing must be in [0, 1), got {self.optim.label_smoothing}")
        if (self.data.mean is None) != (self.data.std is None):
            raise ValueError(f"data.mean and data.std must be given together, got {self.data.mean} and {self.data.std}")
        if self.data.std is not None and not all(0 < s < math.inf for s in self.data.std):
            raise ValueError(f"data.std must be above 0 and finite, got {self.data.std}")
        data.check_alpha(self.data.alpha, "data.alpha")
        if self.optim.schedule == "steps" and not self.optim.milestones:
            raise ValueError("optim.milestones must name at least one epoch with optim.schedule='steps', got ()")
        for _, codec in self.array_codecs:
            compress.from_string(codec)

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


_LEAST = {
    **dict.fromkeys(("clients", "batch_size", "epochs", "test_every", "mode.average_steps", "mode.turn_steps"), 1),
    "data.text_length": 1,
    "data.vocabulary": 2,  # words, and padding
    **dict.fromkeys(("seed", "optim.warmup_epochs", "optim.weight_decay", "data.crop_padding"), 0),
}
_REFERENCES = ("model.name", "data.name", "data.augment", "task.name")
"""Fields that may name a function of a preset."""
_TASKS = ("classification", "multi_label", "regression", "segmentation", "next_token")


def _choices(config):
    """(name, value, choices) of every field that has a few values."""
    yield "data.augment", config.data.augment, (None, *data.AUGMENTATIONS)
    yield "task.name", config.task.name, _TASKS
    for section in (config, config.model, config.data, config.optim, config.mode):
        prefix = "" if section is config else f"{type(section).__name__.removesuffix('Config').lower()}."
        for field in dataclasses.fields(section):
            if typing.get_origin(field.type) is Literal:
                yield prefix + field.name, getattr(section, field.name), typing.get_args(field.type)


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
    tree = dict(tree)
    try:
        optim = dict(tree.pop("optim", {}))
        optim["milestones"] = tuple(optim.get("milestones", ()))
        data_fields = dict(tree.pop("data", {}))
        tuples = ("mean", "std", "drop")
        data_fields |= {name: tuple(data_fields[name]) for name in tuples if data_fields.get(name) is not None}
        return Config(
            model=ModelConfig(**tree.pop("model", {})),
            data=DataConfig(**data_fields),
            optim=OptimConfig(**optim),
            task=TaskConfig(**tree.pop("task", {})),
            mode=ModeConfig(**_present_names("mode", tree.pop("mode", {}))),
            codec=compress.from_string(tree.pop("codec")),
            grad_codec=compress.from_string(tree.pop("grad_codec")),
            array_codecs=tuple(map(tuple, tree.pop("array_codecs", ()))),
            **tree,
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"config does not fit this version of msjax: {error}") from None


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
    from msjax.references import call

    return call(resolve(name, reference), *arguments)


def save(config: Config, path: pathlib.Path) -> None:
    """Writes the resolved config as JSON."""
    path.write_text(json.dumps(to_json(config), indent=2) + "\n")


def load(path: pathlib.Path) -> Config:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file is damaged, or of another version.
    """
    try:
        return from_json(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_preset(path: str) -> Config:
    """Returns `get_config()` of the Python file at `path`; what it names as ":FUNCTION" is looked for in that file.

    Raises:
      ValueError: there is no such file, it has no `get_config` that returns a `Config`, or lacks a function that the
        config names.
    """
    module = load_module("the preset", path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"the preset must be a Python file with get_config(), got {path!r}, which has none")
    config = module.get_config()
    if not isinstance(config, Config):
        raise ValueError(f"the preset must be a Python file whose get_config() returns a Config, got {path!r}")
    file = os.path.abspath(path)
    config = _map_references(config, lambda value: file + value if value.startswith(":") else value)
    for name, value in references(config).items():
        resolve(name, value)
    return config

"""The configuration of a run: frozen dataclasses, saved with every result and set from the command line.

A preset is a Python file with `get_config() -> Config`; see `configs/`.
"""

import dataclasses
import importlib.util
import json
import math
import operator
import pathlib
from typing import Annotated, Any, Literal

import tyro

from msjax import compress, data
from msjax.compress import Codec, Identity, MaskEncoded

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
    for tables, transformer for texts."""
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
    data_dir any set of images, texts (glue/sst2) or a table (adult)."""
    data_dir: str | None = None
    """A TFDS data directory; by default TFDS's own, with download."""
    cache_dir: str | None = None
    """Where decoded arrays are kept; by default ~/.cache/msjax."""
    image_size: int | None = None
    """Side of the images; by default the set's own."""
    text_length: int = data.TEXT_LENGTH
    """Tokens of a text; longer ones are cut, shorter ones padded."""
    vocabulary: int = data.VOCABULARY
    """How many different tokens there are; words get theirs by a hash."""
    augment: Literal["none", "flip", "crop_flip"] | None = None
    """Augmentation of training images; by default what is usual for the set."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from inputs, channel by channel of pixels in [0, 1]; by default the set's own mean."""
    std: tuple[float, ...] | None = None
    """What they are then divided by; by default the set's own. Set both to what model.weights were trained with."""
    crop_padding: int = data.CROP_PADDING
    """Pixels that crop_flip pads on each side before it crops; fewer suit short schedules."""
    alpha: float | None = None
    """Dirichlet concentration of a label-skewed share-out; by default an even one, as in the paper. Every client still
    draws an equal number of samples an epoch: a small share goes round more than once, a large one not whole."""

    @property
    def form(self) -> dict[str, Any]:
        """How inputs are made of what is stored, as keywords of `data.load`."""
        return {"image_size": self.image_size, "text_length": self.text_length, "vocabulary": self.vocabulary}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How both halves are updated."""

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
    every client updates a half of its own, and the halves are averaged now and then. sequential: one client after
    another trains with the server, and hands its half to the next."""
    average_steps: int = 10
    """splitfed: steps between two averages of the halves; there is one at the end of an epoch in any case."""
    turn_steps: int | None = None
    """sequential: steps of a turn; by default a client's whole share of an epoch."""
    head_cut: str | None = None
    """U-shaped: the layers behind this cut, and the labels, stay with the client. A cut as of the model, or "last"."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mode: ModeConfig = ModeConfig()
    codec: CodecFlag = MaskEncoded()
    """Of the features, on their way up: a codec of msjax.compress, as "TopK" or "MaskEncoded(ratio=0.99, bits=2)"."""
    grad_codec: CodecFlag = Identity()
    """Of the gradient, on its way down; the paper sends it uncompressed."""
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
        for name, choices in _CHOICES.items():
            value = operator.attrgetter(name)(self)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if not self.optim.learning_rate > 0:
            raise ValueError(f"optim.learning_rate must be above 0, got {self.optim.learning_rate}")
        if not 0 <= self.optim.label_smoothing < 1:
            raise ValueError(f"optim.label_smoothing must be in [0, 1), got {self.optim.label_smoothing}")
        if (self.data.mean is None) != (self.data.std is None):
            raise ValueError(f"data.mean and data.std must be given together, got {self.data.mean} and {self.data.std}")
        if self.data.std is not None and not all(0 < s < math.inf for s in self.data.std):
            raise ValueError(f"data.std must be above 0 and finite, got {self.data.std}")
        if self.optim.schedule == "steps" and not self.optim.milestones:
            raise ValueError("optim.milestones must name at least one epoch with optim.schedule='steps', got ()")

    @property
    def cut(self) -> int | str:
        """`model.cut` as `models.split` takes it."""
        return _cut(self.model.cut)

    @property
    def head_cut(self) -> int | str | None:
        """`mode.head_cut` as `models.split` takes it."""
        return None if self.mode.head_cut is None else _cut(self.mode.head_cut)


def _cut(cut):
    return int(cut) if str(cut).isdecimal() else cut


_LEAST = {
    **dict.fromkeys(("clients", "batch_size", "epochs", "test_every", "mode.average_steps", "mode.turn_steps"), 1),
    "data.text_length": 1,
    "data.vocabulary": 2,  # words, and padding
    **dict.fromkeys(("seed", "optim.warmup_epochs", "optim.weight_decay", "data.crop_padding"), 0),
}
# Literal types are checked on the command line alone; presets and files are checked against this.
_CHOICES = {
    "model.first_block": ("residual", "paper"),
    "model.shortcut": ("projection", "zero_padding"),
    "model.conv_init": ("he_normal", "dirac"),
    "data.augment": (None, "none", "flip", "crop_flip"),
    "mode.kind": ("parallel", "splitfed", "sequential"),
    "optim.kind": ("sgd", "adamw"),
    "optim.schedule": ("cosine", "steps", "constant"),
    "dtype": ("float32", "bfloat16"),
}


def to_json(config: Config) -> dict[str, Any]:
    """Returns the config as JSON-ready dicts; codecs as their text."""

    def plain(value):
        if isinstance(value, Codec):
            return repr(value)
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value

    return plain(config)


def from_json(tree: dict[str, Any]) -> Config:
    """Returns the config that `to_json` made `tree` from.

    Raises:
      ValueError: a field is unknown or has a value that is not allowed.
    """
    tree = dict(tree)
    try:
        optim = dict(tree.pop("optim", {}))
        optim["milestones"] = tuple(optim.get("milestones", ()))
        data_fields = dict(tree.pop("data", {}))
        data_fields |= {name: tuple(data_fields[name]) for name in ("mean", "std") if data_fields.get(name) is not None}
        return Config(
            model=ModelConfig(**tree.pop("model", {})),
            data=DataConfig(**data_fields),
            optim=OptimConfig(**optim),
            mode=ModeConfig(**tree.pop("mode", {})),
            codec=compress.from_string(tree.pop("codec")),
            grad_codec=compress.from_string(tree.pop("grad_codec")),
            **tree,
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"config does not fit this version of msjax: {error}") from None


def without_paths(config: Config) -> Config:
    """Returns the config without where data and runs lie on one machine, which says nothing on another.

    Of `model.weights` the file's name is left, which is part of what a run is.
    """
    local = dataclasses.replace(config.data, data_dir=None, cache_dir=None)
    weights = config.model.weights and pathlib.PurePath(config.model.weights).name
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, weights=weights), data=local, out=Config.out
    )


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
    """Returns `get_config()` of the Python file at `path`.

    Raises:
      ValueError: there is no such file, or it has no `get_config` that returns a `Config`.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"--config must be a Python file with get_config(), got {path!r}, which does not exist")
    spec = importlib.util.spec_from_file_location(f"msjax_preset_{file.stem}", file)
    if spec is None:
        raise ValueError(f"--config must be a Python file with get_config(), got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
    if not isinstance(config, Config):
        raise ValueError(f"--config must be a Python file whose get_config() returns a Config, got {path!r}")
    return config

"""The fields of a run's description."""

import dataclasses
from typing import Annotated, Literal

import tyro

from msjax import compress, data
from msjax.compress import Codec, Identity, MaskEncoded
from msjax.config._checks import check
from msjax.config._codecs import codec_from_text, codec_text
from msjax.references import is_reference

CodecFlag = Annotated[
    Codec,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="CODEC",
        instance_from_str=lambda args: codec_from_text(args[0], own_code=True),
        is_instance=lambda value: isinstance(value, Codec),
        # In double quotes, which stay as they are where a shell's quotes are put around.
        str_from_instance=lambda value: [codec_text(value).replace("'", '"')],
    ),
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network and where it is cut."""

    name: str = "convnet"
    """vgg19, resnet9, resnet9t, resnet18, resnet34, resnet20, resnet32, resnet56, resnet110 or convnet for images, mlp
    for tables, transformer for classes of texts, decoder for language models (Llama, Qwen); or ":FUNCTION" of a preset
    that makes the parts of a model of one's own."""
    cut: str = "medium"
    """shallow, medium, deep, or the number of the last layer on the client; `msjax models` lists them."""
    width: float = 1.0
    """Multiplier of the channel counts."""
    activation: str = "relu"
    """relu, leaky_relu, gelu, silu or tanh."""
    cut_before_activation: bool = False
    """Whether the server applies the activation that the client's last layer ends with, so that features have both
    signs."""
    first_block: Literal["residual", "paper"] = "residual"
    """ResNets: "paper" takes the skip connection out of the first block, so that the paper's cut 2 exists."""
    shortcut: Literal["projection", "zero_padding"] = "projection"
    """ResNets: where the shape changes, a 1×1 convolution, or every second pixel and zero channels (option A)."""
    conv_init: Literal["he_normal", "dirac"] = "he_normal"
    """dirac: 3×3 convolutions start as identities, which helps short schedules."""
    running_variance: Literal["biased", "unbiased"] = "biased"
    """Of batch normalisation: as flax keeps it, or unbiased, as PyTorch does, to go on training from its weights."""
    weights: str | None = None
    """A safetensors file of the whole network in PyTorch's names, to start from; by default the weights are drawn. Of a
    decoder, a folder of Hugging Face's: config.json, model.safetensors, tokenizer.json."""
    new_head: bool = False
    """Draw the last layer anew rather than take that of `weights`: for other classes. Not of a decoder."""
    decoder: str | None = None
    """decoder: the path of a config.json of Hugging Face's, or its text; by default that of the folder `weights`. A run
    keeps the text."""
    remat: bool = False
    """decoder: whether a step computes each block a second time for the gradient, to need less memory."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and its share-out among the clients."""

    name: str = "digits"
    """digits and the table breast_cancer (embedded), cifar10, cifar100, mnist, fashion_mnist, imagenet2012, or in
    data_dir any set of images, texts (glue/sst2) or a table (adult). For data of one's own: the path of an .npz, a CSV
    or text file or a folder of images, or ":FUNCTION" of a preset."""
    data_dir: str | None = None
    """A TFDS data directory; by default TFDS's own, with download."""
    cache_dir: str | None = None
    """Where decoded arrays are kept; by default ~/.cache/msjax."""
    streamed: bool | None = None
    """Decode images as they are needed, rather than into memory, to the same pixels; by default of imagenet2012 and of
    folders of images that have 2 GiB or more."""
    workers: int | None = None
    """Processes that read what is streamed; 0 for threads. By default one fewer than there are cores, and threads where
    there are two cores or little to read."""
    label: str = "label"
    """Of a CSV file: the column that is predicted."""
    classes: tuple[str, ...] = ()
    """Of an .npz or CSV file or a folder of images: the names of all classes in order, also of those that are not
    there, as where clients bring data of their own and some lack a class; by default those that are there. Numbers in a
    CSV file have names such as 7 and 1.5."""
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
    channels: Literal[1, 3] | None = None
    """Of a folder of images: 1 makes all grey, 3 colour; by default grey where all training images are. Clients with
    folders of their own may need it."""
    text_length: int = data.TEXT_LENGTH
    """Tokens of a text; longer ones are cut, shorter ones padded. Of a decoder: tokens of a block, with no padding."""
    vocabulary: int = data.VOCABULARY
    """How many different tokens there are; words get theirs by a hash."""
    augment: str | None = None
    """Augmentation of training inputs: none, flip, crop_flip, or ":FUNCTION" of a preset, from (inputs, key) to inputs
    of the same dtype, or from (inputs, labels, key) to both; by default what is usual for the set."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from inputs, channel by channel of pixels in [0, 1], or column by column of a table; by
    default the set's own mean."""
    std: tuple[float, ...] | None = None
    """What they are then divided by; by default the set's own. Set both to what model.weights were trained with."""
    crop_padding: int = data.CROP_PADDING
    """Pixels that crop_flip pads on each side before it crops; fewer suit short schedules."""
    tokenizer: str | None = None
    """decoder: a tokenizer.json of Hugging Face's, or a folder that has one; by default that of `model.weights`."""
    text_column: str = "text"
    """decoder: the column of a CSV file that has the texts."""
    test: str | None = None
    """decoder: the path of a second text or CSV file, to test on; by default `test_share` of the blocks, the last."""
    alpha: float | None = None
    """Dirichlet concentration of a label-skewed share-out; by default an even one, as in the paper. Every client still
    draws an equal number of samples an epoch: a small share goes round more than once, a large one not whole."""
    division: str | None = None
    """In place of alpha ":FUNCTION" of a preset, from (data.Dataset, clients) and, if it takes that, seed to the
    indices of each client's training samples."""


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

    kind: Literal["sgd", "adamw"] | str = "sgd"
    """sgd, as in the paper, or adamw, which transformers need. Or in a preset ":FUNCTION", which is given the learning
    rate as a schedule and returns an Optax transformation."""
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
    clip_norm: float | None = None
    """What the global norm of a gradient is cut down to, before weight decay and momentum; by default it is not. The
    norm is that of one part's gradient, as client and server each see their own alone: the network's is larger."""
    accumulate_steps: int = 1
    """Steps whose mean gradient is one update: batches of as many times batch_size, in the memory of one. Over the cut
    each is a step as any other, with its messages and averages; what is left at the end of the run is not used."""
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
    client_fraction: float = 1.0
    """splitfed: the share of the clients that takes part in a round, which is what lies between two averages; which
    ones is drawn for each round. They fetch the last average when it begins. An epoch has as many steps as with all of
    them, and so sees this share of the samples."""
    turn_steps: int | None = None
    """sequential: steps of a turn; by default a client's whole share of an epoch."""
    tail_cut: str | None = None
    """U-shaped: the layers behind this cut, and the labels, stay with the client. A cut as of the model, or "last"."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """decoder: low-rank adapters that are trained in place of the weights (arXiv 2106.09685)."""

    rank: int | None = None
    """Of the adapters; by default there are none, and all weights are trained."""
    alpha: float = 16.0
    """alpha / rank is what the adapters' output is multiplied by."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """The layers that have one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."""
    dropout: float = 0.0
    """The share of the adapters' inputs that is dropped in training."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    task: TaskConfig = TaskConfig()
    mode: ModeConfig = ModeConfig()
    lora: LoraConfig = LoraConfig()
    codec: CodecFlag = MaskEncoded()
    """Of the features, on their way up: a codec of msjax.compress, as "TopK" or "MaskEncoded(ratio=0.99, bits=2)", or
    one of your own, as "mine.py:MyCodec(rate=0.5)" or "package.module:MyCodec"."""
    grad_codec: CodecFlag = Identity()
    """Of the gradient, on its way down; the paper sends it uncompressed."""
    grad_kept_only: bool = False
    """Whether the gradient is sent only where the features were kept, and taken for zero elsewhere: of a sparsifier's
    kept values alone, of EntropyMask's where a code is not 0, of other codecs' where a feature does not decode to zero.
    After a ReLU about half of the features decode to zero. Messages become shorter with a sparsifier, or with an
    EntropyMask of the gradient. Between the blocks of a language model, training at a bit or less needs this."""
    update_codec: CodecFlag = Identity()
    """Of what keeps the clients' parts equal, both ways, with error feedback unless it is unbiased: gradients, or in
    splitfed the changes of the parts; a codec for both signs, as EntropyMask(bits=2.0, signed=True). Statistics then
    have 8 bits, or in splitfed 32. It pays for parts of some hundred values or more. In sequential mode, and with a
    client_fraction below 1, a Cast, of the parts that are handed on. With one client nothing is sent for this."""
    cut_bits: float | None = None
    """One budget for both ways over the cut: real bits a value of the features, up and down together. Both codecs are
    then an EntropyMask; gradients take what their codec's `error` needs, half of the budget at most, and features what
    is left, from step to step. Where a client hands its part on, each turn begins anew. U-shaped it is the budget of
    the first cut. Tests during a run aim at the bits that training has at that moment, predictions with the
    trained parts at those that it had at the end."""
    cut_seconds: float | None = None
    """With `cut_bits`: the time that a step's messages may take on a client's link: features, labels and gradients of a
    full batch, and what keeps the clients equal. The budget of features and gradients is then what fits in, from an
    eighth of `cut_bits` to `cut_bits`. Over a network each client measures its link in every step."""
    link_bytes_per_second: float | None = None
    """With `cut_seconds`: how fast each client's link is. `msjax train`, which has no link, needs it. Over a network
    clients begin with it, and measure from then on; without it the first step has all of `cut_bits`."""
    array_codecs: tuple[tuple[str, str], ...] = ()
    """Where the features are a tree of arrays: pairs of an array's name, as "skips/0", and its codec; others take
    `codec`."""
    clients: int = 10
    """Number of clients K."""
    clients_per_group: int | None = None
    """Of `msjax train`: how many clients each device computes at the same time, one group after another, so that the
    memory of activations does not grow with K; by default all. The numbers are the same up to the order of sums. One
    that divides the clients of a device is compiled once, another twice."""
    shard_server: bool = False
    """Whether the server's part, its optimizer's state and the batch of each step are spread over all devices (FSDP),
    so that a larger part fits; with msjax serve over those of the server. By default msjax train spreads the clients
    alone, and msjax serve has one device. The numbers are the same up to the order of sums. Of one process alone: with
    several, see msjax train --distributed, it must be False."""
    batch_size: int = 256
    """Samples that each client sends in a step; all that it has, where these are fewer."""
    epochs: int = 10
    """How often the training data are gone through."""
    seed: int = 0
    """Of the initial parameters, the share-out, the order, the augmentation and the codecs. An NNX model of your own
    draws its parameters itself, from the argument `seed` of the function that makes it, if this has one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the network, of the features that are sent, and of weights that adapters leave frozen. What is
    trained is float32."""
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
        check(self)

    @property
    def cut(self) -> int | str:
        """`model.cut` as `models.split` takes it."""
        return _cut(self.model.cut)

    @property
    def has_cut(self) -> bool:
        """Whether `model.cut` says where the network is cut; a function of a preset may return parts instead."""
        return not is_reference(self.model.name) or isinstance(self.cut, int)

    @property
    def tail_cut(self) -> int | str | None:
        """`mode.tail_cut` as `models.split` takes it."""
        return None if self.mode.tail_cut is None else _cut(self.mode.tail_cut)


def _cut(cut):
    return int(cut) if str(cut).isdecimal() else cut


def by_name(codec: Codec, array_codecs: tuple[tuple[str, str], ...]) -> dict[str, Codec]:
    """Returns the codecs of features by the names of their arrays, with "" for all others."""
    return {"": codec} | {name: compress.from_string(text) for name, text in array_codecs}

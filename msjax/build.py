"""From a config and a summary of the data to the description of a run and its first state; nothing here reads data."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msjax import config, data, models, tasks
from msjax.compress import Identity
from msjax.optim import make_optimizer
from msjax.paths import existing_file, expand
from msjax.split.make_spec import init_part, make_spec
from msjax.split.modes import MODES, Mode
from msjax.split.payloads import Codecs
from msjax.split.schedule import Schedule
from msjax.split.spec import Preprocess, RunSpec
from msjax.split.state import PartState
from msjax.split.trees import TreeSpec


class DataSummary(NamedTuple):
    """What a network has to know of a data set.

    Attributes:
      inputs, labels: of one example, as they are stored.
      num_classes: where labels are classes.
      mean, std: for `data.normalize`; None where inputs are taken as they are.
      augment: the usual augmentation of the set.
      columns: of a table, how its columns became inputs.
      tokenizer: of texts, what split them: of words a version, of a tokenizer.json its hash.
      classes: the names of the classes, where they are known.
    """

    inputs: TreeSpec
    labels: TreeSpec
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "none"
    tokenizer: int | str | None = None
    columns: tuple[data.Column, ...] | None = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def of(cls, ds: data.Dataset) -> "DataSummary":
        """Returns the summary of a data set."""
        mean, std = (None if v is None else tuple(map(float, v)) for v in (ds.mean, ds.std))
        inputs, labels = TreeSpec.of(ds.input_like), TreeSpec.of(ds.label_like)
        return cls(inputs, labels, ds.num_classes, mean, std, ds.augment, ds.tokenizer, ds.columns, ds.classes)

    def normalized_as(self, cfg: config.DataConfig) -> "DataSummary":
        """Returns it with the config's `mean` and `std`, where it has them.

        Raises:
          ValueError: they are not as many as the inputs have channels.
        """
        if cfg.mean is None or cfg.std is None:
            return self
        for name, values in (("mean", cfg.mean), ("std", cfg.std)):
            if len(values) != self.input_shape[-1]:
                raise ValueError(f"data.{name} must have {self.input_shape[-1]} numbers, got {values}")
        if self.columns is None:
            return self._replace(mean=cfg.mean, std=cfg.std)
        # What the config's mean and std are of the columns as they were, in terms of the inputs that came of them.
        own_mean, own_std = map(np.asarray, data.column_statistics(self.columns))
        mean, std = (np.asarray(cfg.mean) - own_mean) / own_std, np.asarray(cfg.std) / own_std
        return self._replace(mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example's inputs.

        Raises:
          ValueError: they are a tree of several arrays.
        """
        if len(self.inputs.leaves) != 1:
            raise ValueError(f"the model takes one array of inputs, but the data set has {self.inputs}")
        return tuple(self.inputs.leaves[0].shape)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON-ready values."""
        found = {"inputs": self.inputs.to_json(), "labels": self.labels.to_json(), "num_classes": self.num_classes}
        if len(self.inputs.leaves) == 1:
            found["input_shape"] = list(self.input_shape)
        if self.tokenizer is not None:
            found["tokenizer"] = self.tokenizer
        if self.classes is not None:
            found["classes"] = list(self.classes)
        if self.columns is not None:
            found["columns"] = [column._asdict() for column in self.columns]
        mean, std = (None if v is None else np.asarray(v).tolist() for v in (self.mean, self.std))
        return found | {"mean": mean, "std": std}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "DataSummary":
        """Returns what `to_json` made, or an earlier version's; trees become flat dicts by their arrays' names."""
        mean, std = (None if tree[name] is None else tuple(map(float, tree[name])) for name in ("mean", "std"))
        shape = tree.get("input_shape")
        first = "uint8" if shape is not None and len(shape) == 3 else "float32"  # images, where dtypes are not said yet
        inputs = _from_names(tree.get("inputs", [["", first, shape]]))
        labels = _from_names(tree.get("labels", [["", "int32", []]]))
        columns = tree.get("columns")
        if columns is not None:
            columns = tuple(data.Column(**(column | {"texts": tuple(column["texts"])})) for column in columns)
        classes = None if tree.get("classes") is None else tuple(map(str, tree["classes"]))
        rest = {"tokenizer": tree.get("tokenizer"), "columns": columns, "classes": classes}
        return cls(inputs, labels, tree["num_classes"], mean, std, **rest)


def _from_names(arrays):
    found = {name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for name, dtype, shape in arrays}
    return TreeSpec.of(found[""] if list(found) == [""] else found)


def check_tokenizer(present: int | str | None, trained: int | str | None) -> None:
    """Raises ValueError where texts have other words here than those that a checkpoint or part was trained on.

    Args:
      present: what splits the texts here, as of `data.Dataset.tokenizer`; None where there are none.
      trained: what was written down with what was trained: not the first version of words, nor at first a hash.
    """
    if isinstance(present, str):
        if trained not in (None, present):
            raise ValueError(f"data.tokenizer must be that of the run, of hash {trained}, got one of hash {present}")
        return
    if present not in (None, trained or 1):
        raise ValueError(
            f"what goes on must be trained on words of tokenizer {present}, which this version of msjax has, got what "
            f"was trained on those of tokenizer {trained or 1}: train it anew, or use the version that began it"
        )


def resolved(cfg: config.Config) -> config.Config:
    """Returns the config of a run with a decoder so that it says what the network is, wherever it is read.

    `model.decoder` becomes the text of config.json, and `data.tokenizer` the folder `model.weights`, where they are not
    given. Other configs are returned as they are.

    Raises:
      ValueError: there is no config.json, or it describes no decoder that is known.
    """
    if cfg.model.name != models.DECODER:
        return cfg
    described, weights = cfg.model.decoder, cfg.model.weights
    if described is None and weights is None:
        raise ValueError("model.decoder or model.weights must say what model.name='decoder' is, got neither")
    if described is None or not described.lstrip().startswith("{"):
        name = "model.weights" if described is None else "model.decoder"
        try:
            found = models.DecoderConfig.load(expand(name, weights if described is None else described))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        described = json.dumps(found.to_json())
    tokenizer = cfg.data.tokenizer
    if tokenizer is None and weights is not None and (expand("model.weights", weights) / "tokenizer.json").is_file():
        tokenizer = weights
    model = dataclasses.replace(cfg.model, decoder=described)
    return dataclasses.replace(cfg, model=model, data=dataclasses.replace(cfg.data, tokenizer=tokenizer))


def identity(cfg: config.Config) -> dict[str, str]:
    """Returns what says of a resolved config whether two parties have the same network, where shapes do not.

    "weights" is a hash of what it starts from, see `models.weights_digest`; "decoder" one of its config.json, and
    "adapters" what is trained beside the weights. What a config does not have is left out.

    Raises:
      ValueError: `model.weights` cannot be read.
    """
    found = {}
    if cfg.model.weights is not None:
        found["weights"] = models.weights_digest(expand("model.weights", cfg.model.weights))
    if cfg.model.name == models.DECODER:
        described = json.dumps(decoder_config(cfg).to_json(), sort_keys=True)
        found["decoder"] = f"sha256:{hashlib.sha256(described.encode()).hexdigest()[:16]}"
        if (lora := _lora(cfg)) is not None:
            found["adapters"] = str(lora)
    return found


def to_go_on(cfg: config.Config) -> config.Config:
    """Returns the config with which a run is loaded that has a checkpoint, whose weights are newer than the first.

    `model.weights` is then None, except beside adapters: what stays as it was is not in checkpoints.
    """
    if cfg.lora.rank is not None:
        return cfg
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, weights=None))


def decoder_config(cfg: config.Config) -> models.DecoderConfig:
    """Returns what a resolved config says of its decoder; raises ValueError where it says nothing that is known."""
    try:
        return models.DecoderConfig.from_json(json.loads(cfg.model.decoder or ""))
    except ValueError as error:
        raise ValueError(f"model.decoder must be the text of a config.json, but: {error}") from None


class Built(NamedTuple):
    """A run, before its first step."""

    spec: RunSpec
    client: PartState
    server: PartState


def build(
    cfg: config.Config,
    summary: DataSummary,
    *,
    samples: int,
    test_samples: int,
    parts: tuple[models.ModelPart, ...] | None = None,
    client_values: tuple[int, int, int] | None = None,
    shapes_only: bool = False,
) -> Built:
    """Builds the model, cuts it, and describes the run of clients with `samples` training samples each.

    Args:
      parts: what `make_parts` made, if it was called already.
      client_values: see `make_spec`.
      shapes_only: `parts` hold shapes and dtypes, and so do the states.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """
    parts = make_parts(cfg, summary, weights=cfg.model.weights) if parts is None else parts
    mode = make_mode(cfg.mode, seed=cfg.seed)
    counts = (cfg.clients, samples, test_samples, cfg.batch_size, cfg.epochs, cfg.test_every)
    schedule = Schedule(mode, *counts, u_shaped=len(parts) == 3)
    codec = Codecs.of(config.by_name(cfg.codec, cfg.array_codecs))
    spec = make_spec(
        parts,
        client_values=client_values,
        inputs=summary.inputs,
        labels=summary.labels,
        schedule=schedule,
        task=make_task(cfg, summary),
        optimizer=make_optimizer(cfg.optim, epochs=cfg.epochs, steps_per_epoch=schedule.epoch_steps),
        codec=codec,
        grad_codec=Codecs.of(cfg.grad_codec, "grad_codec"),
        grad_kept_only=cfg.grad_kept_only,
        test_codec=codec.at_inference() if cfg.eval_compressed else Codecs(Identity()),
        update_codec=cfg.update_codec,
        cut_bits=cfg.cut_bits,
        cut_seconds=cfg.cut_seconds,
        link_bytes_per_second=cfg.link_bytes_per_second,
        preprocess=make_preprocess(cfg, summary),
    )
    client, server, *tail = parts

    def states():
        return init_part(spec.optimizer, client, *tail), init_part(spec.optimizer, server)

    return Built(spec, *(jax.eval_shape(states) if shapes_only else states()))


def make_parts(cfg: config.Config, summary: DataSummary, *, weights: str | None = None) -> tuple[models.ModelPart, ...]:
    """Builds the model and cuts it: into client and server, and where the run is U-shaped a tail.

    Args:
      weights: a file of the whole network's weights; by default they are drawn from the seed, as where shapes alone are
        of use.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """
    if config.is_reference(cfg.model.name):
        made = config.call_reference("model.name", cfg.model.name, summary)
        x = jax.eval_shape(make_preprocess(cfg, summary), summary.inputs.batch(2))
        cut = cfg.cut if isinstance(cfg.cut, int) else None
        return models.as_parts(made, x, cut=None if isinstance(made, tuple) else cut, seed=cfg.seed)
    before = cfg.model.cut_before_activation
    model = make_model(cfg, summary)
    whole = None if weights is None else _open_weights(weights, model)
    options = {"tail_cut": cfg.tail_cut, "cut_before_activation": before, "seed": cfg.seed}
    with _named_as_in_config():
        return models.split(model, cfg.cut, weights=whole, **options)


def _open_weights(weights, model):
    """The weights of a whole model; of a decoder they are read when they are used. What is trained is float32."""
    if model.name == models.DECODER:
        dtype = jnp.float32 if model == models.base(model) else model.dtype
        try:
            return models.open_decoder(expand("model.weights", weights), model, dtype)
        except ValueError as error:
            raise ValueError(f"model.weights: {error}") from None
    return models.load_weights(existing_file("model.weights", weights), model)


def make_model(cfg: config.Config, summary: DataSummary) -> models.Model:
    """Builds one of msjax's own models, whole; raises ValueError as `make_parts` does."""
    return _model(cfg, summary.input_shape, _num_outputs(cfg, summary))


def _model(cfg, input_shape, num_outputs):
    is_decoder = cfg.model.name == models.DECODER
    for name in _NOT_OF_DECODERS if is_decoder else _OF_DECODERS:
        value, default = getattr(cfg.model, name), getattr(config.ModelConfig, name)
        if value != default:
            raise ValueError(f"model.{name} must be {default!r} for model.name={cfg.model.name!r}, got {value!r}")
    if is_decoder:
        if len(input_shape) != 1:
            raise ValueError(f"data.name must be texts for model.name='decoder', got inputs of shape {input_shape}")
        with _named_as_in_config():
            options = {"dtype": jnp.dtype(cfg.dtype), "remat": cfg.model.remat, "lora": _lora(cfg)}
            return models.decoder(decoder_config(cfg), length=input_shape[0], **options)
    if cfg.lora.rank is not None:
        raise ValueError(f"lora.rank must be None for model.name={cfg.model.name!r}, got {cfg.lora.rank}")
    with _named_as_in_config():
        return models.build(
            cfg.model.name,
            input_shape=input_shape,
            num_classes=num_outputs,
            width=cfg.model.width,
            activation=cfg.model.activation,
            first_block=cfg.model.first_block,
            shortcut=cfg.model.shortcut,
            conv_init=cfg.model.conv_init,
            running_variance=cfg.model.running_variance,
            dtype=jnp.dtype(cfg.dtype),
            vocabulary=cfg.data.vocabulary,
        )


def _lora(cfg):
    """The adapters of a config, if it has some."""
    if cfg.lora.rank is None:
        return None
    try:
        return models.LoRA(cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets, cfg.lora.dropout)
    except ValueError as error:
        raise ValueError(f"lora.{error}") from None


_OF_DECODERS = ("decoder", "remat")
_NOT_OF_DECODERS = ("width", "activation", "first_block", "shortcut", "conv_init", "running_variance")
_FIELDS = {f.name: f"model.{f.name}" for f in dataclasses.fields(config.ModelConfig)} | {
    "tail_cut": "mode.tail_cut",
    "vocabulary": "data.vocabulary",
    "length": "data.text_length",
}


@contextlib.contextmanager
def _named_as_in_config():
    """Errors of `models` begin with an argument's name; here with that of the config's field."""
    try:
        yield
    except ValueError as error:
        argument, space, rest = str(error).partition(" ")
        raise ValueError(_FIELDS.get(argument, argument) + space + rest) from None


def check_model(cfg: config.Config) -> None:
    """Raises ValueError for a model or a cut that there is not, whatever the data are; not of a model of one's own."""
    if config.is_reference(cfg.model.name):
        return
    # Which layers there are does not depend on the shape.
    shape = (cfg.data.text_length,) if _takes_tokens(cfg) else (_ANY_SIDE, _ANY_SIDE, 3)
    model = _model(cfg, shape, 2)
    with _named_as_in_config():
        _, client, *_ = models.cut_places(model, cfg.cut, cfg.tail_cut)
        if cfg.model.cut_before_activation:
            model.blocks[client - 1].without_activation()


def check_weights(cfg: config.Config) -> None:
    """Raises ValueError where `model.weights` are not there, or, of a decoder, not those of its config."""
    if cfg.model.weights is None:
        return
    if cfg.model.name == models.DECODER:
        _open_weights(cfg.model.weights, _model(cfg, (cfg.data.text_length,), 2))
    else:
        existing_file("model.weights", cfg.model.weights)


def _takes_tokens(cfg):
    return cfg.model.name in (*models.TOKEN_MODELS, models.DECODER)


_ANY_SIDE = 64  # of images that every model takes


def _num_outputs(cfg, summary):
    """How many outputs one of msjax's own models needs: one a class, or one a label; of a decoder, as it has tokens."""
    if cfg.model.name == models.DECODER:
        if cfg.task.name != "next_token" and not config.is_reference(cfg.task.name):
            raise ValueError(f"task.name must be 'next_token' for model.name='decoder', got {cfg.task.name!r}")
        return None
    if cfg.task.name == "classification":
        if summary.num_classes is None:
            raise ValueError("task.name must not be 'classification' where the labels of the data set are no classes")
        return summary.num_classes
    if cfg.task.name in ("regression", "multi_label") and len(summary.labels.leaves) == 1:
        return math.prod(summary.labels.leaves[0].shape)
    raise ValueError(
        f"model.name={cfg.model.name!r} has one output vector a sample, which task {cfg.task.name!r} has not"
    )


def make_mode(cfg: config.ModeConfig, *, seed: int = 0) -> Mode:
    """Returns the mode that a config names, with those of the config's fields that it has.

    Args:
      seed: of the draws of clients, where not all of them take part.
    """
    kind = MODES[cfg.kind]
    known = {field.name for field in dataclasses.fields(config.ModeConfig)}
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(kind) if field.name in known}
    # Without draws it is no part of the mode: runs of several seeds are then one to the compiler.
    return kind(**fields, seed=seed) if cfg.client_fraction < 1 else kind(**fields)


def make_task(cfg: config.Config, summary: DataSummary) -> tasks.Task:
    """Returns the task that a config names, or that its preset makes.

    Raises:
      ValueError: there is none of that name, or it does not fit the data.
    """
    name = cfg.task.name
    if config.is_reference(name):
        task = config.call_reference("task.name", name, summary)
        if not isinstance(task, tasks.Task):
            raise ValueError(f"task.name must name a function that returns a tasks.Task, got {type(task).__name__}")
        return task
    maker = tasks.TASKS[name]
    known = {
        "label_smoothing": cfg.optim.label_smoothing,
        "num_classes": summary.num_classes,
        "ignore": cfg.task.ignore,
    }
    options = {n: v for n, v in known.items() if n in inspect.signature(maker).parameters and v is not None}
    if cfg.optim.label_smoothing and "label_smoothing" not in options:
        raise ValueError(f"optim.label_smoothing must be 0 for task.name={name!r}, got {cfg.optim.label_smoothing}")
    return maker(**options)


def make_preprocess(cfg: config.Config, summary: DataSummary) -> Preprocess:
    """Returns what the client does to its inputs."""
    augment = cfg.data.augment or summary.augment
    if config.is_reference(augment):
        augment = config.resolve("data.augment", augment)
    dtype = "int32" if _takes_tokens(cfg) else cfg.dtype
    maximum = pixel_maximum(summary.inputs)
    return Preprocess(augment, summary.mean, summary.std, dtype, cfg.data.crop_padding, maximum)


def pixel_maximum(inputs: TreeSpec) -> float | None:
    """Returns what `data.normalize` divides by: a data set's mean and std are of pixels / 255, or of floats.

    None of all others: tokens are not divided, and whatever else there might be is refused.
    """
    dtypes = [leaf.dtype for leaf in inputs.leaves]
    return {np.dtype(np.uint8): 255.0, np.dtype(np.float32): 1.0}.get(dtypes[0]) if len(dtypes) == 1 else None


def load_data(cfg: config.Config, *, data_dir: str | None = None, cache_dir: str | None = None) -> data.Dataset:
    """Loads the data set of a config, or lets its preset make it; a directory given here goes before the config's.

    Raises:
      ValueError, data.DataError: it cannot be had.
    """
    if config.is_reference(cfg.data.name):
        if cfg.data.missing != "refuse":
            raise ValueError(
                f"data.missing must be 'refuse' where data.name is a function of a preset, which can fill values in "
                f"itself, got {cfg.data.missing!r}"
            )
        _refuse_streamed(cfg, "a function of a preset, which can return a data set that is streamed")
        return data.as_dataset(config.call_reference("data.name", cfg.data.name))
    if cfg.model.name == models.DECODER or cfg.data.name.endswith(".txt"):
        return _load_text(cfg, cache_dir)
    if cfg.data.test is not None:
        raise ValueError(f"data.test must be None for model.name={cfg.model.name!r}, got {cfg.data.test!r}")
    if config.is_local_path(cfg.data.name):
        return data.as_dataset(cfg.data.name, **_path_options(cfg.data))
    where = {"data_dir": data_dir or cfg.data.data_dir, "cache_dir": cache_dir or cfg.data.cache_dir}
    names = ("image_size", "text_length", "vocabulary", "missing", "drop", "test_share", "streamed")
    options = {name: getattr(cfg.data, name) for name in names}
    try:
        return data.load(cfg.data.name, **where, **options)
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        got = " and ".join(map(repr, where.values()))
        raise ValueError(
            f"data.data_dir and data.cache_dir must be given where the user has no home folder, got {got}"
        ) from None


def _refuse_streamed(cfg, what):
    if cfg.data.streamed:
        raise ValueError(f"data.streamed must be None or False where data.name is {what}, got True")


def _load_text(cfg, cache_dir):
    """Blocks of tokens; of a decoder such as it has."""
    _refuse_streamed(cfg, "a file of texts, which is read whole")
    if not cfg.data.name.endswith((".txt", ".csv")):
        raise ValueError(f"data.name must be a .txt or .csv for model.name='decoder', got {cfg.data.name!r}")
    if cfg.data.tokenizer is None:
        raise ValueError(f"data.tokenizer must be given for the texts of {cfg.data.name!r}, got None")
    described = decoder_config(cfg) if cfg.model.name == models.DECODER else None
    return data.from_text(
        cfg.data.name,
        cfg.data.test,
        tokenizer=cfg.data.tokenizer,
        length=cfg.data.text_length,
        column=cfg.data.text_column,
        start=described and described.bos_token_id,
        vocabulary=described and described.vocab_size,
        test_share=cfg.data.test_share,
        cache_dir=cache_dir or cfg.data.cache_dir,
    )


def _path_options(cfg):
    """Options for data of one's own, by what the path is of."""
    options = {"test_share": cfg.test_share, "missing": cfg.missing} | ({"drop": cfg.drop} if cfg.drop else {})
    if cfg.streamed is not None:
        options["streamed"] = cfg.streamed
    if cfg.name.endswith(".csv"):
        return options | {"label": cfg.label}
    if cfg.name.endswith(".npz"):
        return options | {"normalize": cfg.normalize}
    return options | {"image_size": cfg.image_size}


def divide(ds: data.Dataset, clients: int, *, alpha: float | None, seed: int) -> tuple[list[np.ndarray], int]:
    """Returns which training samples each client holds, and how many each draws in an epoch.

    Raises:
      ValueError: there are more clients than samples, or `alpha` does not fit.
    """
    if clients > len(ds.train):
        raise ValueError(f"clients must be in 1..{len(ds.train)} (the number of examples), got {clients}")
    # An even division needs no labels, which for a stream take a pass over the set.
    of = len(ds.train) if alpha is None else ds.train.labels()
    return data.partition(of, clients, alpha=alpha, seed=seed), len(ds.train) // clients


def batch_of_small_share(cfg: config.Config, samples: int) -> str | None:
    """Returns what there is to say where a client's share is smaller than a batch; None where it is not."""
    if samples >= cfg.batch_size:
        return None
    return f"batch_size is {cfg.batch_size}, but a client has {samples} samples an epoch: its batches have {samples}"

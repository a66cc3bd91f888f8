"""From a config to a network, its parts and their weights."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from msjax import config, models
from msjax.build._data import make_preprocess
from msjax.build._decoder import decoder_config, takes_tokens
from msjax.build._summary import DataSummary
from msjax.paths import existing_file, expand

log = logging.getLogger("msjax")


def make_parts(
    cfg: config.Config,
    summary: DataSummary,
    *,
    weights: str | None = None,
    own: Collection[str] = models.PARTS,
) -> tuple[models.ModelPart, ...]:
    """Builds the model and cuts it: into client and server, and where the run is U-shaped a tail.

    Args:
      weights: a file of the whole network's weights; by default they are drawn from the seed, as where shapes alone are
        of use.
      own: the parts, of "client", "server" and "tail", whose arrays are made and whose weights are read; the others
        have shapes and dtypes in their place.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """
    if config.is_reference(cfg.model.name):
        made = config.call_reference("model.name", cfg.model.name, summary, seed=cfg.seed)
        x = jax.eval_shape(make_preprocess(cfg, summary), summary.inputs.batch(2))
        cut = cfg.cut if isinstance(cfg.cut, int) else None
        if cut is not None and isinstance(made, tuple):
            log.warning("model.cut=%d is ignored: %s returns a model that is already in parts", cut, cfg.model.name)
            cut = None
        parts = models.as_parts(made, x, cut=cut, seed=cfg.seed)
        named = zip(models.PARTS, parts, strict=False)
        return tuple(part if name in own else part.shapes() for name, part in named)
    before = cfg.model.cut_before_activation
    model = make_model(cfg, summary)
    whole = None if weights is None else _open_weights(cfg, weights, model)
    options = {"tail_cut": cfg.tail_cut, "cut_before_activation": before, "seed": cfg.seed, "own": own}
    with _named_as_in_config():
        return models.split(model, cfg.cut, weights=whole, **options)


def may_be_negative(cfg: config.Config) -> bool:
    """Whether features below 0 cannot be ruled out, as they can where a network of msjax's is cut behind a ReLU."""
    model = cfg.model
    behind_relu = model.activation == "relu" and not model.cut_before_activation
    return not behind_relu or model.name not in models.NAMES or model.name == "transformer"


def _open_weights(cfg, weights, model):
    """The weights of a whole model; of a decoder they are read when they are used. What is trained is float32."""
    if model.name == models.DECODER:
        dtype = jnp.float32 if model == models.base(model) else model.dtype
        try:
            return models.open_decoder(expand("model.weights", weights), model, dtype)
        except ValueError as error:
            raise ValueError(f"model.weights: {error}") from None
    path = existing_file("model.weights", weights)
    return models.load_weights(path, model, new_head=cfg.model.new_head, seed=cfg.seed)


def make_model(cfg: config.Config, summary: DataSummary) -> models.Model:
    """Builds one of msjax's own models, whole; raises ValueError as `make_parts` does."""
    return _model(cfg, summary.input_shape, _num_outputs(cfg, summary))


def check_own_model(cfg: config.Config) -> None:
    """Raises ValueError for fields that say what a model of msjax's is, where the model is one's own.

    For new runs: those that are there were made without.
    """
    if not config.is_reference(cfg.model.name):
        return
    _check_not_set(cfg, (*_NOT_OF_DECODERS, *_OF_DECODERS, "cut_before_activation", "weights"))
    _check_no_adapters(cfg)
    if cfg.dtype != "float32":
        raise ValueError(
            f"dtype must be 'float32' for model.name={cfg.model.name!r}, whose layers have dtypes of their own, got "
            f"{cfg.dtype!r}"
        )


def _check_not_set(cfg, names):
    for name in names:
        value, default = getattr(cfg.model, name), getattr(config.ModelConfig, name)
        if value != default:
            raise ValueError(f"model.{name} must be {default!r} for model.name={cfg.model.name!r}, got {value!r}")


def _check_no_adapters(cfg):
    if cfg.lora.rank is not None:
        raise ValueError(f"lora.rank must be None for model.name={cfg.model.name!r}, got {cfg.lora.rank}")


def _model(cfg, input_shape, num_outputs):
    is_decoder = cfg.model.name == models.DECODER
    _check_not_set(cfg, _NOT_OF_DECODERS if is_decoder else _OF_DECODERS)
    if is_decoder:
        if len(input_shape) != 1:
            raise ValueError(f"data.name must be texts for model.name='decoder', got inputs of shape {input_shape}")
        with _named_as_in_config():
            options = {"dtype": jnp.dtype(cfg.dtype), "remat": cfg.model.remat, "lora": _lora(cfg)}
            return models.decoder(decoder_config(cfg), length=input_shape[0], **options)
    _check_no_adapters(cfg)
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
_NOT_OF_DECODERS = ("width", "activation", "first_block", "shortcut", "conv_init", "running_variance", "new_head")
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
    shape = (cfg.data.text_length,) if takes_tokens(cfg) else (_ANY_SIDE, _ANY_SIDE, 3)
    model = _model(cfg, shape, 2)
    with _named_as_in_config():
        _, client, *_ = models.cut_places(model, cfg.cut, cfg.tail_cut)
        if cfg.model.cut_before_activation:
            model.blocks[client - 1].without_activation()


_ANY_SIDE = 64  # of images that every model takes


def check_weights(cfg: config.Config) -> None:
    """Raises ValueError where `model.weights` are not there, or, of a decoder, not those of its config."""
    if cfg.model.weights is None:
        return
    if cfg.model.name == models.DECODER:
        _open_weights(cfg, cfg.model.weights, _model(cfg, (cfg.data.text_length,), 2))
        _check_beside_weights(decoder_config(cfg), expand("model.weights", cfg.model.weights) / "config.json")
    else:
        existing_file("model.weights", cfg.model.weights)


def _check_beside_weights(described, path):
    """Raises ValueError where the weights' own config.json says that something else is computed."""
    try:
        # As it would be kept: without what says nothing of this family.
        found = models.DecoderConfig.from_json(models.DecoderConfig.load(path).to_json())
    except ValueError:
        return  # the weights are without one, or with one of a kind that `model.decoder` takes the place of
    for field in dataclasses.fields(found):
        mine, theirs = (getattr(each, field.name) for each in (described, found))
        if mine != theirs and field.name not in _NOT_COMPUTED:
            raise ValueError(
                f"model.decoder must describe the network of model.weights, whose {path} has {field.name}={theirs!r}, "
                f"got {mine!r}: give the one that is right in both, or no model.decoder"
            )


_NOT_COMPUTED = ("max_position_embeddings", "bos_token_id", "eos_token_id", "tie_word_embeddings")
"""Fields of a decoder that say nothing of what is computed, or that the names of the weights are checked by."""


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
        if cfg.model.new_head:
            found["weights"] += ", but for the last layer"
    if cfg.model.name == models.DECODER:
        tree = decoder_config(cfg).to_json()
        if isinstance(ends := tree["eos_token_id"], tuple):  # nothing is computed with them
            tree["eos_token_id"] = ends[0]
        described = json.dumps(tree, sort_keys=True)
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
    return config.with_fields(cfg, {"model.weights": None})


def _num_outputs(cfg, summary):
    """How many outputs one of msjax's own models needs: one a class, or one a label; of a decoder, as it has tokens."""
    if cfg.model.name == models.DECODER:
        if cfg.task.name != "next_token" and not config.is_reference(cfg.task.name):
            raise ValueError(f"task.name must be 'next_token' for model.name='decoder', got {cfg.task.name!r}")
        return None
    if cfg.task.name == "classification":
        if summary.num_classes is None:
            raise ValueError(
                "task.name must not be 'classification' where the labels of the data set are no classes: it may be "
                "'regression', or a CSV's column of few integers or texts"
            )
        return summary.num_classes
    if cfg.task.name in ("regression", "multi_label") and len(summary.labels.leaves) == 1:
        return math.prod(summary.labels.leaves[0].shape)
    raise ValueError(
        f"model.name={cfg.model.name!r} has one output vector a sample, which task {cfg.task.name!r} has not"
    )

"""From a config and a summary of the data to the description of a run and its first state."""

import dataclasses
import inspect
from typing import NamedTuple

import jax

from msjax import config, models, tasks
from msjax.build._data import check_channels, check_classes, make_preprocess
from msjax.build._network import check_model, check_weights, make_parts
from msjax.build._summary import DataSummary
from msjax.compress import Identity
from msjax.optim import check_optimizer, make_optimizer
from msjax.split.early import warn_of_narrow
from msjax.split.make_spec import check_cut_budget, init_part, make_spec
from msjax.split.modes import MODES, Mode
from msjax.split.payloads import Codecs
from msjax.split.schedule import Schedule
from msjax.split.spec import RunSpec
from msjax.split.state import PartState


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
    own_tests: bool = False,
) -> Built:
    """Builds the model, cuts it, and describes the run of clients with `samples` training samples each.

    Args:
      parts: what `make_parts` made, if it was called already. A party whose parts have shapes and dtypes in place of
        arrays gets a state of these.
      client_values: see `make_spec`.
      own_tests: whether each client has `test_samples` of its own; see `Schedule`.

    Raises:
      ValueError: a field of the config has a value that does not fit.
    """
    parts = make_parts(cfg, summary, weights=cfg.model.weights) if parts is None else parts
    mode = make_mode(cfg.mode, seed=cfg.seed)
    counts = (cfg.clients, samples, test_samples, cfg.batch_size, cfg.epochs, cfg.test_every)
    schedule = Schedule(mode, *counts, u_shaped=len(parts) == 3, own_tests=own_tests)
    codec = Codecs.of(config.by_name(cfg.codec, cfg.array_codecs))
    optimizer = make_optimizer(cfg.optim, epochs=cfg.epochs, steps_per_epoch=schedule.epoch_steps)
    if config.is_reference(cfg.optim.kind):
        check_optimizer("optim.kind", optimizer, parts)
    spec = make_spec(
        parts,
        client_values=client_values,
        inputs=summary.inputs,
        labels=summary.labels,
        schedule=schedule,
        task=make_task(cfg, summary),
        optimizer=optimizer,
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
    return Built(spec, _state(spec.optimizer, client, *tail), _state(spec.optimizer, server))


def spec_of(cfg: config.Config, summary: DataSummary, *, test_samples: int) -> RunSpec:
    """Returns the description of a trained network's run, from shapes alone, without an optimizer of one's own."""
    if config.is_reference(cfg.optim.kind):
        cfg = config.with_fields(cfg, {"optim.kind": config.OptimConfig.kind})
    parts = jax.eval_shape(lambda: make_parts(cfg, summary))
    return build(cfg, summary, samples=cfg.batch_size, test_samples=test_samples, parts=parts).spec


def check_without_data(cfg: config.Config) -> None:
    """Raises ValueError for what no data could make right: names of classes, a model, a cut, weights, or a budget."""
    check_classes(cfg)
    check_channels(cfg)
    check_model(cfg)
    check_weights(cfg)
    codecs = Codecs.of(config.by_name(cfg.codec, cfg.array_codecs)), Codecs.of(cfg.grad_codec, "grad_codec")
    check_cut_budget(cfg.cut_bits, cfg.cut_seconds, cfg.link_bytes_per_second, *codecs)


def _state(optimizer, *parts):
    """What a party begins with that has these parts."""
    arrays = jax.tree.leaves([(part.params, part.stats) for part in parts])
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in arrays):
        return jax.eval_shape(lambda: init_part(optimizer, *parts))
    warn_of_narrow(parts)
    return init_part(optimizer, *parts)


def make_mode(cfg: config.ModeConfig, *, seed: int = 0) -> Mode:
    """Returns the mode that a config names, with those of the config's fields that it has.

    Args:
      seed: of the draws of clients, where not all of them take part.
    """
    kind = MODES[cfg.kind]
    known = {field.name for field in dataclasses.fields(config.ModeConfig)}
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(kind) if field.name in known}
    return kind(**fields).seeded(seed)


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
    if name == "segmentation" and "num_classes" not in options:
        where = f"the data set of {cfg.data.name} must have num_classes, as from_arrays(…, num_classes=…) gives it,"
        where = where if config.is_reference(cfg.data.name) else "data.classes must name the classes"
        raise ValueError(
            f"{where} for task.name='segmentation', as labels of every pixel do not say how many there are, got none"
        )
    return maker(**options)


def check_tail(cfg: config.Config, spec: RunSpec) -> None:
    """Raises ValueError where a network was to be U-shaped, so that labels stay with the clients, and is not."""
    if cfg.tail_cut is not None and not spec.u_shaped:
        raise ValueError(
            f"mode.tail_cut must be None where {cfg.model.name} returns no tail, got {cfg.tail_cut!r}: a U-shaped "
            "network of one's own is three parts"
        )

"""A config, its data and its run, as shapes and dtypes alone."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from msjax import build, config, data, models
from msjax.split.make_spec import init_part
from msjax.split.spec import RunSpec
from msjax.split.state import PartState
from msjax.split.trees import TreeSpec

UNKNOWN_STEPS = 100
"""Steps of a client that stand for an epoch where nobody says how many samples there are."""


class Counts(NamedTuple):
    """Examples of a data set, over all clients."""

    train: int
    test: int


class Run(NamedTuple):
    """A run as shapes and dtypes alone.

    Attributes:
      spec: its description.
      inputs: one sample as the data set stores it.
      parts: the state of each part before the first step, by name: client, server and, U-shaped, tail.
      client: that of a client with its tail.
    """

    spec: RunSpec
    inputs: TreeSpec
    parts: dict[str, PartState]
    client: PartState

    @property
    def batch_size(self) -> int:
        """Samples of a client in a step."""
        return self.spec.schedule.full_batch_size

    @property
    def clients(self) -> int:
        """How many clients take part in each step."""
        return len(self.spec.schedule.position(0).clients)


def describe_data(cfg: config.Config) -> tuple[build.DataSummary, Counts | None]:
    """Returns what the network has to know of a config's data and how many examples there are, None where nobody knows.

    Sets of images that are known by name and texts for a decoder need not be at hand. Others are loaded.
    """
    found = describe_known_data(cfg)
    return _described(cfg) if found is None else found


def describe_known_data(cfg: config.Config) -> tuple[build.DataSummary, Counts | None] | None:
    """As `describe_data`, but None where the data are not known by name and would have to be found."""
    if cfg.model.name == models.DECODER:
        tokens = TreeSpec.of(jax.ShapeDtypeStruct((cfg.data.text_length,), np.int32))
        return build.DataSummary(tokens, tokens), None
    if config.is_reference(cfg.data.name):
        return None
    known = data.published(cfg.data.name)
    if known is not None:
        side = cfg.data.image_size
        shape = known.shape if side is None else (side, side, known.shape[-1])
        inputs, labels = (TreeSpec.of(jax.ShapeDtypeStruct(*like)) for like in ((shape, np.uint8), ((), np.int32)))
        described = inputs, labels, known.num_classes, *_statistics(shape[-1]), data.default_augmentation(cfg.data.name)
        return build.DataSummary(*described), Counts(*known[2:])
    return _described(cfg) if data.is_embedded(cfg.data.name) else None


def describe_elsewhere(
    cfg: config.Config, input_shape: tuple[int, ...], num_classes: int | None = None
) -> build.DataSummary:
    """As `describe_data` of data that are not at hand: images in bytes, or rows of numbers, each with one label.

    Args:
      input_shape: of one example: (height, width, channels) of images, (columns,) of rows.
      num_classes: where the task is classification.

    Raises:
      ValueError: there are no such data, or the task has other labels.
    """
    if len(input_shape) not in (1, 3) or min(input_shape) < 1:
        raise ValueError(f"input_shape must be height, width and channels, or a number of columns, got {input_shape}")
    if (task := cfg.task.name) not in ("classification", "regression"):
        raise ValueError(f"input_shape must go with task.name 'classification' or 'regression', got {task!r}")
    if (num_classes is None) != (task == "regression"):
        needs = "be given for" if num_classes is None else "not be given for"
        raise ValueError(f"num_classes must {needs} task.name={task!r}, got {num_classes}")
    dtype, channels = (np.uint8, input_shape[-1]) if len(input_shape) == 3 else (np.float32, None)
    inputs = TreeSpec.of(jax.ShapeDtypeStruct(input_shape, dtype))
    labels = TreeSpec.of(jax.ShapeDtypeStruct((), np.float32 if num_classes is None else np.int32))
    return build.DataSummary(inputs, labels, num_classes, *_statistics(channels)).normalized_as(cfg.data)


def _statistics(channels):
    """Mean and deviation of inputs with so many channels: their number is all that counts here."""
    return (None, None) if channels is None else ((0.5,) * channels, (0.25,) * channels)


def _described(cfg):
    ds = build.load_data(cfg)
    return build.DataSummary.of(ds).normalized_as(cfg.data), Counts(len(ds.train), len(ds.test))


def describe_run(
    cfg: config.Config, summary: build.DataSummary, counts: Counts | None, *, own_data: bool = False
) -> Run:
    """Returns the description of a run on such data; where there are no counts an epoch is of a hundred steps a client.

    Args:
      own_data: whether each client has so many of its own, in place of a share of them.

    Raises:
      ValueError: the config does not work, or there are more clients than samples.
    """
    sharing = 1 if own_data else cfg.clients
    if counts is not None and counts.train < sharing:
        raise ValueError(f"clients must be in 1..{counts.train} (the number of examples), got {cfg.clients}")
    parts = jax.eval_shape(lambda: build.make_parts(cfg, summary))
    samples = UNKNOWN_STEPS * cfg.batch_size if counts is None else counts.train // sharing
    test_samples = 0 if counts is None else counts.test
    built = build.build(cfg, summary, samples=samples, test_samples=test_samples, parts=parts, own_tests=own_data)
    build.check_tail(cfg, built.spec)
    states = (jax.eval_shape(functools.partial(init_part, built.spec.optimizer), part) for part in parts)
    by_name = dict(zip(("client", "server", "tail"), states, strict=False))
    return Run(built.spec, summary.inputs, by_name, built.client)

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
        statistics = ((0.5,) * shape[-1], (0.25,) * shape[-1])  # of the right number, which is all that counts here
        augment = data.default_augmentation(cfg.data.name)
        return build.DataSummary(inputs, labels, known.num_classes, *statistics, augment), Counts(*known[2:])
    return _described(cfg) if data.is_embedded(cfg.data.name) else None


def _described(cfg):
    ds = build.load_data(cfg)
    return build.DataSummary.of(ds).normalized_as(cfg.data), Counts(len(ds.train), len(ds.test))


def describe_run(cfg: config.Config, summary: build.DataSummary, counts: Counts | None) -> Run:
    """Returns the description of a run on such data; where there are no counts an epoch is of a hundred steps a client.

    Raises:
      ValueError: the config does not work, or there are more clients than samples.
    """
    if counts is not None and counts.train < cfg.clients:
        raise ValueError(f"clients must be in 1..{counts.train} (the number of examples), got {cfg.clients}")
    parts = jax.eval_shape(lambda: build.make_parts(cfg, summary))
    samples = UNKNOWN_STEPS * cfg.batch_size if counts is None else counts.train // cfg.clients
    test_samples = 0 if counts is None else counts.test
    built = build.build(cfg, summary, samples=samples, test_samples=test_samples, parts=parts)
    build.check_tail(cfg, built.spec)
    states = (jax.eval_shape(functools.partial(init_part, built.spec.optimizer), part) for part in parts)
    by_name = dict(zip(("client", "server", "tail"), states, strict=False))
    return Run(built.spec, summary.inputs, by_name, built.client)

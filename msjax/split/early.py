"""Data that a task cannot take, and parts that cannot be trained well: told before the first step."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msjax import data
from msjax.split.spec import RunSpec

log = logging.getLogger("msjax")


def check_labels(spec: RunSpec, dataset: data.Dataset) -> None:
    """Raises ValueError where labels in memory are not such as the task takes, or tokens to predict the inputs."""
    if spec.task.name == "next_token" and len(dataset.train):
        _check_shifted(*dataset.train.fetch(np.arange(min(_SAMPLES, len(dataset.train)))), dataset.name)
    if spec.task.check_labels is None:
        return
    outputs = spec.outputs if spec.tail_outputs is None else spec.tail_outputs
    like = jax.tree.unflatten(outputs.structure, outputs.leaves)
    for name, split in (("training", dataset.train), ("test", dataset.test)):
        if split.in_memory and len(split):
            try:
                spec.task.check_labels(jax.tree.map(np.asarray, split.labels()), like)
            except ValueError as error:
                raise ValueError(f"{name} data of {dataset.name!r}: {error}") from None
        elif name == "training" and dataset.num_classes is not None and not dataset.label_like.shape:
            try:
                spec.task.check_labels(np.asarray([dataset.num_classes - 1], np.int32), like)
            except ValueError as error:
                raise ValueError(f"num_classes of {dataset.name!r} is {dataset.num_classes}, but {error}") from None


_SAMPLES = 8


def _check_shifted(inputs, labels, name):
    """Raises ValueError where the tokens to predict are those of the inputs, as transformers' own models take them."""
    labels = np.asarray(labels)
    counts = labels >= 0
    for tokens in jax.tree.leaves(inputs):
        if np.shape(tokens) != labels.shape or labels.ndim != 2 or not counts.any():
            continue
        copied = (tokens == labels)[counts].all()
        if copied and not (tokens[:, 1:] == labels[:, :-1])[counts[:, :-1]].all():  # not one token over and over
            raise ValueError(
                f"training data of {name!r}: labels must be the tokens behind those of the inputs for the task "
                "next_token, got the inputs themselves: labels[:, :-1] = inputs[:, 1:] and labels[:, -1] = -100"
            )


def warn_of_narrow(parts: Any) -> None:
    """Logs a warning where what is trained has fewer bits than float32: small updates are then rounded away."""
    dtypes = {jnp.dtype(leaf.dtype) for part in parts for leaf in jax.tree.leaves(part.params)}
    if narrow := sorted(dtype.name for dtype in dtypes if dtype.itemsize < 4):
        log.warning(
            "parameters are %s, in which small updates are lost: give them as float32, as by "
            "models.load_decoder(folder, model, jnp.float32), and the model a dtype to compute in",
            narrow[0],
        )

"""From a config to its data, and to what a client does to them."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from msjax import config, data, models
from msjax.build._decoder import decoder_config, takes_tokens
from msjax.build._summary import DataSummary, pixel_maximum
from msjax.split.spec import Preprocess
from msjax.split.trees import TreeSpec


def load_data(cfg: config.Config, *, data_dir: str | None = None, cache_dir: str | None = None) -> data.Dataset:
    """Loads the data set of a config, or lets its preset make it; a directory given here goes before the config's.

    Raises:
      ValueError, data.DataError: it cannot be had.
    """
    check_classes(cfg)
    check_channels(cfg)
    if config.is_reference(cfg.data.name):
        if cfg.data.missing != "refuse":
            raise ValueError(
                f"data.missing must be 'refuse' where data.name is a function of a preset, which can fill values in "
                f"itself, got {cfg.data.missing!r}"
            )
        _refuse_streamed(cfg, "a function of a preset, which can return a data set that is streamed")
        return data.as_dataset(config.call_reference("data.name", cfg.data.name))
    if cfg.model.name == models.DECODER or cfg.data.name.lower().endswith(data.TEXT_SUFFIXES):
        return _load_text(cfg, cache_dir)
    if cfg.data.test is not None:
        raise ValueError(
            f"data.test must be None for model.name={cfg.model.name!r}, got {cfg.data.test!r}: what is tested on is in "
            f"the same folder or file, such as a folder's train/ and test/ or val/"
        )
    if config.is_local_path(cfg.data.name):
        options = _path_options(cfg.data)
        if cfg.data.name.lower().endswith(".csv") and cfg.task.name in _CLASSES_OF_TABLES:
            options.setdefault("classes", _CLASSES_OF_TABLES[cfg.task.name])
        found = data.as_dataset(pathlib.Path(cfg.data.name), **options)
        _check_gaps(cfg, found)
        return found
    if cfg.data.classes:
        raise ValueError(
            "data.name must be an .npz or CSV file or a folder of images that is there where data.classes names "
            f"classes, got {cfg.data.name!r}"
        )
    where = {"data_dir": data_dir or cfg.data.data_dir, "cache_dir": cache_dir or cfg.data.cache_dir}
    names = ("image_size", "text_length", "vocabulary", "missing", "drop", "test_share", "streamed")
    options = {name: getattr(cfg.data, name) for name in names}
    try:
        found = data.load(cfg.data.name, **where, **options)
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        got = " and ".join(map(repr, where.values()))
        raise ValueError(
            f"data.data_dir and data.cache_dir must be given where the user has no home folder, got {got}"
        ) from None
    _refuse_channels(cfg)
    return found


_CLASSES_OF_TABLES = {"classification": "integers", "regression": False}
"""By task, which labels of a table are numbered as classes; see `data.from_csv`."""
_MOST_GAPS = 10
"""As many times the classes as there are different labels are a mistake, such as the numbers of users."""


def _check_gaps(cfg, ds):
    """Raises where labels are no numbers of classes: a network would be made with as many outputs."""
    if cfg.task.name != "classification" or cfg.data.classes or ds.num_classes is None or not ds.train.in_memory:
        return
    different = len(np.unique(ds.train.labels()))
    if ds.num_classes > max(_MOST_GAPS * different, 1000):
        raise data.DataError(
            f"labels of {ds.name} must be numbers of classes, from 0 on, got {different:,} different ones up to "
            f"{ds.num_classes - 1:,}: number them anew, name the classes by data.classes, or set task.name=regression"
        )


def check_classes(cfg: config.Config) -> None:
    """Raises ValueError where names of classes are given for what has none; what is in a folder is not looked at."""
    if not cfg.data.classes:
        return
    if cfg.task.name not in ("classification", "segmentation") and not config.is_reference(cfg.task.name):
        raise _classes_error(cfg, f"task.name={cfg.task.name!r}")
    name = cfg.data.name
    if config.is_reference(name) or data.is_known(name) or name.lower().endswith(data.TEXT_SUFFIXES):
        raise _classes_error(cfg, f"data.name={cfg.data.name!r}")


def _classes_error(cfg, where):
    return ValueError(
        f"data.classes must be () with {where}, got {cfg.data.classes}: they name classes in an .npz or CSV file or a "
        "folder of images"
    )


def _refuse_streamed(cfg, what):
    if cfg.data.streamed:
        raise ValueError(f"data.streamed must be None or False where data.name is {what}, got True")


def _load_text(cfg, cache_dir):
    """Blocks of tokens; of a decoder such as it has."""
    _refuse_streamed(cfg, "a file of texts, which is read whole")
    for name in ("name", "test"):
        value = getattr(cfg.data, name)
        if value is not None and not value.lower().endswith((*data.TEXT_SUFFIXES, ".csv")):
            known = ", ".join(data.TEXT_SUFFIXES)
            raise ValueError(
                f"data.{name} must be the path of a text, a {known} or .csv file, for "
                f"model.name={cfg.model.name!r}, got {value!r}"
            )
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
    options = {"test_share": cfg.test_share, "missing": cfg.missing}
    options |= {name: value for name in ("drop", "classes") if (value := getattr(cfg, name))}
    if cfg.streamed is not None:
        options["streamed"] = cfg.streamed
    if cfg.name.lower().endswith(".csv"):
        return options | {"label": cfg.label}
    if cfg.name.lower().endswith(".npz"):
        return options | {"normalize": cfg.normalize}
    return options | {"image_size": cfg.image_size, "channels": cfg.channels}


def check_channels(cfg: config.Config) -> None:
    """Raises ValueError for `data.channels` of data that are surely no folder of images."""
    name = cfg.data.name.lower()
    if config.is_reference(cfg.data.name) or name.endswith(data.FILE_SUFFIXES) or data.is_known(cfg.data.name):
        _refuse_channels(cfg)


def _refuse_channels(cfg):
    if cfg.data.channels is not None:
        raise ValueError(
            f"data.channels must be None where data.name is no folder of images, got {cfg.data.channels} with "
            f"{cfg.data.name!r}"
        )


def make_preprocess(cfg: config.Config, summary: DataSummary) -> Preprocess:
    """Returns what the client does to its inputs."""
    augment = cfg.data.augment or summary.augment
    if config.is_reference(augment):
        augment = config.resolve("data.augment", augment)
    dtype = "int32" if takes_tokens(cfg) else cfg.dtype
    maximum = pixel_maximum(summary.inputs)
    return Preprocess(augment, summary.mean, summary.std, dtype, cfg.data.crop_padding, maximum)


def divide(
    ds: data.Dataset, clients: int, *, alpha: float | None, seed: int, division: Sequence[Any] | None = None
) -> tuple[list[np.ndarray], int]:
    """Returns which training samples each client holds, int32, and how many each draws in an epoch.

    Args:
      alpha: Dirichlet concentration of a label-skewed division; None for an even one.
      seed: chooses who holds what.
      division: in place of both, the indices that each client holds.

    Raises:
      ValueError: there are more clients than samples, or `alpha` or `division` does not fit.
    """
    if division is not None:
        return _checked_division(division, len(ds.train), clients, alpha)
    if clients > len(ds.train):
        raise ValueError(f"clients must be in 1..{len(ds.train)} (the number of examples), got {clients}")
    if alpha is not None and len(TreeSpec.of(ds.label_like).leaves) != 1:
        what = "alpha must be None where labels are several arrays"
        raise ValueError(f"{what}, got {alpha}: give msjax.train division= in its place")
    # An even division needs no labels, which for a stream take a pass over the set.
    of = len(ds.train) if alpha is None else ds.train.labels()
    return data.partition(of, clients, alpha=alpha, seed=seed), len(ds.train) // clients


def shares(cfg: config.Config, ds: data.Dataset) -> tuple[list[np.ndarray], int]:
    """As `divide`, as a config says.

    Raises:
      ValueError: see `divide`; or its preset's function cannot be called.
    """
    division = cfg.data.division
    if division is not None:
        division = config.call_reference("data.division", division, ds, cfg.clients, seed=cfg.seed)
    return divide(ds, cfg.clients, alpha=cfg.data.alpha, seed=cfg.seed, division=division)


def _checked_division(division, count, clients, alpha):
    """What `divide` returns, of a user's own division of so many samples."""
    if alpha is not None:
        raise ValueError(f"alpha must be None with a division, got {alpha}")
    if not isinstance(division, Iterable):
        raise ValueError(f"division must have the samples of each of {clients} clients, got {division!r}")
    shares = [np.asarray(own) for own in division]
    if len(shares) != clients:
        raise ValueError(f"division must have the samples of each of {clients} clients, got those of {len(shares)}")
    for client, own in enumerate(shares):
        if own.ndim != 1 or own.dtype.kind not in "iu" or not own.size:
            found = f"{own.dtype} {own.shape}" if own.size else "none"
            raise ValueError(
                f"division must have integers (n,) of each client, one at least, got {found} of client {client}"
            )
        if own.min() < 0 or own.max() >= count:
            raise ValueError(
                f"division must have indices in 0..{count - 1}, got {own.min()} to {own.max()} of client {client}"
            )
    everyone = np.concatenate(shares)
    numbers, times = np.unique(everyone, return_counts=True)
    if times.max() > 1:
        raise ValueError(f"division must have each sample once, got the index {numbers[times.argmax()]} twice")
    return [own.astype(np.int32) for own in shares], everyone.size // clients


def batch_of_small_share(cfg: config.Config, samples: int) -> str | None:
    """Returns what there is to say where a client's share is smaller than a batch; None where it is not."""
    if samples >= cfg.batch_size:
        return None
    return f"batch_size is {cfg.batch_size}, but a client has {samples} samples an epoch: its batches have {samples}"

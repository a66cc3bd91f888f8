"""Data sets as arrays or streams, their division among clients, and augmentation on the device.

    ds = data.load("cifar10", data_dir="tfds")                       # arrays, decoded once and cached
    client_indices = data.partition(ds.train_labels, num_clients=10)  # who holds which examples
    order = data.epoch_indices(client_indices, 5000, seed=0, epoch=0)  # [client, example]
    images = data.augment(ds.train_inputs[order[:, :25]][0], key, kind="crop_flip")   # inside jit
    x = data.normalize(images, ds.mean, ds.std)

Texts come as tokens, tables as columns; `normalize` takes all of them.
A user's own data come by `from_arrays`, `from_npz`, `from_csv`, `from_image_folder` or `from_sequence`; `as_dataset`
chooses among them. `from_text` makes blocks of tokens for language models.

A `Dataset` has two `Split`s, `train` and `test`, in memory (`Arrays`) or streamed (`ImageStream`, or one of items that
are read when they are asked for); `batches` reads either kind with the same loop. What is streamed is read ahead with
grain, by worker processes where that pays (`Reader`). TensorFlow is never needed.
"""

from msjax.data._arrays import from_arrays, from_npz
from msjax.data._as_dataset import FILE_SUFFIXES, as_dataset, holds_images, is_path
from msjax.data._augment import AUGMENTATIONS, CROP_PADDING, augment, crop_flip, normalize
from msjax.data._batches import batches
from msjax.data._clients import epoch_indices, epoch_order, partition
from msjax.data._columns import Column, Missing, column_statistics, table_inputs
from msjax.data._csv import from_csv
from msjax.data._dataset import Arrays, Dataset, Split, digests
from msjax.data._error import DataError
from msjax.data._folder import from_image_folder
from msjax.data._inputs import Inputs, read_inputs, standardized_inputs
from msjax.data._load import load
from msjax.data._reader import Read, Reader
from msjax.data._records import TEXT_LENGTH, VOCABULARY
from msjax.data._registry import Published, default_augmentation, is_embedded, is_known, is_streamed, published
from msjax.data._sequence import from_sequence
from msjax.data._stream import ImageStream, stream
from msjax.data._table import TableFormat
from msjax.data._text import Texts, from_text, load_tokenizer, read_texts, start_token, tokens_of
from msjax.data._text_sources import TEXT_SUFFIXES
from msjax.data._words import TOKENIZER

__all__ = [
    "AUGMENTATIONS",
    "CROP_PADDING",
    "FILE_SUFFIXES",
    "TEXT_LENGTH",
    "TEXT_SUFFIXES",
    "TOKENIZER",
    "VOCABULARY",
    "Arrays",
    "Column",
    "DataError",
    "Dataset",
    "ImageStream",
    "Inputs",
    "Missing",
    "Published",
    "Read",
    "Reader",
    "Split",
    "TableFormat",
    "Texts",
    "as_dataset",
    "augment",
    "batches",
    "column_statistics",
    "crop_flip",
    "default_augmentation",
    "digests",
    "epoch_indices",
    "epoch_order",
    "from_arrays",
    "from_csv",
    "from_image_folder",
    "from_npz",
    "from_sequence",
    "from_text",
    "holds_images",
    "is_embedded",
    "is_known",
    "is_path",
    "is_streamed",
    "load",
    "load_tokenizer",
    "normalize",
    "partition",
    "published",
    "read_inputs",
    "read_texts",
    "standardized_inputs",
    "start_token",
    "stream",
    "table_inputs",
    "tokens_of",
]

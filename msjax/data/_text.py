"""Texts as blocks of tokens of a language model's tokenizer."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from msjax.data import _cache
from msjax.data._check import check
from msjax.data._csv import read_frame
from msjax.data._dataset import Arrays, Dataset
from msjax.data._error import DataError

TEXT_SUFFIXES = (".txt", ".jsonl")
"""Of files that hold texts; a .csv may hold some, too."""
_TOGETHER = 1 << 20  # characters that are tokenized at a time, or one text that is longer


def from_text(
    train: Any,
    test: Any = None,
    *,
    tokenizer: str | os.PathLike,
    length: int,
    column: str = "text",
    start: int | None = None,
    vocabulary: int | None = None,
    test_share: float | None = 0.2,
    cache_dir: str | os.PathLike | None = None,
    name: str | None = None,
) -> Dataset:
    """Make a data set of texts for a language model: blocks of tokens, and for each token the one behind it.

    Each text begins with the token `start`, if there is one. All are put one behind the other and cut into blocks of
    `length` tokens: inputs int32 (N, length), labels int32 (N, length), shifted by one. Blocks are full, so nothing is
    padded or masked; the last tokens, too few for a block, are left out. A block may begin within a text and reach into
    the next one. Tokens are found once and then kept in the array cache, under a hash of the texts and the tokenizer.

    Args:
        train, test: the path of a .txt file in UTF-8, which is one text; of a .jsonl, each line of which is a text or
            an object with one; of a .csv with a column of texts (needs pandas); a table with such a column, as a
            pandas.DataFrame or a dict of lists; or anything with `__len__` and `__getitem__` whose items are texts, or
            dicts with a text, such as Hugging Face's data sets.
        tokenizer: a tokenizer.json, or a folder that has one.
        length: of a block, in tokens: at most the model's context.
        column: of a table, or of dicts: what has the text.
        start: the token in front of each text. By default `bos_token_id` of the config.json beside the tokenizer, or
            none where there is no such file. What the tokenizer itself would put around a text is left out.
        vocabulary: how many tokens the model has; the tokenizer must have no others.
        test_share: without `test`: this part of the blocks, the last ones, is set aside; None: nothing.
        cache_dir: where tokens are kept; by default as of `load`.
        name: for messages and records; by default the file's.

    Raises:
        DataError: a file cannot be read or has no text, a text is none, there are too few tokens for a block, the
            tokenizer cannot be read, has tokens that the model has not or cannot split a text, or a package is missing.
    """
    if type(length) is not int or length < 1:
        raise DataError(f"length must be a positive integer, the tokens of a block, got {length!r}")
    if test_share is not None and not 0 < test_share < 1:
        raise DataError(f"test_share must be above 0 and below 1, or None, got {test_share}")
    path = _tokenizer_path(tokenizer)
    start = _start(path) if start is None else start
    found = load_tokenizer(path, start=start, vocabulary=vocabulary)
    if name is None:
        name = Path(train).name if isinstance(train, str | os.PathLike) else "text"
    splits = {"train": _blocks("train", _tokens("train", train, column, found, start, cache_dir), length)}
    if test is not None:
        splits["test"] = _blocks("test", _tokens("test", test, column, found, start, cache_dir), length)
    else:
        inputs, labels = splits["train"]
        if test_share is not None and len(inputs) < 2:
            raise DataError(f"train must have 2 blocks of {length} tokens where test_share is given, got 1")
        aside = 0 if test_share is None else min(len(inputs) - 1, max(1, round(test_share * len(inputs))))
        kept = len(inputs) - aside
        splits = {"train": (inputs[:kept], labels[:kept]), "test": (inputs[kept:], labels[kept:])}
    splits = {role: Arrays(*blocks) for role, blocks in splits.items()}
    return check(Dataset(name, **splits, num_classes=None, mean=None, std=None, tokenizer=_digest(path, start)))


class Texts(NamedTuple):
    """Texts as tokens, to predict from.

    Attributes:
        names: of each text: the file and the number of its line, from 1 on.
        tokens: int32 (T,) of each.
        decode: from tokens to the text that they are.
        tokenizer: what split them, as of `Dataset.tokenizer`.
    """

    names: list[str]
    tokens: list[np.ndarray]
    decode: Callable[[list[int]], str]
    tokenizer: str


def read_texts(
    path: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike,
    column: str = "text",
    start: int | None = None,
    vocabulary: int | None = None,
) -> Texts:
    """Read the texts of a .txt, one a line, or of a .csv or .jsonl, one a row; each begins with the token `start`.

    Args and errors as of `from_text`; blank lines are passed over.

    Raises:
        DataError: also where there is no text.
    """
    file = _tokenizer_path(tokenizer)
    start = _start(file) if start is None else start
    found = load_tokenizer(file, start=start, vocabulary=vocabulary)
    texts = _texts("inputs", path, column)
    rows, lines = texts.rows if isinstance(texts, _Items) else None, list(_each(texts))
    if Path(path).suffix.lower() == ".txt":
        lines = lines[0].splitlines()
    numbered = zip(rows or range(1, len(lines) + 1), lines, strict=True)
    kept = [(f"{path}:{row}", line) for row, line in numbered if line.strip()]
    if not kept:
        raise DataError(f"inputs must have text, got none in {os.fspath(path)!r}")
    tokens = list(_encoded(found, [line for _, line in kept], start))
    return Texts([name for name, _ in kept], tokens, found.decode, _digest(file, start))


def load_tokenizer(tokenizer: str | os.PathLike, *, start: int | None = None, vocabulary: int | None = None) -> Any:
    """Return the tokenizer of a file, of the package tokenizers; it neither cuts nor pads texts.

    Args:
        tokenizer: a tokenizer.json, or a folder that has one.
        start: a token that must be one of the model's, too.
        vocabulary: how many tokens the model has; the tokenizer must have no others.

    Raises:
        DataError: it cannot be read or has tokens that the model has not, or the package is missing.
    """
    path = _tokenizer_path(tokenizer)
    found = _tokenizer(path)
    _check_vocabulary(path, found, start, vocabulary)
    return found


def _tokenizers() -> ModuleType:
    """The package, or a DataError that says how to get it."""
    try:
        import tokenizers
    except ImportError as error:
        raise DataError("texts need tokenizers, which is not installed: pip install 'msjax[lm]'") from error
    return tokenizers


def _tokenizer_path(tokenizer: str | os.PathLike) -> Path:
    path = Path(tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"tokenizer must be a tokenizer.json, or a folder that has one, got {os.fspath(tokenizer)!r}")
    return path


def _tokenizer(path: Path) -> Any:
    """What it reads of a file, without cutting and padding texts."""
    package = _tokenizers()
    try:
        found = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise DataError(f"{path} must be a tokenizer.json that the package tokenizers reads: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found


def _digest(path: Path, start: int | None) -> str:
    """A hash of what a tokenizer makes of texts: its file without how texts would be cut and padded, and `start`."""
    tree = json.loads(path.read_text("utf-8"))
    tree = {name: value for name, value in tree.items() if name not in ("truncation", "padding")}
    return "sha256:" + hashlib.sha256(json.dumps([tree, start], sort_keys=True).encode()).hexdigest()[:16]


def _start(path: Path) -> int | None:
    """The token with which texts begin, as the config.json beside a tokenizer says it."""
    beside = path.parent / "config.json"
    if not beside.is_file():
        return None
    try:
        return json.loads(beside.read_text("utf-8")).get("bos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{beside} cannot be read for bos_token_id ({error}): give start") from error


def _check_vocabulary(path: Path, tokenizer: Any, start: Any, vocabulary: int | None) -> None:
    """Every token must be one of the model's."""
    if start is not None and (type(start) is not int or start < 0):
        raise DataError(f"start must be a token, an integer of at least 0, got {start!r}")
    if not tokenizer.get_vocab_size(with_added_tokens=True):
        raise DataError(f"tokenizer must have tokens, got none in {path}")
    if vocabulary is None:
        return
    word, most = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if most >= vocabulary:
        raise DataError(
            f"tokenizer must have tokens in 0..{vocabulary - 1}, as the model has, got {most} ({word!r}) in {path}"
        )
    if start is not None and start >= vocabulary:
        raise DataError(f"start must be a token in 0..{vocabulary - 1}, as the model has, got {start}")


def _texts(role: str, source: Any, column: str) -> Sequence[str]:
    """The texts of a file, a table or a sequence."""
    if not isinstance(source, str | os.PathLike):
        return _Items(role, _column(role, source, column), column)
    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if kind not in (*TEXT_SUFFIXES, ".csv"):
        known = ", ".join(TEXT_SUFFIXES)
        raise DataError(
            f"{role} must be a {known} or .csv file, got {str(path)!r}: rename it, or give what reads its texts"
        )
    if kind == ".csv":
        return _Items(role, _column(str(path), read_frame(path), column), column)
    text = _read(role, path)
    if kind == ".txt":
        return [text]
    rows, objects = _objects(path, text)
    return _Items(role, objects, column, rows)


def _column(where: str, source: Any, column: str) -> Any:
    """The texts of a table, or of a column of one, as a list; anything else as it is."""
    if isinstance(source, Mapping) or hasattr(source, "columns"):
        names = list(source if isinstance(source, Mapping) else getattr(source, "column_names", source.columns))
        if names.count(column) != 1:
            known = ", ".join(map(str, names))
            raise DataError(f"column must be one of {where}, which has {known}, got {column!r}")
        source = source[column]
        if isinstance(source, str | bytes):
            raise DataError(f"{where} must have a sequence of texts in column {column!r}, got one text")
    # A column's own index may not be 0, 1, 2, …
    for name in ("to_list", "to_pylist"):
        if hasattr(source, name):
            return getattr(source, name)()
    return source


def _objects(path: Path, text: str) -> tuple[list[int], list[Any]]:
    """The numbers of the lines of a .jsonl that are not blank, and what these lines are."""
    rows, found = [], []
    for row, line in enumerate(text.split("\n"), 1):  # JSON may have other ends of lines within a text
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} must have JSON in each line, got {line[:40]!r} in line {row}: {error}") from None
        rows.append(row)
    return rows, found


def _read(role: str, path: Path) -> str:
    """The text of a file."""
    try:
        return path.read_text("utf-8-sig" if path.suffix.lower() == ".jsonl" else "utf-8")
    except OSError as error:
        raise DataError(f"{role} must be a file that can be read, got {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be text in UTF-8: {error}") from error


class _Items(Sequence[str]):
    """The texts of a sequence's items; `rows` are their lines in a file, where they have some."""

    def __init__(self, role: str, items: Any, column: str, rows: list[int] | None = None):
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(f"{role} must be a path, or have __len__ and __getitem__, got {type(items).__name__}")
        self._role, self._items, self._column, self.rows = role, items, column, rows

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> str:
        item = self._items[index]
        if isinstance(item, dict):
            if self._column not in item:
                known = ", ".join(map(str, item))
                raise DataError(f"column must be one of {self._role}, which has {known}, got {self._column!r}")
            item = item[self._column]
        if isinstance(item, bytes):
            item = item.decode("utf-8", "replace")
        if not isinstance(item, str):
            raise DataError(f"{self._role} must have texts, got {item!r} at index {index}")
        return item


def _tokens(
    role: str, source: Any, column: str, tokenizer: Any, start: int | None, cache_dir: str | os.PathLike | None
) -> np.ndarray:
    """int32 (T,): all texts one behind the other, from the cache where it has them."""
    texts = _texts(role, source, column)
    digest = hashlib.sha256(f"{_tokenizers().__version__} {start} {tokenizer.to_str()}".encode())
    characters = 0
    for text in _each(texts):
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        characters += len(text)
    if not characters:
        raise DataError(f"{role} must have text, got none in {_described(source)}")
    entry = _cache.directory(cache_dir) / f"tokens-{digest.hexdigest()[:32]}"
    try:
        found = _cache.read(entry)
    except _cache.Damaged:
        found = None
    if found is None:
        parts = [part for group in _groups(texts) for part in _encoded(tokenizer, group, start)]
        with _cache.writing(entry) as draft:
            out = draft.array("tokens", (sum(map(len, parts)),), np.int32)
            np.concatenate(parts, out=out)
            draft.meta = {"name": role, "digest": digest.hexdigest(), "source": _described(source)}
        found = _cache.read(entry)
    if found is None:
        raise DataError(f"the array cache {entry} cannot be read after it was written; try another cache_dir")
    return found[0]["tokens"]


def _each(texts: Sequence[str]) -> Iterator[str]:
    """In order; some that have a length do not say where they end."""
    return (texts[i] for i in range(len(texts)))


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Lists of some texts each, to be tokenized on all cores."""
    group: list[str] = []
    characters = 0
    for text in _each(texts):
        group.append(text)
        characters += len(text)
        if characters >= _TOGETHER:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _encoded(tokenizer: Any, texts: list[str], start: int | None) -> Iterable[np.ndarray]:
    """The tokens of each text."""
    first = [] if start is None else [start]
    try:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the package raises nothing more special
        raise DataError(f"tokenizer must be able to split every text, but: {error}") from error
    for found in encoded:
        yield np.asarray([*first, *found.ids], np.int32)


def tokens_of(tokenizer: Any, text: str, *, start: int | None = None) -> list[int]:
    """Return the tokens of a text, behind the token `start`, if there is one.

    Raises:
        DataError: the tokenizer cannot split it, as one of words that has no token for unknown ones.
    """
    (found,) = _encoded(tokenizer, [text], start)
    return found.tolist()


def _blocks(role: str, tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels, which share memory."""
    count = (len(tokens) - 1) // length
    if count < 1:
        raise DataError(f"{role} must have {length + 1} tokens for a block of {length}, got {len(tokens)}")
    return tuple(tokens[at : at + count * length].reshape(count, length) for at in (0, 1))


def _described(source: Any) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__

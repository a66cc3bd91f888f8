"""Texts as blocks of tokens of a language model's tokenizer."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from msjax.data import _cache
from msjax.data._check import check
from msjax.data._dataset import Arrays, Dataset
from msjax.data._error import DataError
from msjax.data._text_sources import Items, described, each, lines_of, texts_of

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
    start = start_token(path) if start is None else start
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
    start = start_token(file) if start is None else start
    found = load_tokenizer(file, start=start, vocabulary=vocabulary)
    texts = texts_of("inputs", path, column)
    rows, lines = texts.rows if isinstance(texts, Items) else None, list(each(texts))
    if Path(path).suffix.lower() == ".txt":
        lines = lines_of(lines[0])
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


def start_token(tokenizer: str | os.PathLike) -> int | None:
    """Return the token with which texts begin, as the config.json beside a tokenizer says it, if there is one.

    Args:
        tokenizer: a tokenizer.json, or a folder that has one.

    Raises:
        DataError: there is no tokenizer, or the config.json cannot be read.
    """
    beside = _tokenizer_path(tokenizer).parent / "config.json"
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


def _tokens(
    role: str, source: Any, column: str, tokenizer: Any, start: int | None, cache_dir: str | os.PathLike | None
) -> np.ndarray:
    """int32 (T,): all texts one behind the other, from the cache where it has them."""
    texts = texts_of(role, source, column)
    digest = hashlib.sha256(f"{_tokenizers().__version__} {start} {tokenizer.to_str()}".encode())
    characters = 0
    for text in each(texts):
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        characters += len(text)
    if not characters:
        raise DataError(f"{role} must have text, got none in {described(source)}")
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
            draft.meta = {"name": role, "digest": digest.hexdigest(), "source": described(source)}
        found = _cache.read(entry)
    if found is None:
        raise DataError(f"the array cache {entry} cannot be read after it was written; try another cache_dir")
    return found[0]["tokens"]


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Lists of some texts each, to be tokenized on all cores."""
    group: list[str] = []
    characters = 0
    for text in each(texts):
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

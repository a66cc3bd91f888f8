"""Words of texts: how a text is written does not matter, only what it says."""

import functools
import unicodedata
import zlib
from collections.abc import Iterable

import numpy as np

TOKENIZER = 2
"""The version of `words`: raise it when a text gives other words. 1 split lower-cased texts at white space."""
LONGEST = 1024
"""Words of a text that are kept in the cache."""


def words(text: str) -> list[str]:
    """Returns the words and marks of a text, in order.

    1. The text is normalised: NFKC and case folding, so that composed and decomposed letters, full-width forms and
       ligatures are one.
    2. What has no width is left out: format characters (Unicode's category Cf: zero-width spaces and joiners, soft
       hyphens, byte-order marks, directions), variation selectors, invisible fillers, and control characters other
       than white space. Then NFKC again.
    3. A run of letters, digits and combining marks is a word; each other character that is no white space, such as a
       comma, a quote, an underscore or an emoji, stands alone.

    Step 3 is what BERT's pre-tokenizer does, but for symbols, which it leaves in words, and for Chinese, which it
    splits by characters: here scripts without spaces are split at punctuation only. Words are the same on every
    machine; a newer Python may know newer characters of Unicode.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.translate({ord(c): None for c in set(text) if _is_unseen(c)})
    # Again, for what case folding takes apart, and for letters that something unseen kept from their accents.
    text = unicodedata.normalize("NFKC", text)
    return text.translate({ord(c): f" {c} " for c in set(text) if _stands_alone(c)}).split()


@functools.cache
def _is_unseen(character: str) -> bool:
    """Whether it has no width and is no white space."""
    if unicodedata.category(character) in ("Cc", "Cf"):
        return not character.isspace()
    return any(low <= character <= high for low, high in _UNSEEN)


_UNSEEN = (
    ("\u034f", "\u034f"),
    ("\u115f", "\u1160"),
    ("\u17b4", "\u17b5"),
    ("\u180b", "\u180f"),
    ("\u3164", "\u3164"),
    ("\ufe00", "\ufe0f"),
    ("\uffa0", "\uffa0"),
    ("\U000e0000", "\U000e0fff"),
)
"""Characters without a glyph that are of other categories (Unicode's Default_Ignorable_Code_Point)."""


@functools.cache
def _stands_alone(character: str) -> bool:
    """Whether it is neither part of a word (a letter, mark or digit) nor white space."""
    return unicodedata.category(character)[0] not in "LMN" and not character.isspace()


def word_hashes(texts: Iterable[str]) -> np.ndarray:
    """uint32 (N, longest): CRC-32 of each of the `words` in UTF-8; 0 behind a text's end.

    Words beyond the first 1,024 of a text are left out.
    """
    rows = [
        [zlib.crc32(word.encode("utf-8", "surrogatepass")) or 1 for word in words(text)[:LONGEST]] for text in texts
    ]
    hashes = np.zeros((len(rows), max(map(len, rows), default=0)), np.uint32)
    for row, found in zip(hashes, rows, strict=True):
        row[: len(found)] = found
    return hashes

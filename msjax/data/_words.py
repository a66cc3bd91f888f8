"""Words of texts: how a text is written does not matter, only what it says."""

import functools
import re
import sys
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

    1. The text is normalised: NFKC, then case folding, then NFKC again, so that composed and decomposed letters,
       full-width forms and ligatures are one.
    2. What has no width is left out: format characters (Unicode's category Cf: zero-width spaces and joiners, soft
       hyphens, byte-order marks, directions), variation selectors, invisible fillers, and control characters other
       than white space.
    3. A run of letters, digits and combining marks is a word; each other character that is no white space, such as a
       comma, a quote, an underscore or an emoji, stands alone.

    So do the pre-tokenizers of BERT, but for their steps for Chinese: scripts without spaces are split at punctuation
    only. The same on every machine; a newer Python may know newer characters of Unicode.
    """
    if text.isascii():
        return _ASCII.findall(_CONTROLS.sub("", text).casefold())
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    invisible, found = _patterns()
    return found.findall(invisible.sub("", text))


_ASCII = re.compile(r"[^\W_]+|\S")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # all but white space
_UNSEEN = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff"
"""Characters without a glyph that are of other categories than Cf (Unicode's Default_Ignorable_Code_Point)."""


@functools.cache
def _patterns() -> tuple[re.Pattern, re.Pattern]:
    """What is left out, and what is found; made from Unicode's categories when a text first needs them."""
    categories = {"Cf": [], "M": []}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category == "Cf" or category[0] == "M":
            categories["Cf" if category == "Cf" else "M"].append(re.escape(chr(code)))
    unseen, marks = map("".join, categories.values())
    return re.compile(f"[{unseen}{_UNSEEN}]|{_CONTROLS.pattern}"), re.compile(rf"(?:[^\W_]|[{marks}])+|\S")


def word_hashes(texts: Iterable[str]) -> np.ndarray:
    """uint32 (N, longest): CRC-32 of each of the `words` in UTF-8; 0 behind a text's end.

    Words beyond the first 1,024 of a text are left out.
    """
    rows = [[zlib.crc32(word.encode()) or 1 for word in words(text)[:LONGEST]] for text in texts]
    hashes = np.zeros((len(rows), max(map(len, rows), default=0)), np.uint32)
    for row, found in zip(hashes, rows, strict=True):
        row[: len(found)] = found
    return hashes

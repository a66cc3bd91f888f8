"""Docstrings are written as Markdown, which reads well in an editor; autodoc reads them as reStructuredText.

Before napoleon turns their sections into fields, this turns the Markdown that they use into what Sphinx knows: indented
code, tables, and the characters `*` and `|`, which mean nothing there by themselves.
"""

import re
from typing import Any

_NOT_CODE = re.compile(r"(`[^`]*`)")


def setup(app: Any) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}


def _process(app, what, name, obj, options, lines):
    lines[:] = to_rst(lines)


def to_rst(lines: list[str]) -> list[str]:
    """Returns the lines of a docstring in Markdown as those of one in reStructuredText."""
    found: list[str] = []
    last, rest = "", list(lines)  # the last line that is not blank
    while rest:
        line = rest[0]
        is_code = (
            line.startswith("    ") and found and not found[-1] and last and not last.startswith((" ", "- ", ".. "))
        )
        if line.startswith("|") or is_code:
            belongs = (lambda text: text[:1] in ("", " ")) if is_code else (lambda text: text.startswith("|"))
            count = next((i for i, text in enumerate(rest) if not belongs(text)), len(rest))
            block, rest = rest[:count], rest[count:]
            found += _code(block) if is_code else _table(block)
            last = ""
            continue
        found.append(line if line.lstrip().startswith(">>>") else _escape(line))
        last, rest = line or last, rest[1:]
    return found


def _code(block):
    return ["", ".. code-block:: python", "", *block, ""]


def _table(block):
    rows: list[list[str]] = []
    for line in block:
        if set(line) <= set("|-: ") and "-" in line:  # below the head
            continue
        cells = [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if rows and not cells[0]:  # goes on with the row before
            rows[-1][-1] += " " + cells[-1]
        else:
            rows.append(cells)
    found = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        found += [f"   {'* -' if not i else '  -'} {_escape(cell)}" for i, cell in enumerate(row)]
    return [*found, ""]


def _escape(line):
    """Outside of code, lone stars and bars as such, and a code's plural as one word."""
    parts = _NOT_CODE.split(line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<!\*)\*(?=[\w,)])(?!\*)", r"\\*", parts[i]).replace("|", r"\|")
        if i and parts[i][:1].isalnum():
            parts[i] = "\\ " + parts[i]
    return "".join(parts)

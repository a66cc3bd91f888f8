"""The directive `command-help`: what a command of msjax prints with `--help`, without a process of its own."""

import contextlib
import io
import os
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from msjax.cli import main


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}


class CommandHelp(SphinxDirective):
    """Its argument is the command, as `train`, with what leads to other options, as `eval --server HOST:PORT`."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        command, *options = self.arguments[0].split()
        text = io.StringIO()
        lines_of_80 = mock.patch.dict(os.environ, COLUMNS="80")
        with lines_of_80, contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main.run(command, [*options, "--help"])
        if not text.getvalue():
            raise self.error(f"msjax {self.arguments[0]} --help must print something")
        return [nodes.literal_block(text.getvalue(), text.getvalue(), language="none")]

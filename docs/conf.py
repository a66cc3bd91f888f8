"""How Sphinx builds these pages: `sphinx-build -W docs docs/_build`, with the extra `docs`."""

import os
import pathlib
import sys

import msjax

os.environ.update(COLUMNS="100", NO_COLOR="1")  # for the help texts that pages show

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

project = "msjax"
author = "the msjax maintainers"
copyright = "2026, the msjax maintainers"
release = version = msjax.__version__

extensions = [
    "command_help",
    "markdown_docstrings",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "jupyter_execute", ".jupyter_cache", "**.ipynb_checkpoints"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # a notebook is executed when its text has changed
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # how long XLA took, and the like; errors end the build
# "ref.python": names of dimensions in types, as in Float[Array, "name"], are no references.
suppress_warnings = ["config.cache", "ref.python"]

default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "msjax"
html_theme_options = {"show_navbar_depth": 1, "use_download_button": False, "show_toc_level": 2}

"""`python -m msjax`."""

from msjax.cli.main import script

script()

"""`python -m msjax`."""

from msjax.cli import script

script()

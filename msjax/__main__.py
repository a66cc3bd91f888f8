"""`python -m msjax`."""

from msjax.cli import main

main()

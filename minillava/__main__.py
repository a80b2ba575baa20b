"""`python -m minillava` is the command line of `python -m minillava.generate`."""

from .app.cli import program

program()

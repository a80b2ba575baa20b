"""`python -m minillava` is the command line of `python -m minillava.generate`."""

import sys

from .app.cli import main

sys.exit(main())

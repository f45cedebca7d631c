"""`python -m tensorpar.translators`: the program `tensorpar`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m tensorpar`."""

import sys

from tensorpar.command import main

if __name__ == "__main__":
    sys.exit(main())

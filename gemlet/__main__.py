"""`python -m gemlet` is `gemlet`; torchrun starts it so."""

import sys

from gemlet.cli import main

if __name__ == "__main__":
    sys.exit(main())

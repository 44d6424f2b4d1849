"""`python -m minwm` is `minwm`."""

import sys

from minwm.cli import main

if __name__ == "__main__":
    sys.exit(main())

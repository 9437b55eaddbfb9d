"""`python -m megavlm` is the command `megavlm`."""

import sys

from megavlm.cli.main import main

if __name__ == "__main__":  # helper processes started by spawn import this file again
    sys.exit(main())

"""`python -m megavlm` runs the command `megavlm`."""

import sys

from megavlm.cli.main import main

if __name__ == "__main__":  # helper processes that spawn starts import this file again
    sys.exit(main())

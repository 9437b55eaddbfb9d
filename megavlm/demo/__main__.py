"""`python -m megavlm.demo` runs the demo."""

import sys

from megavlm.demo.run import main

if __name__ == "__main__":  # processes started by spawn import this file again
    sys.exit(main())

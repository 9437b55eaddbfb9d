"""Ends with an error if a named package is found in this virtual environment instead of the image below it.

python docker/not_hidden.py numpy google.protobuf
"""

import importlib.util
import sys
from pathlib import Path


def main(packages: list[str]) -> int:
    """Status 1 if a package is missing or lies in the environment of this interpreter."""
    environment = Path(sys.prefix).resolve()
    wrong = 0
    for name in packages:
        found = importlib.util.find_spec(name)
        place = Path(found.origin).resolve() if found and found.origin else None
        if place is None or environment in place.parents:
            print(f"{name}: {place or 'not found'}; it must be the image's, outside {environment}", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

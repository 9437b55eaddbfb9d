"""`python -m docs.generate`: writes the generated pages and pictures; with --check it only says which are stale.

Run it at the top of the checkout. Exit status 1: --check found a file that the code would now write differently.
"""

import argparse
import sys
from pathlib import Path

from docs.generate import rooms, settings_page, step

DOCS = Path(__file__).parents[1]
WRITERS = {"settings.md": settings_page.page, "rooms.svg": rooms.picture, "architecture.svg": step.picture}


def main() -> int:
    """Writes or checks each file and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are stale")
    check = parser.parse_args().check
    stale = 0
    for name, write in WRITERS.items():
        path, text = DOCS / name, write()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if check:
            print(f"docs/{name} is stale; write it again with: python -m docs.generate")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

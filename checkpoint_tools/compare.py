"""Lists the tensors that differ between two sets of weights, Hugging Face folders or Megatron checkpoints."""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from megavlm.base.errors import UserError
from megavlm.base.imports import no_collection


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Compare two sets of weights bit by bit; each is a Hugging Face folder or a Megatron checkpoint. "
        "Exit status: 0 if they are equal, 1 if they differ, 2 if the input cannot be used.",
        epilog="example: python checkpoint_tools/compare.py --a Qwen3-VL-2B-Instruct --b checkpoints/qwen3-vl-2b",
    )
    parser.add_argument("--a", required=True, metavar="DIR", help="Hugging Face folder or checkpoint")
    parser.add_argument("--b", required=True, metavar="DIR", help="Hugging Face folder or checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    with no_collection():  # imported after the arguments are parsed, because it takes seconds
        from megavlm.convert import compare
    differences, count = compare(args.a, args.b, progress=not args.quiet)
    if not differences:
        print(f"equal: all {count} tensors are bitwise identical")
        return 0
    table = Table("tensor", "difference", "max |a-b|", "‖a-b‖ / ‖a‖")
    for d in sorted(differences, key=lambda d: -(d.max_abs or 0.0)):
        numbers = ("" if value is None else f"{value:.3g}" for value in (d.max_abs, d.relative))
        table.add_row(d.name, d.what, *numbers)
    console = Console()
    # a pipe or a file gets the full names; on a terminal, they are cut to its width
    console.print(table) if console.is_terminal else Console(width=200).print(table)
    print(f"{len(differences)} of {count} tensors differ")
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""Merges an adapter into a Hugging Face Qwen3-VL folder and writes a new one, using megavlm/convert/merge.py."""

import argparse
import sys

from megavlm.base.errors import UserError
from megavlm.base.imports import no_collection


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Merge an adapter (LoRA, DoRA or FourierFT) into the weights of a Hugging Face Qwen3-VL folder. "
        "It needs no GPU and does not load the whole model into memory.",
        epilog="example: python checkpoint_tools/merge_adapter.py --hf Qwen3-VL-2B-Instruct "
        "--adapter runs/2b/sft-lora/checkpoints/step_00002000 --out Qwen3-VL-2B-mine",
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder with weights")
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="DIR",
        help="folder in peft's format, or checkpoint of a run that trained an adapter",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    with no_collection():  # imported after the arguments are parsed, because it takes seconds
        from megavlm.convert.memory import keep_freed_memory
        from megavlm.convert.merge import merge_adapter
    keep_freed_memory()
    merge_adapter(args.hf, args.adapter, args.out, overwrite=args.overwrite, progress=not args.quiet)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

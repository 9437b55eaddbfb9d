"""Converts a Hugging Face Qwen3-VL folder to a Megatron checkpoint, using megavlm/convert."""

import argparse
import sys

from megavlm.base.errors import UserError
from megavlm.base.imports import no_collection


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Convert a Hugging Face Qwen3-VL folder to a Megatron checkpoint that can be loaded in any "
        "parallel layout. It needs no GPU and about 2 GB of memory. A run can also start from the folder itself "
        "(model.load); convert it for many runs, or to keep the weights as they are.",
        epilog="example: python checkpoint_tools/hf2mcore.py --hf Qwen3-VL-2B-Instruct --out checkpoints/qwen3-vl-2b",
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("--out", required=True, metavar="CKPT", help="checkpoint folder to create")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    with no_collection():  # imported after the arguments are parsed, because it takes seconds
        from megavlm.convert import hf_to_mcore
        from megavlm.convert.memory import keep_freed_memory
    keep_freed_memory()
    hf_to_mcore(args.hf, args.out, overwrite=args.overwrite, progress=not args.quiet)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

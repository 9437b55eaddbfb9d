"""Converts a Megatron checkpoint to a Hugging Face Qwen3-VL folder, using megavlm/convert."""

import argparse
import sys

from megavlm.base.errors import UserError
from megavlm.base.imports import no_collection

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # option → name in torch


def main() -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Convert a Megatron checkpoint, converted or saved by training, to a Hugging Face folder. Tensor "
        "names, files and dtypes are those of the weights in --hf, or those stored in the checkpoint if --hf has no "
        "weights.",
        epilog="example: python checkpoint_tools/mcore2hf.py --mcore out/sft/checkpoints/step_00001000 "
        "--hf Qwen3-VL-2B-Instruct --out Qwen3-VL-2B-mine",
    )
    parser.add_argument(
        "--mcore", required=True, metavar="CKPT", help="checkpoint folder; optimizer states are ignored"
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="folder with config.json, processor and tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of all weights (default: as in --hf)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    with no_collection():  # imported after the arguments are parsed, because it takes seconds
        import torch

        from megavlm.convert import mcore_to_hf
        from megavlm.convert.memory import keep_freed_memory
    keep_freed_memory()
    mcore_to_hf(
        args.mcore,
        args.hf,
        args.out,
        dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype else None,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

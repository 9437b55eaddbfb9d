"""The environment in which a test runs a job script."""

import os
import re

_LOOKED_AT = re.compile(r"(SLURM|SBATCH|MEGAVLM|NCCL|GLOO|MASTER|CUDA|HF|DRY|NODES|OMP|TOKENIZERS|PYTORCH|TORCH)")


def environment(**variables: str) -> dict[str, str]:
    """The reader's environment less everything that a job script looks at."""
    return {name: value for name, value in os.environ.items() if not _LOOKED_AT.match(name)} | variables

"""The checks of one command on one GPU or two: `python -m benchmarks.gpu_check` (docs/gpu.md)."""

import os
import sys

WITHOUT_TE = "MEGAVLM_GPU_CHECK_WITHOUT_TE"  # set for the checks if Transformer Engine is installed but does not work

if os.environ.get(WITHOUT_TE):  # a half-installed one would end every import of Megatron, too
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # which makes it look not installed

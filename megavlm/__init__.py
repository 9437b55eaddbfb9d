"""megavlm: Qwen3-VL training on Megatron-core."""

import warnings

__version__ = "0.1.0"

# Megatron tells at every import which optional packages it did without; model/kernels chooses those that matter.
warnings.filterwarnings("ignore", module=r"megatron\..*")

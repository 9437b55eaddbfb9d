"""megavlm: Qwen3-VL training on Megatron-core."""

import logging
import warnings

__version__ = "0.1.0"

# Megatron and torch tell at every start which optional packages they did without and which of their own interfaces they
# mean to change. None of it is news to a user; what matters (the kernels chosen, say) stands in a run's header.
warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")
for _name in ("megatron", "torch.utils.cpp_extension"):
    logging.getLogger(_name).setLevel(logging.ERROR)

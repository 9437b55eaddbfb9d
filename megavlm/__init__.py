"""megavlm: Qwen3-VL training on Megatron-core."""

import logging
import warnings

from megavlm.base.cuda_libraries import share_cudnn

__version__ = "0.1.0"

# At every start Megatron and torch warn about optional packages that are missing and about their own interfaces that
# will change. Users need none of it; what matters, such as the kernels that were chosen, is in the header of a run.
warnings.filterwarnings("ignore", module=r"(.*/)?megatron[./]")  # while it is compiled, a file is named by its path
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")
for _name in ("megatron", "torch.utils.cpp_extension"):
    logging.getLogger(_name).setLevel(logging.ERROR)

share_cudnn()

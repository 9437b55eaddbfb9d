"""megavlm: Qwen3-VL training on Megatron-core."""

import importlib.util
import logging
import os
import warnings
from pathlib import Path

__version__ = "0.1.0"

# At every start Megatron and torch warn about optional packages that are missing and about their own interfaces that
# will change. Users need none of it; what matters, such as the kernels that were chosen, is in the header of a run.
warnings.filterwarnings("ignore", module=r"(.*/)?megatron[./]")  # while it is compiled, a file is named by its path
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")
warnings.filterwarnings("ignore", message="Detected a Jax installation")  # which Transformer Engine does not use here
for _name in ("megatron", "torch.utils.cpp_extension"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def _share_cudnn() -> None:
    """Has Transformer Engine load the cuDNN that torch loads, before either is imported.

    Transformer Engine prefers a cuDNN of the system. If torch has brought another version, the parts of both are mixed,
    and cuDNN refuses to compute attention. ``CUDNN_HOME``, which Transformer Engine reads, is left alone if it is set.
    """
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return  # torch was built with the system's
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    if folders and (folders[0] / "lib").is_dir():
        os.environ.setdefault("CUDNN_HOME", str(folders[0]))


_share_cudnn()

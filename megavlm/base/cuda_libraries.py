"""Which of several copies of a CUDA library a process loads."""

import importlib.util
import os
from pathlib import Path


def share_cudnn() -> None:
    """Has Transformer Engine load the cuDNN that torch loads. Call it before either is imported.

    Transformer Engine prefers a cuDNN of the system. If torch has brought another version, the parts of both are mixed,
    and cuDNN refuses to compute attention. ``CUDNN_HOME``, which Transformer Engine reads, is left alone if it is set.
    """
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return  # torch was built against the system's
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    if folders and (folders[0] / "lib").is_dir():
        os.environ.setdefault("CUDNN_HOME", str(folders[0]))

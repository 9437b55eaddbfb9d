"""Importing this imports what tests need in processes of their own; the server of forkserver.py does so once for all.

No import may start a thread: a forked child would not have it.
"""

import gc
import importlib
import pkgutil

import megavlm

LIBRARIES = [  # parts that megavlm imports at first use
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "megatron.core.dist_checkpointing",
    "pytest",  # the tests' own modules import it
    "megatron.energon.flavors.webdataset.prepare",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
]


def modules() -> list[str]:
    """Names of all modules of megavlm, its packages too."""
    return ["megavlm", *(found.name for found in pkgutil.walk_packages(megavlm.__path__, "megavlm."))]


gc.disable()
for name in [*LIBRARIES, *modules()]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name != "vllm":  # those that run in vLLM's environment need it
            raise RuntimeError(f"{name} cannot be imported") from error  # the server would pass over an ImportError
gc.enable()
gc.freeze()  # no collection in a child looks at all of this again, or copies its pages

"""Importing this imports what tests need in processes of their own; the server of forkserver.py does so once for all.

No import may start a thread: a forked child would not have it.
"""

import gc
import importlib

from megavlm.cli.verbs import VERBS

LIBRARIES = [  # of which megavlm imports some at first use
    "torch.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
    "megatron.energon.flavors.webdataset.prepare",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
]

gc.disable()
for name in [*LIBRARIES, *(verb.target.partition(":")[0] for verb in VERBS.values())]:
    importlib.import_module(name)
gc.enable()
gc.freeze()  # no collection in a child looks at all of this again, or copies its pages

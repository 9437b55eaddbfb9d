"""Importing this prepares what tests need in processes of their own; the server of forkserver.py does so once for all.

It imports libraries, and does what takes long at its first use: compiling the report's template, finding fonts.

No import may start a thread: a forked child would not have it.
"""

import gc
import importlib
import json
import pkgutil
import tempfile
from pathlib import Path

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


def use_once() -> None:
    """Draws the loss and writes the report of a run that never was."""
    from megavlm.monitor.metrics import REQUIRED
    from megavlm.report.loss_plot import write_loss_plot
    from megavlm.report.run_report import write_report

    with tempfile.TemporaryDirectory() as place:  # a folder deeper: the report also reads the folders beside its own
        folder = Path(place) / "run"
        folder.mkdir()
        lines = [{**dict.fromkeys(REQUIRED, 1.0), "step": step} for step in range(1, 5)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_loss_plot(folder)
        write_report(folder)


gc.disable()
for name in [*LIBRARIES, *modules()]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name != "vllm":  # those that run in vLLM's environment need it
            raise RuntimeError(f"{name} cannot be imported") from error  # the server would pass over an ImportError
use_once()
gc.enable()
gc.freeze()  # no collection in a child looks at all of this again, or copies its pages

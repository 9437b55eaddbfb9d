"""What results depend on: the devices, and the versions of what computes on them."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.base.machine import commit, printed, versions

PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "transformer-engine-torch", "transformers", "triton", "flash-attn",
    "scikit-image", "nvidia-cudnn-cu13",
)  # fmt: skip
_PROBE = """
import json, torch
found = {"gpus": torch.cuda.device_count(), "problem": ""}
print(json.dumps(found), flush=True)
try:
    import transformer_engine.pytorch as te
    te.Linear(64, 64).cuda()(torch.ones(32, 64, device="cuda")).sum().item()
except Exception as error:
    found["problem"] = f"{type(error).__name__}: {error}"
print(json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Machine:
    """What there is to check on.

    Attributes:
        gpus: the number of GPUs that torch finds.
        problem: why Transformer Engine does not work; "" if it does.
    """

    gpus: int
    problem: str


def probe() -> Machine:
    """Asks another process: this one must hold no CUDA context, and survive a Transformer Engine that crashes."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, env=environment())
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"gpus"')]
    if not lines:
        return Machine(0, "torch does not work")
    crashed = "the process that tried it has died" if len(lines) < 2 else ""
    found = json.loads(lines[-1])
    return Machine(found["gpus"], crashed or found["problem"])


def environment() -> dict[str, str]:
    """The environment of processes that use a GPU: Transformer Engine finds CUDA's libraries only by their path."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    libraries = [str(path) for root in roots for path in sorted(Path(root).glob("*/lib"))]
    before = os.environ.get("LD_LIBRARY_PATH", "")
    return os.environ | {"LD_LIBRARY_PATH": ":".join([*libraries, *filter(None, [before])])}


def described(*, cpu: bool) -> dict[str, Any]:
    """Devices with their driver, versions of packages, and the commit."""
    found = versions(PACKAGES)
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return {
        "devices": ["CPU"] if cpu else printed(query).splitlines(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: found.get(name) for name in PACKAGES},
        "commit": commit(),
    }

"""What is known of a GPU: its memory, its peak and its bandwidths, from ``gpus.yaml`` beside this file."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megavlm.base.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU; see ``gpus.yaml`` for units and sources."""

    name: str
    memory_gib: float
    bf16_tflops: float
    memory_bandwidth: float
    nvlink: float
    source: str
    operators: dict[str, Any]
    fp8_tflops: float | None = None
    nvlink_domain: int = 8
    fabric: float = 50.0


@functools.cache
def gpus() -> dict[str, Gpu]:
    """All known GPUs, by the name for ``--gpu``."""
    text = Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8")
    known = yaml.safe_load(text)
    assumed = known.pop("operators")
    return {name: Gpu(**facts, operators=assumed) for name, facts in known.items()}


def gpu_of(name: str) -> Gpu:
    """The GPU with this name. Raises UserError if none is known by it."""
    if name.lower() not in gpus():
        raise UserError(f"--gpu {name} is not known", f"known are {', '.join(gpus())}")
    return gpus()[name.lower()]

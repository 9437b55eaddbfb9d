"""What is known of a GPU: its memory, its peak and its bandwidths, from ``gpus.yaml`` beside this file."""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.base.yaml_files import read_plain


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
    cores: int | None = None
    pcie: float = 128.0


@functools.cache
def gpus() -> dict[str, Gpu]:
    """All known GPUs, by the name for ``--gpu``."""
    text = Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8")
    known = yaml.safe_load(text)
    assumed = known.pop("operators")
    return {name: Gpu(**facts, operators=assumed) for name, facts in known.items()}


def gpu_of(name: str) -> Gpu:
    """The GPU with this name, or that of a file of measurements, whose name ends in ".yaml".

    Raises:
        UserError: no GPU is known by the name, or the file is none that ``write_gpu`` has written.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    if name.lower() not in gpus():
        raise UserError(
            f"--gpu {name} is not known",
            f"known are {', '.join(gpus())}, and files of measurements, whose names end in .yaml",
        )
    return gpus()[name.lower()]


def _read(file: Path) -> Gpu:
    try:
        facts = read_plain(file)
        assumed = next(iter(gpus().values())).operators
        return Gpu(**{**facts, "operators": {**assumed, **facts["operators"]}})
    except (OSError, UserError, TypeError, KeyError) as error:
        cause = shortened(repr(error))
        if isinstance(error, UserError):
            cause = error.message
        elif isinstance(error, OSError):
            cause = error.strerror or shortened(error)
        raise UserError(
            f"--gpu {file} cannot be read as a file of measurements: {cause}",
            "give a file that `megavlm bench CONFIG --operators FILE.yaml` has written",
        ) from error


def write_gpu(file: Path, gpu: Gpu) -> None:
    """Writes a file that ``gpu_of`` reads. An existing file is replaced."""
    text = yaml.safe_dump(asdict(gpu), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    write_text(file, text)

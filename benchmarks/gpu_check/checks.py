"""The table of checks: what each needs, how long it may take, and the measures that follow from two of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from benchmarks.gpu_check.measure import Measure


@dataclass(frozen=True)
class Check:
    """A check, which runs in a process of its own.

    Attributes:
        function: "module.function" in this package; its arguments are a ``Recorder`` and ``cpu``.
        what: what it measures, for the help.
        seconds: after so many it is stopped; what it has reported until then counts.
        gpus: how many GPUs it needs.
    """

    function: str
    what: str
    seconds: float
    gpus: int = 1

    def run(self, record: Any, *, cpu: bool) -> None:
        """Runs it in this process."""
        module, name = self.function.split(".")
        check: Callable[..., None] = getattr(import_module(f"benchmarks.gpu_check.{module}"), name)
        check(record, cpu=cpu)


# In the order in which they run: what nobody has measured first, so that it is known if the time runs out.
CHECKS: dict[str, Check] = {
    "speed": Check("speed.megavlm", "2B shape, rows of 8,192 tokens: tokens/s, MFU, memory; pictures beside text", 140),
    "transformers": Check("speed.transformers", "the same rows in transformers with its fastest attention", 110),
    "fp8": Check("layer.fp8", "FP8 beside bf16 at the shape of the 8B model's layers", 80),
    "parity": Check("parity.parity", "Transformer Engine against portable against transformers, bf16 and fp8", 100),
    "kernels": Check("unit.kernels", "the tests of tests/gpu", 50),
    "layouts": Check("layouts.layouts", "TP2, PP2, CP2, EP2 and DP2 under NCCL against transformers", 240, gpus=2),
}

TIMES_TRANSFORMERS = 1.5


def derived(found: Mapping[str, list[Measure]]) -> list[Measure]:
    """Measures that compare two checks of the same run; none if one of them is missing."""
    ours = _value(found, "speed", "pictures and text: tokens per second")
    theirs = _value(found, "transformers", ": tokens per second")
    if ours is None or theirs is None:
        return []
    return [Measure("tokens/s of megavlm / transformers", ours / theirs, least=TIMES_TRANSFORMERS)]


def _value(found: Mapping[str, list[Measure]], check: str, ending: str) -> float | None:
    return next((m.value for m in found.get(check, []) if m.name.endswith(ending)), None)

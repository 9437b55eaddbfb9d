"""A trainer of the checks: one process, rows in memory, the step of `megavlm` itself; and its throughput."""

import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.measure import Measure, Recorder
from benchmarks.gpu_check.models import Size


def has_transformer_engine() -> bool:
    """Whether the kernels `te` can run here: on a GPU, or where something answers for TE's extension (tests/te_cpu)."""
    from megavlm.model import kernels

    return kernels.on_gpu() and kernels.transformer_engine_found()


def settings_for(folder: Path, seq_length: int, rows: int, kernels: str, **train: Any) -> Any:
    """Settings of a run on these rows; ``train`` has entries of that section, and sections ``parallel``, ``vision``."""
    from megavlm.config.settings import Settings

    parallel, vision = train.pop("parallel", {}), train.pop("vision", {})
    return Settings(
        model={"hf": folder, "kernels": kernels},
        data={"seq_length": seq_length},
        parallel=parallel,
        vision=vision,
        train={"steps": 1000, "global_batch_size": rows, "lr": 1e-5, "clip_grad": 1.0, **train},
    )


def make_step(settings: Any, rows: list[Any], *, load: Path | None = None, phases: bool = False) -> tuple[Any, Any]:
    """The step of a model with random weights, or those of ``load``, that takes these rows again and again.

    Args:
        settings: from ``settings_for``.
        rows: packed rows of this data rank; read on leaders.
        load: a Hugging Face folder with weights.
        phases: whether the phases of the steps are measured.

    Returns:
        The step, and its ``Phases``.
    """
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.monitor.phases import Phases
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    groups = platform.init(settings.parallel, settings.train.seed, timeout_minutes=2)
    vlm = VLM(Shapes.from_hf(settings.model.hf), settings, groups).train()
    if load is not None:
        load_weights(load, vlm)
    measured = Phases(groups.world_host, measured=True) if phases else Phases()
    each = settings.rows_per_step(groups.dp_size)
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    feed = Feed(vlm, itertools.cycle(mine) if groups.is_leader else None)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens)
    step = Step(
        vlm,
        Optimizers(vlm, settings.train),
        feed,
        each,
        objective,
        settings.vision.window,
        tower_timer=lambda: measured("tower"),
        phases=measured,
    )
    return step, measured


def seconds_of(work: Callable[[], Any], size: Size) -> float:
    """Mean seconds of one call, with what the device does for it; the warm-up is not counted."""
    from megavlm import platform

    for _ in range(size.warm_up):
        work()
    platform.synchronize()
    start = time.perf_counter()
    for _ in range(size.repeats):
        work()
    platform.synchronize()
    return (time.perf_counter() - start) / size.repeats


def report_throughput(
    record: Recorder, what: str, shapes: Any, counts: dict[str, float], seconds: float, gib: float
) -> float:
    """Reports tokens per second, TFLOP/s, MFU and peak memory of a step on one device; without a known peak, no MFU.

    Returns the operations per token.
    """
    from megavlm import platform
    from megavlm.model.flops import Work, peak_flops, step_flops
    from megavlm.monitor.metrics import throughput

    flops = step_flops(shapes, Work.from_counts(counts))
    peak = peak_flops(platform.device_name())
    found = throughput(counts["tokens"], counts["row_tokens"], seconds, flops, 1, peak)
    record(Measure(f"{what}: tokens per second", found["tokens_per_second"] or 0.0, "tokens/s"))
    record(Measure(f"{what}: model TFLOP/s", found["model_tflops"] or 0.0, "TFLOP/s"))
    if found["mfu"] is not None:
        record(Measure(f"{what}: MFU", found["mfu"], least=MFU if what == PICTURES else None))
    record(Measure(f"{what}: peak memory", gib, "GiB"))
    return flops / counts["tokens"]


MFU, PICTURES = 0.45, "pictures and text"


def start_anew() -> None:
    """Forgets the layout of an earlier model and frees its memory, if nothing names it any more."""
    import torch

    from megavlm import platform

    platform.shutdown()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

"""What measured steps say: throughput, the split of a step, and its memory beside what is planned for the same rows."""

import hashlib
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megavlm import __version__
from megavlm.align.registry import make_method
from megavlm.base import machine
from megavlm.bench.bench import Measured
from megavlm.config.load import resolved_yaml
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.flops import Work, peak_flops, step_flops
from megavlm.model.kernels import resolve
from megavlm.monitor.metrics import throughput
from megavlm.plan.step_memory import peak_of
from megavlm.platform import device_name
from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
from megavlm.tracing.static_memory import StaticCount, StaticMemory, make_state

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers")


def report(settings: Settings, verb: str, found: Measured) -> dict[str, Any]:
    """What was measured, for one line of JSON. Seconds, bytes, and numbers of the whole world unless named otherwise.

    Args:
        settings: the settings of the configuration.
        verb: a key of ``METHODS``.
        found: what was measured.
    """
    session, steps, world_size = found.session, len(found.seconds), dist.get_world_size()
    counts = found.counts | ({"target_tokens": 0.0} if session.vlm.scores else {})
    adapted = session.adapters.parts if session.adapters is not None else ()
    trained = session.settings
    flops = step_flops(session.shapes, Work.from_counts(counts), trained.frozen(trained.train.steps), adapted)
    seconds, peak = sum(found.seconds), peak_flops(device_name())
    of_all = throughput(counts["tokens"], counts["row_tokens"], seconds, flops, world_size, peak)
    parallel = trained.parallel
    return {
        "machine": {
            "device": device_name() or "CPU",
            "processes": world_size,
            "cores": len(os.sched_getaffinity(0)),
            "kernels": session.vlm.kernels,
        },
        "versions": {"megavlm": __version__} | machine.versions(_PACKAGES),
        "commit": machine.commit(),
        "verb": verb,
        "config": _digest(settings),
        "layout": {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "expert": parallel.expert,
            "data": session.groups.dp_size,
        },
        "steps": steps,
        "step": {
            name: counts[name] / steps for name in ("samples", "tokens", "row_tokens", "images", "videos", "patches")
        },
        "seconds": {
            "mean": statistics.fmean(found.seconds),
            "median": statistics.median(found.seconds),
            "worst": max(found.seconds),
        },
        "tokens_per_second_per_device": counts["tokens"] / seconds / world_size,
        "samples_per_second": counts["samples"] / seconds,
        "packing": of_all["packing"],
        "model_tflops": of_all["model_tflops"],
        "mfu": of_all["mfu"],
        "phases": found.phases,
        "memory": {"allocated": found.allocated, "reserved": found.reserved, "one_step": found.one_step},
    }


def planned_memory(settings: Settings, verb: str, world_size: int, rows: Sequence[Row]) -> int:
    """Bytes of a step with these rows, planned for the first rank of each pipeline stage; those of the fullest one.

    The process must be in no process group.

    Args:
        settings: those of the measured session.
        verb: a key of ``METHODS``.
        world_size: number of ranks.
        rows: the rows of a step on a data-parallel rank.
    """
    method, absent, found = make_method(verb, settings), that_can_be_absent(settings), []
    fused = settings if resolve(settings.model.kernels, settings.train.precision) == "te" else None
    for stage in range(settings.parallel.pipeline):
        rank = world_size // settings.parallel.pipeline * stage
        with absent_rank(absent, method, rank, world_size, at_end=True) as (_, trained):
            count, static, peaks = StaticCount(), StaticMemory(), []
            for model in trained:
                make_state(model.optimizers)
                static += count(model.vlm, model.optimizers)
                where = next(model.vlm.vision.parameters()).device
                window = settings.vision.window
                run = model.vlm, model.optimizers, model.objective, [*rows], window, where
                peaks.append(peak_of(*run, fused=fused).total)
            found.append(static.total + max(peaks))
    return max(found)


def _digest(settings: Settings) -> str:
    """16 hexadecimal digits that differ between configurations, wherever their output goes."""
    text = resolved_yaml(settings.model_copy(update={"output": None}))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

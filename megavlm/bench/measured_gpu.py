"""Measures the operators of a configuration on this machine, for a file that ``megavlm plan --gpu`` reads."""

import itertools
import os
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch.distributed as dist

from megavlm.align.registry import make_method
from megavlm.base import machine
from megavlm.base.pools import num_cores
from megavlm.bench.call_overhead import call_overhead, record_tiny_step
from megavlm.bench.measure_operators import measure_collectives, measure_operators
from megavlm.config.settings import Settings
from megavlm.plan.costs import on_wire
from megavlm.plan.gpus import Gpu
from megavlm.plan.mix import Contents
from megavlm.plan.stage_operators import stage_operators
from megavlm.platform import device, device_name, init, shutdown, total_memory
from megavlm.platform.collectives import all_gather_objects
from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
from megavlm.tracing.operators import Call, Example

_LARGEST = 64 * 2**20  # bytes of a collective


def measured_gpu(settings: Settings, verb: str, mix: Contents, world_size: int) -> Gpu:
    """Measures on all ranks at the same time. This process is in no process group, before and afterwards.

    Its peaks are the best that was measured. Without a second rank, links are taken to be as fast as a network.

    Args:
        settings: the settings of the configuration.
        verb: a key of ``METHODS``.
        mix: the contents of the rows.
        world_size: number of ranks.
    """
    # In a process of its own: who was an absent rank has adaptations to CPUs for the rest of its life.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        examples = other.submit(_recorded, settings, verb, mix, world_size).result()
        tiny_step = other.submit(record_tiny_step).result()
    overhead = call_overhead(tiny_step)
    init(settings.parallel)
    world = dist.group.WORLD
    assert world is not None
    mine = measure_operators(examples, device())
    if world_size > 1:
        mine += measure_collectives(world, device(), _LARGEST)
    of_ranks, overheads = all_gather_objects(mine, world), all_gather_objects(overhead, world)
    shutdown()
    dist.destroy_process_group()
    seconds: dict[Call, list[float]] = defaultdict(list)
    for call, one in itertools.chain.from_iterable(of_ranks):
        seconds[call].append(one)
    points = {call: statistics.mean(of) for call, of in seconds.items()}
    return _gpu(points, statistics.mean(overheads), world_size)


def _recorded(settings: Settings, verb: str, mix: Contents, world_size: int) -> dict[Call, Example]:
    """An example of each operator that a rank of some stage carries out."""
    examples: dict[Call, Example] = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    pipeline = settings.parallel.pipeline
    for stage in range(pipeline):
        rank = world_size // pipeline * stage
        absent = absent_rank(that_can_be_absent(settings), make_method(verb, settings), rank, world_size)
        with absent as (session, (one, *_)):
            row = mix.row(settings, session.shapes)
            stage_operators(one.vlm, one.optimizers, one.objective, row, 1, device(), examples=examples)
    return examples


def _gpu(points: dict[Call, float], overhead: float, world_size: int) -> Gpu:
    def best(rates: list[float]) -> float:
        return max(rates, default=0.0)

    rate = {call: call.flops / seconds for call, seconds in points.items() if call.kind == "product"}
    halves = [of for call, of in rate.items() if call.dtype != "float32"]
    moved = [call.moved / seconds for call, seconds in points.items() if call.kind == "elementwise"]
    sent = [on_wire(call) / seconds for call, seconds in points.items() if call.kind == "collective"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions(("torch", "megatron-core")).items())
    rows = [[c.kind, c.name, list(c.sizes), c.dtype, c.flops, c.moved, seconds] for c, seconds in points.items()]
    return Gpu(
        name=device_name() or "CPU",
        memory_gib=total_memory() / 2**30,
        bf16_tflops=best(halves or list(rate.values())) / 1e12,
        memory_bandwidth=best(moved) / 1e9,
        nvlink=2 * (best(sent) / 1e9 or Gpu.fabric),
        source=f"measured with {versions} on {world_size} {'ranks' if world_size > 1 else 'rank'} at the same time",
        operators={"overhead": overhead, "points": rows},
        cores=num_cores(),
    )

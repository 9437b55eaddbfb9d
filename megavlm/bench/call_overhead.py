"""The time that this process needs for each operator in a step beyond the operator itself, from a tiny model.

It is that of Python, autograd and Megatron around the operator. A GPU computes while the process prepares the next
operators, and an operator that is shorter than its launch is measured with the launch, so there it is taken as zero.
"""

import gc
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megavlm.align.registry import make_method
from megavlm.bench.measure_operators import measure_operators
from megavlm.config.settings import Settings
from megavlm.data.row import Row
from megavlm.model.shapes import Shapes, TextShape, VisionShape
from megavlm.monitor.phases import Phases
from megavlm.optim.optimizers import Optimizers
from megavlm.plan.mix import Mix
from megavlm.plan.stage_operators import Counts, StageOperators, stage_operators
from megavlm.plan.step_memory import RowsAtHand
from megavlm.platform import device, on_gpu, shutdown
from megavlm.runtime.session import start
from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
from megavlm.tracing.operators import Call, Example
from megavlm.training.objective import CrossEntropy
from megavlm.training.step import Step

_ROWS, _TOKENS, _STEPS = 2, 64, 5
_TEXT = TextShape(
    hidden=64, layers=4, heads=2, kv_heads=1, head_dim=32, ffn=128, vocab=512, rms_eps=1e-6, rope_theta=5e6,
    rope_scaling=None, mrope_section=(6, 5, 5), max_positions=262144, attention_bias=False, hidden_act="silu",
    init_std=0.125, moe=None,
)  # fmt: skip
_VISION = VisionShape(  # its rows have no pictures, but its weights are updated
    hidden=384, layers=4, heads=6, ffn=1536, patch_size=16, temporal_patch_size=2, in_channels=3, spatial_merge_size=2,
    num_positions=2304, deepstack_layers=(0, 1, 2), out_hidden=64, hidden_act="gelu_pytorch_tanh", rope_theta=1e4,
    init_std=0.05,
)  # fmt: skip
_TINY = Shapes("qwen3_vl", _TEXT, _VISION, 389, 390, 386, 387, tied=True)

TinyStep = tuple[StageOperators, dict[Call, Example]]
"""The operators of a step of the tiny model, and an example of each."""


def record_tiny_step() -> TinyStep:
    """Records the step without carrying it out. This process must be in no process group.

    The process keeps adaptations to CPUs (``absent_world``).
    """
    examples: dict[Call, Example] = {}
    settings = that_can_be_absent(_settings())
    with absent_rank(settings, make_method("sft", settings), 0, 1, shapes=_TINY) as (_, (one,)):
        where = torch.device("meta")
        found = stage_operators(one.vlm, one.optimizers, one.objective, _row(), _ROWS, where, examples=examples)
    return found, examples


def call_overhead(recorded: TinyStep) -> float:
    """Seconds of a call beyond the operator. This process must be in no process group; 0 on a GPU.

    On a machine with several ranks, call it on all of them at the same time, because they share its cores in a step,
    too.
    """
    if on_gpu():
        return 0.0
    operators, examples = recorded
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seconds = _seconds_of_a_step()  # first: single operators are slow in a process that has computed nothing yet
    known = dict(measure_operators(examples, device()))
    shutdown()
    gc.collect()
    dist.destroy_process_group()
    # Operators that were not measured, such as those that need indices, are tiny here.
    return beyond(operators.of_step(_ROWS, 1), known, seconds)


def beyond(counts: Counts, known: Mapping[Call, float], seconds: float) -> float:
    """Seconds of a step that its operators do not explain, for each call.

    Args:
        counts: how often the step calls each operator.
        known: the measured seconds of operators.
        seconds: those of the step.
    """
    work = sum(count * known.get(call, 0.0) for call, count in counts.items())
    return max(seconds - work, 0.0) / sum(counts.values())


def _settings() -> Settings:
    return Settings(
        model={"hf": Path("tiny"), "load": None},  # the shapes are given, so nothing is read
        data={"seq_length": _TOKENS, "max_pixels": 448 * 448},
        train={"precision": "fp32", "lr": 1e-4, "steps": 10, "global_batch_size": _ROWS},
    )


def _row() -> Row:
    return Mix.of(_settings(), _TINY, pictures=0).row(_settings(), _TINY)


def _seconds_of_a_step() -> float:
    """The median of a few, behind one that is not counted."""
    settings = _settings()
    session = start(settings, training=True, load=False, shapes=_TINY)
    feed = RowsAtHand(session.vlm, [_row()] * _ROWS)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens)
    phases = Phases(session.groups.world_host, measured=True)
    step = Step(session.vlm, Optimizers(session.vlm, settings.train), feed, _ROWS, objective, _ROWS, ["data"],
                partial(phases, "tower"), phases)  # fmt: skip
    seconds = []
    for _ in range(1 + _STEPS):
        began = time.perf_counter()
        with phases.step():
            step.update(feed.rows(_ROWS))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])

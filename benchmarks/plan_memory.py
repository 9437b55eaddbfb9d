"""Planned and measured peak memory of a training step on CPU cores with gloo, of every rank of twenty settings.

    python -m benchmarks.plan_memory [--only NAME …] [--out FILE]

A real step runs forward and backward. Counted is the largest number of bytes of its tensors. Allocated is that of what
torch's allocator for CPUs has handed out, as its profiler records it: it includes what kernels and gloo need for
themselves. Planned is the peak of the same rank without memory. All are without weights, gradients and optimizer state,
which tests/distributed/test_static_memory.py compares to the byte. Models are random and small, tokens are random, and
experts get the tokens that their routers send them: the plan is told the share of the rank.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.ranks import run_ranks, versions

RESULTS = Path("docs/benchmarks/plan_memory.json")
TEXT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
EXPERTS = {**TEXT, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}


class Case(NamedTuple):
    """What differs from two rows of 512 tokens with as many pictures of 96 × 96 pixels as fit, in bf16."""

    processes: int = 1
    text: Mapping[str, Any] = TEXT
    parallel: Mapping[str, Any] = {}
    train: Mapping[str, Any] = {}
    vision: Mapping[str, Any] = {}
    adapter: Mapping[str, Any] = {}
    tokens: int = 512
    rows: int = 2
    pictures: int | None = None
    max_pixels: int = 96 * 96
    freeze: tuple[str, ...] = ()


CASES = {
    "one process": Case(),
    "float32": Case(train={"precision": "fp32"}),
    "rows of 2048 tokens": Case(tokens=2048, rows=1),
    "text alone": Case(pictures=0),
    "large pictures": Case(tokens=1024, max_pixels=448 * 448, pictures=4),
    "12 layers": Case(text={**TEXT, "num_hidden_layers": 12}),
    "recomputed layers": Case(train={"recompute": "full"}),
    "recomputed MLPs and attention": Case(train={"recompute": ["mlp", "core_attn"]}),
    "recomputed tower, chunks": Case(vision={"recompute": True, "chunk_patches": 256}),
    "windows of one row": Case(vision={"window": 1}, rows=4),
    "frozen tower": Case(freeze=("vision", "projector")),
    "LoRA": Case(adapter={"type": "lora", "rank": 8}),
    "experts": Case(text=EXPERTS),
    "experts, EP2": Case(2, EXPERTS, {"expert": 2}),
    "TP2": Case(2, parallel={"tensor": 2}),
    "CP2": Case(2, parallel={"context": 2}),
    "PP2": Case(2, parallel={"pipeline": 2}, rows=4),
    "PP2 × VPP2, recomputed layers": Case(
        2, parallel={"pipeline": 2, "virtual_pipeline": 2}, train={"recompute": "full"}, rows=4
    ),
    "TP2 × PP2": Case(4, parallel={"tensor": 2, "pipeline": 2}, rows=4),
    "TP2 × CP2": Case(4, parallel={"tensor": 2, "context": 2}),
    "experts, EP2 × TP2 × PP2": Case(4, EXPERTS, {"tensor": 2, "pipeline": 2, "expert": 2}, rows=4),
}


def settings_of(folder: str, case: Case) -> Any:
    """The settings of a case. Its weights are those of the folder, which adapters need."""
    from megavlm.config.settings import Settings

    data_parallel = case.processes // max(1, _product(case.parallel, ("tensor", "context", "pipeline")))
    return Settings(
        model={"hf": folder, "load": folder, "freeze": list(case.freeze)},
        data={"seq_length": case.tokens, "max_pixels": case.max_pixels},
        parallel=dict(case.parallel),
        vision=dict(case.vision),
        adapter=dict(case.adapter),
        train={"lr": 1e-3, "steps": 1, "precision": "bf16", "global_batch_size": case.rows * data_parallel}
        | dict(case.train),
    )


def _product(sizes: Mapping[str, int], names: tuple[str, ...]) -> int:
    product = 1
    for name in names:
        product *= sizes.get(name, 1)
    return product


def rows_of(settings: Any, case: Case, shapes: Any) -> list[Any]:
    """The rows of a step: two samples each, with random tokens, so that routers have something to choose by."""
    import torch

    from megavlm.plan.mix import Mix

    row = Mix.of(settings, shapes, samples=2, pictures=case.pictures).row(settings, shapes)
    draw = torch.Generator().manual_seed(0)
    size = len(row.input_ids)
    return [replace(row, input_ids=torch.randint(shapes.text.vocab, (size,), generator=draw)) for _ in range(case.rows)]


def all_measured(cases: Mapping[str, tuple[str, Case]]) -> dict[str, tuple[int, int, float]]:
    """On a rank: ``measured`` of the model's folder and the settings of each case, one after the other."""
    from megavlm import platform

    found = {}
    for name, (folder, case) in cases.items():
        found[name] = measured(folder, case)
        platform.shutdown()
        gc.collect()
    return found


def measured(folder: str, case: Case) -> tuple[int, int, float]:
    """On a rank: the largest numbers of bytes of a step, counted and allocated.

    The third number is how many tokens its experts got, over the mean of the ranks.
    """
    import torch
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megavlm.optim.optimizers import Optimizers
    from megavlm.plan.step_memory import RowsAtHand
    from megavlm.platform import device
    from megavlm.runtime.session import start
    from megavlm.tracing.live_memory import LiveMemory
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = settings_of(folder, case)
    session = start(settings, training=True)
    optimizers, rows = Optimizers(session.vlm, settings.train), rows_of(settings, case, session.shapes)
    got: list[tuple[int, int]] = []
    preprocess = MoEAlltoAllTokenDispatcher.preprocess

    def counted(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        per_expert = preprocess(self, routing_map)
        all_tokens = routing_map.shape[0] * self.config.moe_router_topk * self.tp_size  # of this rank's tensor ranks
        got.append((int(per_expert.sum()), all_tokens))
        return per_expert

    MoEAlltoAllTokenDispatcher.preprocess = counted
    step = Step(
        session.vlm,
        optimizers,
        RowsAtHand(session.vlm, rows),
        len(rows),
        CrossEntropy(["synthetic"], settings.train.logprob_chunk_tokens),
        settings.vision.window,
    )
    step_rows = step.feed.rows(len(rows))
    only_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=only_cpu, profile_memory=True) as profiled, LiveMemory(device()) as counter:
        step.gradients(step_rows)
    MoEAlltoAllTokenDispatcher.preprocess = preprocess
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return counter.peak, peak, sum(a for a, _ in got) / sum(b for _, b in got) if got else 1.0


def planned(folder: str, case: Case, rank: int, imbalance: float) -> int:
    """The largest number of bytes of the same step on a rank that does not exist.

    Plans are for GPUs, whose products of 16-bit matrices are summed in float32. A CPU has no such product, and converts
    both matrices; here, the plan does as well.
    """
    from megavlm.align.registry import make_method
    from megavlm.model import token_logprobs
    from megavlm.plan.step_memory import peak_of
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent

    on_a_cpu = mock.patch.multiple(
        token_logprobs,
        product=lambda left, right: left.float() @ right.float(),
        add_product=lambda total, left, right: total.addmm_(left.float(), right.float()),
    )
    settings, world_size = settings_of(folder, case), case.processes
    method, absent = make_method("sft", settings), that_can_be_absent(settings)
    with absent_rank(absent, method, rank, world_size) as (session, (model,)), on_a_cpu:
        where, rows = next(session.vlm.vision.parameters()).device, rows_of(settings, case, session.shapes)
        window = settings.vision.window
        return peak_of(model.vlm, model.optimizers, model.objective, rows, window, where, imbalance).total


def main() -> None:
    from megavlm.demo.model_folder import make_model_folder

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=CASES, default=list(CASES), help="settings")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"JSON file to write (default: {RESULTS})")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="megavlm-plan-memory-") as root:
        cases = {}
        for number, name in enumerate(options.only):
            case = CASES[name]
            out = Path(root) / str(number)
            make_model_folder(out, text=dict(case.text), moe="num_experts" in case.text, dtype="bfloat16")
            cases[name] = str(out), case
        ranks = {}
        for size in {case.processes for _, case in cases.values()}:
            ranks[size] = run_ranks(size, all_measured, {k: v for k, v in cases.items() if v[1].processes == size})
        for name, (folder, case) in cases.items():
            for rank, of_rank in enumerate(ranks[case.processes]):
                counted, allocated, imbalance = of_rank[name]
                plan = planned(folder, case, rank, imbalance)
                line = {"setting": name, "rank": rank, "counted": counted, "allocated": allocated, "planned": plan}
                line |= {"off_counted": plan / counted - 1, "off_allocated": plan / allocated - 1}
                found.append(line | ({"imbalance": imbalance} if "num_experts" in case.text else {}))
                sizes = " | ".join(f"{size / 2**20:.2f}" for size in (plan, counted, allocated))
                print(f"| {name} | {rank} | {sizes} | {plan / counted - 1:+.2%} | {plan / allocated - 1:+.2%} |")
    for name in ("off_counted", "off_allocated"):
        print(f"largest {name}: {max(abs(line[name]) for line in found):.2%}")
    options.out.write_text(json.dumps({"ranks": found, "versions": versions()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`megavlm plan`: shows what a layout needs on GPUs that need not be there. It starts no processes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megavlm.base.number_format import counted, short
from megavlm.commands.plan_times import figures, times
from megavlm.config.settings import Settings
from megavlm.convert.hf_shapes import model_shapes
from megavlm.plan.balanced_experts import IMBALANCE
from megavlm.plan.gpus import gpu_of
from megavlm.plan.mix import contents_of
from megavlm.plan.plan import SPARE, Plan, StagePlan, make_plan

_GIB = 2**30
# The columns of what a step needs, and the phases in which it is made (``monitor.phases.PHASES``).
_COLUMNS = {
    "decoder": ("decoder", "reference", "reduction", "optimizer", "other"),
    "tower": ("tower",),
    "features": ("exchange", "data"),
    "logits": ("head",),
    "sampling": ("sampling",),
}


def main(
    settings: Settings,
    gpus: int,
    gpu: str = "h100",
    verb: str | None = None,
    samples: int = 1,
    pictures: int | None = None,
    data: Path | None = None,
    imbalance: float = IMBALANCE,
    price: float | None = None,
    as_json: bool = False,
) -> int:
    """Prints the plan of a configuration.

    Args:
        settings: the settings of the configuration.
        gpus: number of GPUs.
        gpu: which GPU.
        verb: the verb for which the configuration is intended; default: a guess from the settings.
        samples, pictures: what each row is assumed to contain (``megavlm.plan.mix.Mix.of``).
        data: summary.json of `megavlm data inspect`, whose rows are assumed instead.
        imbalance: tokens of the busiest expert-parallel rank over their mean.
        price: of a GPU for an hour, in any currency.
        as_json: print one line of JSON instead of tables.

    Raises:
        UserError: the GPU is unknown, or the settings do not fit the model, the verb or the number of GPUs.
    """
    facts = gpu_of(gpu)
    verb = verb or verb_of(settings)
    shapes = model_shapes(settings.model)
    mix = contents_of(settings, shapes, verb, samples=samples, pictures=pictures, data=data)
    plan = make_plan(settings, shapes, verb, gpus, facts, mix=mix, imbalance=imbalance)
    if as_json:
        print(json.dumps(_as_json(plan, price)))
        return 0
    console = Console(highlight=False)
    console.print(_memory(plan))
    console.print(_verdict(plan, settings), soft_wrap=True)
    console.print(_work(plan))
    console.print(times(plan, price), soft_wrap=True)
    console.print(f"[dim]assumed: {plan.mix}. {_CAVEATS}[/]", soft_wrap=True)
    return 0


_CAVEATS = (
    "Activations are those of the portable kernels; those of Transformer Engine keep less. Not counted: CUDA, NCCL and "
    "workspaces of kernels."
)


def verb_of(settings: Settings) -> str:
    """A verb that can use these settings."""
    if settings.stage is not None:
        return "pretrain"
    if settings.rollout.prompts is not None:
        return "ppo" if settings.align.is_changed("critic") else "grpo"
    return "sft"


def _memory(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("stage", "rank"):
        table.add_column(name)
    for name in ("weights", "grads", "optim", "others", *_COLUMNS, "GiB", f"of {plan.gpu.memory_gib:.0f}"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in plan.stages:
        static = (stage.static.weights, stage.static.gradients, stage.static.optimizer, stage.static.further)
        sizes = [*static, *_columns(stage).values(), stage.total]
        share = f"{stage.total / plan.capacity:.0%}"
        table.add_row(str(stage.stage), str(stage.rank), *(f"{size / _GIB:.2f}" for size in sizes), share)
    return table


def _columns(stage: StagePlan) -> dict[str, int]:
    return {name: sum(stage.peak.by_phase.get(p, 0) for p in phases) for name, phases in _COLUMNS.items()}


def _verdict(plan: Plan, settings: Settings) -> str:
    where = f"{plan.world_size} × {plan.gpu.name} ({plan.data_parallel} data-parallel)"
    if plan.fits:
        return f"[green]fits[/] on {where}, with {plan.spare / _GIB:.1f} GiB to spare"
    wanted = (SPARE * plan.capacity - plan.spare) / _GIB
    advice = "; ".join(_advice(plan, settings))
    what = f"{-plan.spare / _GIB:.1f} GiB are missing" if plan.spare < 0 else f"only {plan.spare / _GIB:.1f} GiB spare"
    return (
        f"[red]does not fit[/] on {where}: {what}, and {SPARE:.0%} should be left for what is not counted, so "
        f"{wanted:.1f} GiB must go. Try: {advice}"
    )


def _advice(plan: Plan, settings: Settings) -> list[str]:
    """What makes the fullest stage smaller, that with the largest part first."""
    train, vision = settings.train, settings.vision
    stage = max(plan.stages, key=lambda stage: stage.total)
    parts = _columns(stage) | {"static": stage.static.total}
    found = []
    for name in sorted(parts, key=lambda name: -parts[name]):
        if name == "decoder" and train.recompute != "full":
            found.append("train.recompute=full")
        if name == "tower" and not vision.recompute:
            found.append("vision.recompute=true")
        if name == "features" and vision.window != settings.parallel.pipeline:
            found.append(f"vision.window={settings.parallel.pipeline}")
        if name == "logits" and train.logprob_chunk_tokens > 64:
            found.append(f"train.logprob_chunk_tokens below {train.logprob_chunk_tokens}")
        if name == "sampling":
            found.append("a smaller rollout.cache_gib")
        if name == "static":
            found.append("more GPUs, or a larger parallel.tensor or parallel.pipeline")
    return [*found, f"data.seq_length below {settings.data.seq_length}"]


def _work(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    rows = f"{counted(plan.rows, 'row')}, {short(plan.tokens)} tokens"
    for name in (f"a step: {rows}", *plan.model_flops, "PFLOP", "per GPU"):
        table.add_column(name, justify="right" if not name.startswith("a step") else "left")
    for name, parts in (("of the model", plan.model_flops), ("with what is recomputed", plan.hardware_flops)):
        total = sum(parts.values())
        numbers = [*parts.values(), total, total / plan.world_size]
        table.add_row(name, *(f"{number / 1e15:,.2f}" for number in numbers))
    return table


def _as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """The plan in bytes, FLOPs and seconds."""
    return asdict(plan) | {
        "mix": str(plan.mix),
        "stages": [asdict(stage) | {"total": stage.total} for stage in plan.stages],
        "capacity": plan.capacity,
        "fits": plan.fits,
        "spare": plan.spare,
        **figures(plan, price),
    }

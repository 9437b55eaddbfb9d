"""The part of ``megavlm plan`` that tells how long a step and a run take."""

from dataclasses import asdict

from rich.console import Group
from rich.table import Table

from megavlm.base.number_format import counted
from megavlm.plan.as_json import figures
from megavlm.plan.plan import Plan
from megavlm.report.plan_workers import workers_told

_TOP = 6  # operators that are shown


def times(plan: Plan, price: float | None = None) -> Group:
    """Tables about the time of a step, what it is spent on, and the run.

    Args:
        plan: the plan.
        price: of a GPU for an hour, in any currency.
    """
    facts, time = figures(plan, price), plan.time
    step = _table(f"{what(plan)} takes {time.seconds:.3g} s", "seconds", "share")
    for name, seconds in sorted(time.parts.items(), key=lambda part: -part[1]):
        if seconds:
            step.add_row(name, f"{seconds:.3g}", f"{seconds / time.seconds:.0%}")
    sent = _table("sent by a rank", "GB", "calls", "seconds")
    for name, traffic in time.traffic.items():
        sent.add_row(name, f"{traffic.volume / 1e9:.3g}", f"{traffic.count:,}", f"{traffic.seconds:.3g}")
    longest = _table("longest operators", "calls", "seconds")
    for one in time.operators[:_TOP]:
        longest.add_row(one.name, f"{one.count:,}", f"{one.count * one.seconds:.3g}")
    cost = f", {facts['cost']:,.0f} at {price:g} for a GPU and hour" if facts["cost"] is not None else ""
    speed = (
        f"{facts['tokens_per_second']:,.0f} tokens/s and {facts['model_tflops']:.0f} TFLOP/s of the model per GPU, "
        f"MFU {facts['mfu']:.1%} of {plan.gpu.bf16_tflops:g} dense bf16 TFLOP/s"
    )
    if plan.samples:
        run = "how long the run takes is not known: sampling, rewards and models beside the main one are not timed"
    elif plan.steps is None:
        run = "how long the run takes is not known: its length is given in epochs"
    else:
        run = (
            f"{counted(plan.steps, 'step')}: {facts['hours']:,.1f} hours, {facts['gpu_hours']:,.0f} GPU hours{cost}, "
            "without reading data, checkpoints and evaluation"
        )
    return Group(step, sent, longest, speed, run, _checkpoint(plan), *_workers(plan))


def what(plan: Plan) -> str:
    """What is timed: a step, or of methods that sample their answers, an update of as many rows as are assumed."""
    return "an update" if plan.samples else "a step"


def _workers(plan: Plan) -> list[str]:
    if plan.workers is None:
        return []
    told = workers_told(asdict(plan.workers), plan.time.seconds)
    return [told.needed, *(f"[yellow]{warning}[/]" for warning in told.warnings)]


def _checkpoint(plan: Plan) -> str:
    one, storage = plan.checkpoint, plan.gpu.operators["storage"]
    meanwhile = "while the run goes on" if one.background else "while the run waits"
    size = f"{one.size / 1e9:,.3g} GB"
    return f"a checkpoint: {size}, {one.seconds:,.0f} s {meanwhile}, if a host writes {storage:g} GB in a second"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(title)
    for column in columns:
        table.add_column(column, justify="right")
    return table

"""`megavlm plan`: shows what a layout needs on GPUs that need not be there. It starts no processes."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavlm.base.errors import UserError
from megavlm.base.number_format import counted, short
from megavlm.base.pools import num_cores
from megavlm.commands import plan_search
from megavlm.commands.plan_times import times, what
from megavlm.commands.plan_words import verb_of, verdict
from megavlm.config.settings import Settings
from megavlm.convert.hf_shapes import model_shapes
from megavlm.plan.as_json import caveats, plan_json
from megavlm.plan.gpus import gpu_of
from megavlm.plan.mix import contents_of
from megavlm.plan.plan import Plan, make_plan
from megavlm.report.plan_memory import GIB, activation_parts
from megavlm.report.plan_page import check_new_file, write_plan_page
from megavlm.tracing.balanced_experts import IMBALANCE


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
    search: bool = False,
    write: Path | None = None,
    as_json: bool = False,
    page: Path | None = None,
) -> int:
    """Prints the plan of a configuration, or the best layouts for it.

    Args:
        settings: the settings of the configuration.
        gpus: number of GPUs.
        gpu: which GPU.
        verb: the verb for which the configuration is intended; default: a guess from the settings.
        samples, pictures: what each row is assumed to contain (``megavlm.plan.mix.Mix.of``).
        data: summary.json of `megavlm data inspect`, whose rows are assumed instead.
        imbalance: tokens of the busiest expert-parallel rank over their mean.
        price: of a GPU for an hour, in any currency.
        search: look for the fastest layout.
        write: a file for the best layout that was found.
        as_json: print one line of JSON instead of tables.
        page: an HTML file to write, too; it must not exist.

    Raises:
        UserError: the GPU is unknown, ``page`` or ``write`` exists, or the settings do not fit the model, the verb or
            the number of GPUs, or no layout does.
    """
    facts = gpu_of(gpu)
    if page is not None:
        check_new_file(page)
    verb = verb or verb_of(settings)
    if write is not None and not search:
        raise UserError("--write names a file for the result of a search", "give --search, too")
    shapes = model_shapes(settings.model)

    number = gpus

    def plan_of(own: Settings, *, exact: bool, gpus: int | None = None, processes: int = 1) -> Plan:
        mix = contents_of(own, shapes, verb, samples=samples, pictures=pictures, data=data)
        sizes = gpus or number, facts
        return make_plan(own, shapes, verb, *sizes, mix=mix, imbalance=imbalance, exact=exact, processes=processes)

    if search:
        return plan_search.show(
            settings, shapes, gpus, facts, plan_of, write=write, as_json=as_json, page=page, verb=verb
        )
    plan = plan_of(settings, exact=True, processes=num_cores())
    if page is not None:
        write_plan_page(page, plan_json(plan, price), settings, verb)
    if as_json:
        print(json.dumps(plan_json(plan, price)))
        return 0
    console = Console(highlight=False)
    memory = _memory(plan)
    # A terminal that is narrower breaks the lines; rich would leave out columns.
    console.print(memory, width=max(console.width, console.measure(memory).maximum), crop=False, no_wrap=True)
    console.print(_phases(plan))
    console.print(verdict(plan, settings), soft_wrap=True)
    console.print(_work(plan))
    console.print(times(plan, price), soft_wrap=True)
    console.print(f"[dim]assumed: {plan.mix}. {caveats(plan)}[/]", soft_wrap=True)
    if page is not None:
        console.print(f"page: {page}", soft_wrap=True, markup=False)
    return 0


def _memory(plan: Plan) -> Table:
    """A line for each stage. Parts that no stage has are left out, so that the table fits a usual terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    sizes = [
        {
            "weights": stage.static.weights,
            "grads": stage.static.gradients,
            "optim": stage.static.optimizer,
            "others": stage.static.others,
            **activation_parts(stage.peak.by_phase),
            "GiB": stage.total,
        }
        for stage in plan.stages
    ]
    names = [name for name in sizes[0] if any(of_stage[name] for of_stage in sizes)]
    for name in ("stage", "rank", *names, f"of {plan.gpu.memory_gib:.0f}"):
        table.add_column(name, justify="left" if name in ("stage", "rank") else "right", no_wrap=True)
    for stage, of_stage in zip(plan.stages, sizes, strict=True):
        numbers = (f"{of_stage[name] / GIB:.2f}" for name in names)
        table.add_row(str(stage.stage), str(stage.rank), *numbers, f"{stage.total / plan.capacity:.0%}")
    return table


def _phases(plan: Plan) -> Table:
    """A line for each stage: all that it holds at the fullest moment of each phase of a run."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("stage, GiB in the phases")
    for moment in plan.stages[0].moments:
        table.add_column(moment.name, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(str(stage.stage), *(f"{moment.total / GIB:.2f}" for moment in stage.moments))
    return table


def _work(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    name_of_rows = f"{what(plan)}: {counted(plan.rows, 'row')}, {short(plan.tokens)} tokens"
    for name in (name_of_rows, *plan.model_flops, "PFLOP", "per GPU"):
        table.add_column(name, justify="left" if name == name_of_rows else "right")
    for name, parts in (("of the model", plan.model_flops), ("with what is recomputed", plan.hardware_flops)):
        total = sum(parts.values())
        numbers = [*parts.values(), total, total / plan.world_size]
        table.add_row(name, *(f"{number / 1e15:,.2f}" for number in numbers))
    return table

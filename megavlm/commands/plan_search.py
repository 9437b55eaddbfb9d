"""`megavlm plan --search`: shows the fastest layouts of a number of GPUs, and writes the best as a configuration."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megavlm.base import atomic_files, command_line, yaml_files
from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.plan.as_json import plan_json
from megavlm.plan.gpus import Gpu
from megavlm.report.plan_page import write_plan_page
from megavlm.search.candidate import Candidate
from megavlm.search.layouts import with_changes
from megavlm.search.search import BEST, different, enough_gpus, search
from megavlm.search.work import PlanOf

_GIB = 2**30
_FORMS = "{:.3g}", "{:,.0f}", "{:.1%}", "{:.1f}"
_REASONS = 12  # lines of reasons


def show(
    settings: Settings,
    shapes: Shapes,
    gpus: int,
    gpu: Gpu,
    plan_of: PlanOf,
    *,
    write: Path | None,
    as_json: bool,
    page: Path | None,
    verb: str,
) -> int:
    """Searches, prints what was found and, with ``write``, writes the best layout. See ``commands.plan.main``.

    ``plan_of``: see ``search``.

    Raises:
        UserError: no layout fits, or ``write`` exists.
    """
    if write is not None and write.exists():
        raise UserError(f"--write {write} exists already", "name a file that does not exist")
    with _progress() as progress:
        found = search(settings, shapes, gpus, gpu, plan_of, progress=progress)
    best = [different(candidate, settings) for candidate in found if candidate.ruled_out is None]
    if not best:
        enough = enough_gpus(settings, shapes, gpus, gpu, plan_of)
        raise UserError(f"no layout of {gpus} × {gpu.name} fits", _remedy(found, enough))
    if as_json:
        print(json.dumps([candidate.facts() for candidate in found]))
    else:
        console = Console(highlight=False)
        console.print(_table(best[:BEST], gpu))
        console.print(_ruled_out(found))
    messages = Console(stderr=True, highlight=False)
    if write is not None:
        atomic_files.write_text(write, _yaml(best[0], write))
        messages.print(f"the first layout is in {write}", soft_wrap=True, markup=False)
    if page is not None:
        own = with_changes(settings, found[0].changes)
        layouts = [different(candidate, settings).facts() for candidate in found]
        shown = plan_json(plan_of(own, exact=True)) | {"candidates": layouts}
        write_plan_page(page, shown, own, verb)
        messages.print(f"page: {page}", soft_wrap=True, markup=False)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("layouts", total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def _table(best: Sequence[Candidate], gpu: Gpu) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("s a step", "tokens/s", "MFU", f"GiB of {gpu.memory_gib:.0f}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("changes")
    for one in best:
        figures = one.seconds, one.tokens_per_second, one.mfu, (one.memory or 0) / _GIB
        shown = (form.format(figure) for form, figure in zip(_FORMS, figures, strict=True))
        table.add_row(*shown, " ".join(_override(*change) for change in one.changes.items()) or "none")
    return table


def _ruled_out(found: Sequence[Candidate]) -> Table:
    """How many layouts were ruled out, by reason."""
    reasons = Counter(_kind(candidate.ruled_out) for candidate in found if candidate.ruled_out is not None)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layouts", justify="right")
    table.add_column("ruled out")
    table.add_row(str(sum(candidate.ruled_out is None for candidate in found)), "not")
    for reason, count in reasons.most_common(_REASONS):
        table.add_row(str(count), reason)
    if len(reasons) > _REASONS:
        table.add_row(str(sum(reasons.values()) - sum(n for _, n in reasons.most_common(_REASONS))), "other reasons")
    return table


def _kind(reason: str) -> str:
    """The reason without the number of GiB, rounded up to a power of two."""
    needed = re.fullmatch(r"needs ([\d.]+) GiB more", reason)
    if needed is None:
        return reason
    size = 1
    while size < float(needed[1]):
        size *= 2
    return f"needs up to {size} GiB more"


def _remedy(found: Sequence[Candidate], enough: tuple[int, dict[str, Any]] | None) -> str:
    """What would fit, and what comes nearest."""
    words = "shorten the rows, or choose a GPU with more memory"
    if enough is not None:
        words = f"{counted(enough[0], 'GPU')} {'is' if enough[0] == 1 else 'are'} enough, with {_overrides(enough[1])}"
    planned = [candidate for candidate in found if candidate.memory is not None]
    if planned:
        least = min(planned, key=lambda candidate: candidate.memory or 0)
        words += f"; the smallest layout that was planned {least.ruled_out}: {_overrides(least.changes)}"
    return words


def _overrides(changes: Mapping[str, Any]) -> str:
    """The changes as arguments for the command line, but sizes of 1 and what is not set."""
    plain = {name: value for name, value in changes.items() if value not in (1, None) or value is True}
    return " ".join(_override(*change) for change in plain.items())


def _override(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value) if not isinstance(value, str) else value}".replace(" ", "")


def _yaml(best: Candidate, path: Path) -> str:
    """A configuration that inherits from the given one, with what was changed on the command line and by the search."""
    config, overrides = command_line.given()
    values = yaml_files.Values()
    for override in overrides:
        values.update(yaml_files.parse_override(override))
    tree = values.tree
    for name, value in best.changes.items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    base = os.path.relpath(config, path.resolve().parent)
    return "# The fastest layout that `megavlm plan --search` found.\n" + yaml_files.dump({"base": base, **tree})

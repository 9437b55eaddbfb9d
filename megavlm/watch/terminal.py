"""Runs on the terminal: a line about each, their curves as text, and their newest warnings."""

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megavlm.base.number_format import duration
from megavlm.report.loss_plot import smooth
from megavlm.watch.braille import Line, plot
from megavlm.watch.follow import FollowedRun, is_main, sorted_fields

SECONDS = 2.0  # between two looks at the files
_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red")
_HEIGHT, _LEAST = 14, 9  # rows of a plot where there is room, and at the least
_NOTES = 4


def show(runs: Sequence[FollowedRun], fields: Sequence[str], console: Console, *, is_log: bool, once: bool) -> None:
    """Shows runs until Ctrl-C, which raises KeyboardInterrupt.

    Args:
        runs: the runs.
        fields: the fields to draw; if there are none, as many of the main ones as there is room for.
        console: where to show them.
        is_log: whether scales are logarithmic.
        once: show them once and return.
    """
    if once:
        console.print(screen(runs, fields, console.width, None, is_log=is_log))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(screen(runs, fields, console.width, console.height - 1, is_log=is_log), refresh=True)
            time.sleep(SECONDS)


def screen(
    runs: Sequence[FollowedRun], fields: Sequence[str], width: int, height: int | None, *, is_log: bool = False
) -> Group:
    """What is shown now, in this many columns and rows; ``height`` None: as many rows as are needed."""
    for run in runs:
        run.read()
    head = [_about(run, style) for run, style in _styled(runs)]
    notes = [Text(f"! {note}", style="yellow") for run in runs for note in run.notes[-_NOTES:]][-_NOTES:]
    for line in (*head, *notes):
        line.no_wrap, line.overflow = True, "ellipsis"
    shown = list(fields) or _main(runs)
    rows = _HEIGHT
    if height is not None:
        room = height - len(head) - len(notes)
        if not fields:
            shown = shown[: max(room // _LEAST, 1)]
        rows = max(min(room // max(len(shown), 1), 2 * _HEIGHT), 5)
    plots = [plot(name, list(_lines(runs, name, width)), width, rows, is_log=is_log) for name in shown]
    return Group(*head, *plots, *notes)


def _styled(runs: Sequence[FollowedRun]) -> list[tuple[FollowedRun, str]]:
    return [(run, _STYLES[index % len(_STYLES)]) for index, run in enumerate(runs)]


def _main(runs: Sequence[FollowedRun]) -> list[str]:
    """The main fields that the runs have, but at least the loss."""
    known = sorted_fields(name for run in runs for name in run.fields)
    return [name for name in known if is_main(name)] or ["loss"]


def _lines(runs: Sequence[FollowedRun], field: str, width: int) -> list[Line]:
    lines = []
    for run, style in _styled(runs):
        points = run.points(field, 2 * width)
        values = [value for value in smooth(points.means) if value is not None]
        lines.append(Line(points.steps, values, style))
    return lines


def _about(run: FollowedRun, style: str) -> Text:
    facts = run.facts()
    if facts["step"] is None:
        told = ["no step yet"]
    else:
        of = f" of {facts['total']}" if facts["total"] else ""
        is_done = facts["total"] is not None and facts["step"] >= facts["total"]
        told = [f"step {facts['step']}{of}"]
        value = "loss" if facts["reward"] is None else "reward"
        told += [f"{value} {facts[value]}"] if facts[value] is not None else []
        told.append("done" if is_done else f"{duration(facts['ago'])} ago")
        told += [f"{duration(facts['left'])} left"] if facts["left"] is not None and not is_done else []
    return Text.assemble(("● ", style), (run.name, f"bold {style}"), "  ", " · ".join(told))

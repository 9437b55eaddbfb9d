"""The terminal output of a training run: a header, then a live progress bar, or plain lines without a terminal."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megavlm.base.number_format import duration, number, percent, short

RECENT_STEPS = 50  # number of recent steps from which the remaining time is estimated


class Progress:
    """Shows the steps of a run. Use it as a context manager.

    On a terminal, it shows a progress bar with the latest numbers below it, redrawn four times a second, and messages
    above it. Without a terminal (a SLURM log, a pipe), it prints a line for the first step, for the last step, and for
    each step that is a multiple of `every`.

    Args:
        total_steps: number of steps of the whole run, including those before a resume.
        start_step: the step from which the run continues, 0 for a new run.
        title: heading of the header, such as "pretrain · stage 0".
        header: name → text, the rows of the header (model, layout, data, output …).
        every: number of steps between two lines if there is no terminal.
        enabled: False on all ranks except rank 0; then all calls do nothing.
        stream: the output stream; default: standard output.
        width: width of the display in columns; default: that of the terminal.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        title: str = "training",
        header: Mapping[str, str] | None = None,
        every: int = 10,
        enabled: bool = True,
        stream: TextIO | None = None,
        width: int | None = None,
    ):
        self.total_steps = total_steps
        self.title = title
        self.header = dict(header or {})
        self.every = every
        self.enabled = enabled
        stream = stream or sys.stdout
        self.is_terminal = stream.isatty()
        self._console = Console(file=stream, highlight=False, width=width)
        self._stream = stream
        self._live: Live | None = None
        self._step = self._start = start_step
        self._line: dict[str, Any] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._began = time.monotonic()

    def __enter__(self) -> "Progress":
        if not self.enabled:
            return self
        self._began = time.monotonic()
        self._show_header()
        if self.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._render, refresh_per_second=4, vertical_overflow="visible"
            )
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, line: Mapping[str, Any]) -> None:
        """Shows one step; `line` has the fields of metrics.jsonl (`megavlm.monitor.metrics.REQUIRED`)."""
        if not self.enabled:
            return
        self._step, self._line = line["step"], dict(line)
        self.total_steps = max(self.total_steps, self._step)  # the number of steps of epochs is an estimate
        self._seconds.append(line["seconds"])
        if self._step - self._start == 2 and len(self._seconds) == 2:
            self._seconds.popleft()  # the first step includes warm-up: kernels, caches, data workers
        first, last = self._step == self._start + 1, self._step == self.total_steps
        if not self.is_terminal and (first or last or self._step % self.every == 0):
            print(plain_line(line, self.total_steps, self.remaining_seconds()), file=self._stream, flush=True)

    def say(self, message: str) -> None:
        """Prints a message, such as a warning or a written checkpoint; above the bar if there is one."""
        if not self.enabled:
            return
        if self.is_terminal:
            self._console.print(Text(message), soft_wrap=True)
        else:
            print(message, file=self._stream, flush=True)

    def remaining_seconds(self) -> float | None:
        """The estimated remaining time, from the mean of the latest steps; None before the first step."""
        if not self._seconds:
            return None
        return (self.total_steps - self._step) * sum(self._seconds) / len(self._seconds)

    def _show_header(self) -> None:
        title = self.title + (f" · continued after step {self._start}" if self._start else "")
        if self.is_terminal:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for name, value in self.header.items():
                grid.add_row(name, Text(str(value)))
            self._console.print(Panel(grid, title=f"[bold]{title}[/]", title_align="left", border_style="cyan"))
        else:
            width = max(map(len, self.header), default=0)
            rows = [f"   {name:<{width}}  {value}" for name, value in self.header.items()]
            print("\n".join([f"== {title}", *rows]), file=self._stream, flush=True)

    def _render(self) -> Group:
        elapsed = time.monotonic() - self._began
        bar = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            Text(f"step {self._step}/{self.total_steps}", style="bold"),
            ProgressBar(total=self.total_steps, completed=self._step, complete_style="cyan"),
            Text(percent(self._step / self.total_steps, 0), style="cyan"),
            Text(f"{duration(elapsed)} · {duration(self.remaining_seconds())} left", style="dim"),
        )
        if not self._line:
            return Group(bar, Text("waiting for the first step", style="dim"))
        details = [Text.assemble((f"{name} ", "dim"), (value, style)) for name, value, style, _ in _facts(self._line)]
        return Group(bar, *_fill_lines(details, self._console.width))


def _fill_lines(details: list[Text], width: int) -> list[Text]:
    """Arranges the details on as many lines as they need, without a line break inside a detail."""
    lines = [details[0]]
    for fact in details[1:]:
        joined = Text.assemble(lines[-1], "  ", fact)
        if joined.cell_len <= width:
            lines[-1] = joined
        else:
            lines.append(fact)
    return lines


def plain_line(line: Mapping[str, Any], total_steps: int, remaining_seconds: float | None) -> str:
    """One step as one line of text, with columns aligned to those of the other steps."""
    details = "  ".join(f"{name} {value:<{width}}" for name, value, _, width in _facts(line))
    return f"step {line['step']:>{len(str(total_steps))}}/{total_steps}  {details}  left {duration(remaining_seconds)}"


def _facts(line: Mapping[str, Any]) -> list[tuple[str, str, str, int]]:
    """(name, value, style, width in a plain line) for each number that is shown."""
    details = [
        ("loss", number(line["loss"]), "bold green", 6),
        *((name, text(line[field]), "bold", width) for field, name, text, width in _OF_METHODS if field in line),
        ("lr", f"{line['lr']:.2e}", "", 8),
        ("grad norm", number(line["grad_norm"], 3), "", 6),
        ("tokens/s", short(line["tokens_per_second"]), "", 5),
        ("images/s", short(line["images"] / line["seconds"]), "", 5),
        ("packed", percent(line["packing"], 0), "", 5),
        ("MFU", percent(line["mfu"]), "", 6),
        ("GiB", number(line["memory_gib"], 3), "", 4),
    ]
    return [fact for fact in details if not (fact[0] == "MFU" and line["mfu"] is None)]


# Fields of single methods that are worth a look in each step (of those that compare answers, train.kl_to_start, and
# reinforcement learning): field, name, format, width in a plain line.
_OF_METHODS: list[tuple[str, str, Callable[[float | None], str], int]] = [
    ("accuracy", "accuracy", percent, 7),
    ("margin", "margin", number, 6),
    ("kl_to_start", "KL", number, 6),
    ("reward", "reward", number, 6),
    ("answer_tokens", "answer tokens", short, 5),
    ("truncated_share", "cut off", percent, 7),
]

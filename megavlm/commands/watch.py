"""`megavlm watch`: runs while they train, on a local page or on the terminal. It only reads; torch is not imported."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.watch.follow import find_runs
from megavlm.watch.server import PageServer
from megavlm.watch.terminal import show


def main(
    outputs: Sequence[Path],
    text: bool = False,
    once: bool = False,
    log: bool = False,
    field: Sequence[str] = (),
    port: int | None = None,
) -> int:
    """Shows the runs until Ctrl-C, which is its good end: status 0.

    Args:
        outputs: output folders, or folders that contain some.
        text: on the terminal instead of a page.
        once: only with text: once. It is also shown once where there is no terminal.
        log, field: only with text: logarithmic scales; the fields to draw.
        port: only without text: the port of the page; None: a free one.
    """
    if text and port is not None:
        raise UserError("--port is for the page, and --text shows none", "leave out one of them")
    if not text and (given := [name for name, value in (("once", once), ("log", log), ("field", field)) if value]):
        raise UserError(f"--{given[0]} is for --text; the page has it as a control", "add --text, or leave it out")
    runs = find_runs(outputs)
    try:
        if text:
            console = Console(highlight=False)
            show(runs, field, console, is_log=log, once=once or not console.is_terminal)
        else:
            with PageServer(runs, port) as server:
                print(f"watching {counted(len(runs), 'run')} at {server.url}  (Ctrl-C ends)", flush=True)
                server.serve_forever()
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind the ^C of the terminal
    return 0

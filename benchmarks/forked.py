"""The command in forks of this process, which have what it has imported: a new interpreter needs many seconds."""

import multiprocessing
import sys

FORK = multiprocessing.get_context("fork")


def command(*arguments: object) -> None:
    """`megavlm ARGUMENTS` in a fork of this process, with one thread. Ends the script if it fails."""
    process = FORK.Process(target=_command, args=([str(argument) for argument in arguments],))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"megavlm {' '.join(map(str, arguments))}: exit status {process.exitcode}")


def _command(arguments: list[str]) -> None:
    import torch

    from megavlm.cli.main import main as megavlm

    torch.set_num_threads(1)
    sys.exit(megavlm(arguments))

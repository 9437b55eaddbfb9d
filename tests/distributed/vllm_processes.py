"""The processes of a server of vLLM that a run has started, and how many requests it is working on."""

import os
from pathlib import Path

import psutil


def server_of(output: Path) -> psutil.Process | None:
    """The process that serves the run in a folder, started below this one; None: there is none now."""
    for process in psutil.Process().children(recursive=True):
        try:  # it leads the group of all that it starts
            if process.cwd() == str(output / "vllm") and os.getpgid(process.pid) == process.pid:
                return process
        except (psutil.Error, OSError):
            continue
    return None


def engine_of(server: psutil.Process) -> psutil.Process | None:
    """The engine that a server has forked; None: none yet, or no more."""
    try:
        children = server.children(recursive=True)
        return next((child for child in children if "EngineCore" in " ".join(child.cmdline())), None)
    except psutil.Error:
        return None


def connections_of(server: psutil.Process) -> int:
    """The number of requests whose answers are awaited: each has a connection of its own."""
    try:
        port, connections = _port_of(server), server.net_connections(kind="tcp")
    except (psutil.Error, ValueError):
        return 0
    return sum(one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED for one in connections)


def requests_to(server: psutil.Process) -> int:
    """The number of connections of this process to a server, which need not have accepted them."""
    port, connections = _port_of(server), psutil.Process().net_connections(kind="tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED and one.raddr.port == port for one in connections)


def _port_of(server: psutil.Process) -> int:
    command = server.cmdline()
    return int(command[command.index("--port") + 1])


def processes_in(folder: Path) -> list[psutil.Process]:
    """All processes of this machine whose working directory is in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found

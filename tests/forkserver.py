"""One server process with torch, Megatron, transformers and megavlm imported; the tests fork their processes off it.

Those imports take some 7 seconds of a core in every new interpreter, a fork some hundredths of one.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MEGAVLM_PLATFORM": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}
PRELOAD = ["preload"]
_HERE = Path(__file__).parent


def forkserver() -> multiprocessing.context.ForkServerContext:
    """multiprocessing's "forkserver", running, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with _of_server():
        multiprocessing.forkserver.ensure_running()
    return context


class OtherServer(multiprocessing.forkserver.ForkServer):
    """A second server, beside the one that multiprocessing has for a process.

    Args:
        preload: module that it imports.
        path: folders of further packages.
    """

    def __init__(self, preload: str, path: list[str]):
        super().__init__()
        self.path = path
        self.set_forkserver_preload([preload])

    def start(self, process: multiprocessing.context.ForkServerProcess) -> None:
        """Starts a process of multiprocessing's "forkserver" off this server."""
        connect = mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", self.connect_to_new_process)
        with _of_server(self.path), connect:
            process.start()


def _of_server(more: list[str] | None = None) -> contextlib.AbstractContextManager[None]:
    """Environment of a server, with ``more`` folders of packages."""
    path = [str(_HERE), str(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")]), *(more or [])]
    return environment({**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)})


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """These variables as well, for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

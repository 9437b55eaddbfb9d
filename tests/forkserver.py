"""One server process with torch, Megatron, transformers and megavlm imported; the tests fork their processes off it.

Those imports take some 15 seconds of a core in every new interpreter, a fork some hundredths of one.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Iterator
from pathlib import Path

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
    path = [str(_HERE), str(_HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with environment({**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path)}):
        multiprocessing.forkserver.ensure_running()
    return context


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

"""Every job finds what it imports when it comes first, in a process with nothing else of megavlm.

Most tests run jobs in forks of a process that has imported all of it, where a circular import would not show.
"""

import importlib
import sys
import traceback

import pytest
from forkserver import forkserver

from megavlm.align.registry import METHODS
from megavlm.cli.verbs import VERBS

TARGETS = [verb.target for verb in VERBS.values()] + [method.make for method in METHODS.values()]
MODULES = sorted({target.partition(":")[0] for target in TARGETS})


def import_first(module: str, sender) -> None:
    """Runs in a fork: takes megavlm out of it, imports one module, and sends the traceback, or "" if all is well."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "megavlm"]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
        sender.send("")
    except BaseException:
        sender.send(traceback.format_exc())


@pytest.mark.parametrize("module", MODULES)
def test_a_job_can_be_imported_first(module):
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=import_first, args=(module, sender))
    process.start()
    sender.close()
    assert receiver.recv() == ""
    process.join()

"""The other side of pool.py: what runs in each process of a world."""

import datetime
import faulthandler
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from forkserver import ENVIRONMENT


@dataclass
class Failure:
    """What a rank reports in place of a result."""

    text: str
    exception: BaseException | None = None


def work(rank: int, world_size: int, port: int, connection, log: str, after_each: tuple | None) -> None:
    """A worker's life: one call after another until its input ends."""
    os.setpgid(0, 0)  # so that its own children can be killed with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True)
    threading.Thread(target=_end_with_parent, args=(os.path.dirname(log),), daemon=True).start()
    os.environ |= ENVIRONMENT | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # some containers cannot resolve their own host name

    import torch
    import torch.distributed as dist
    from gloo_device import share_device

    share_device()
    torch.set_num_threads(1)
    gc.freeze()  # a collection after each call need not look at all of torch and Megatron again
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if message is None:
            _clean_up(after_each)
            continue
        call, path, function, arguments = message
        try:
            sys.path[:] = path  # pytest adds a folder for each test module
            function = _load(function)
            args, kwargs = pickle.loads(arguments)
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(f"call{call}", store),
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(hours=1),  # the pool's own timeout comes first, and says where it hangs
            )
            report = pickle.dumps(function(*args, **kwargs))
        except BaseException as error:
            report = _pickled_failure(error)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(report)


def _clean_up(after_each: tuple | None) -> None:
    import torch.distributed as dist

    if after_each is not None:
        _load(after_each)()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_parent(folder: str) -> None:
    """Waits for the end of the process that has the pool; if that comes first, leaves nothing behind."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _pickled_failure(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        report = pickle.dumps(Failure(text, error))
        pickle.loads(report)  # some exceptions can be pickled but not made again
        return report
    except Exception:
        return pickle.dumps(Failure(text, RuntimeError(f"{type(error).__name__}: {error}")))


def _load(address: tuple[str, str, str]) -> Callable:
    """The function of an `address`; its module comes from the path, or else straight from its file."""
    module_name, file, name = address
    module = sys.modules.get(module_name)
    if module is None or getattr(module, "__file__", None) != file:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            module = None
        if module is None or getattr(module, "__file__", None) != file:
            spec = importlib.util.spec_from_file_location(module_name, file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
    for part in name.split("."):
        module = getattr(module, part)
    return module


def name_of(function: Callable) -> str:
    """module.name, for messages."""
    return f"{function.__module__}.{function.__qualname__}"


def address(function: Callable) -> tuple[str, str, str]:
    """(module, its file, name): enough to find the function in a process where pytest has imported nothing."""
    if "<" in function.__qualname__:  # <locals>, <lambda>
        raise TypeError(f"{name_of(function)} must stand at the top level of a module to run in other processes")
    return function.__module__, inspect.getfile(inspect.unwrap(function)), function.__qualname__

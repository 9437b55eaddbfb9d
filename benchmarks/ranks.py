"""Local ranks for the benchmarks: processes that use gloo, with one core each, or a GPU each."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def run_ranks(size: int, function: Callable, *args, gpus: bool = False) -> list:
    """Runs ``function(*args)`` in ``size`` new processes with RANK, WORLD_SIZE, … set, and returns results by rank.

    With ``gpus`` each has a GPU and NCCL instead of a core and gloo.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_rank, rank, size, port, gpus, function, args) for rank in range(size)]
        return [future.result() for future in futures]


def _rank(rank: int, size: int, port: int, gpus: bool, function: Callable, args: tuple):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    if not gpus:
        os.environ["MEGAVLM_PLATFORM"] = "cpu"
    import torch

    if not gpus:
        torch.set_num_threads(1)
    result = function(*args)
    torch.distributed.barrier()
    return result


def versions() -> dict:
    """The properties of the machine and the versions of packages on which results depend."""
    import platform

    import megatron.core
    import torch

    cores = len(os.sched_getaffinity(0))
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": megatron.core.__version__,
        "cores": cores,
    }

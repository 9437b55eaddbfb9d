"""All gloo groups of a process share one network device.

torch gives each group a device of its own, with a thread that wakes up a hundred times a second. A rank has up to fifty
groups, and those of a pool's many ranks keep a core busy although nobody sends anything. Runs of users are left as they
are: a run of the demo with two ranks, which do send, took 5 % longer with a shared device (two pairs of runs).
"""

import datetime
import os
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

# By the number of the process: a forked one does not have the threads of its parent.
_devices: dict[int, list[Any]] = {}


def share_device() -> None:
    """From now on, gloo groups of this process are made with the same device. A second call does nothing."""
    distributed_c10d.ProcessGroupGloo = _SharedDevice  # type: ignore[misc]


class _SharedDevice(dist.ProcessGroupGloo):
    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta):
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout, options._devices = timeout, _shared()
        super().__init__(store, rank, size, options)


def _shared() -> list[Any]:
    """One device, or one for each network interface that GLOO_SOCKET_IFNAME names, as torch chooses them."""
    if os.getpid() not in _devices:
        named = os.environ.get("GLOO_SOCKET_IFNAME")
        _devices[os.getpid()] = (
            [dist.ProcessGroupGloo.create_device(interface=name) for name in named.split(",")]
            if named
            else [dist.ProcessGroupGloo.create_default_device()]
        )
    return _devices[os.getpid()]

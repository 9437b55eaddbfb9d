"""The device and backend under Megatron-core: CUDA + NCCL, or CPU + gloo. Only this folder asks if there is a GPU."""

from megavlm.platform.absent import absent_world
from megavlm.platform.device import (
    allocated,
    backend,
    device,
    device_name,
    host_buffer,
    mark,
    memory_gib,
    named_range,
    on_gpu,
    reached,
    reset_memory,
    seconds_between,
    seed_everything,
    synchronize,
    to_device,
)
from megavlm.platform.groups import Groups, init, shutdown

__all__ = [
    "Groups",
    "absent_world",
    "allocated",
    "backend",
    "device",
    "device_name",
    "host_buffer",
    "init",
    "mark",
    "memory_gib",
    "named_range",
    "on_gpu",
    "reached",
    "reset_memory",
    "seconds_between",
    "seed_everything",
    "shutdown",
    "synchronize",
    "to_device",
]

"""Groups of gloo share a device."""

import os


def threads_of_groups(count: int) -> int:
    """Runs on every rank: by how many threads these groups have more."""
    import torch
    import torch.distributed as dist

    before = len(os.listdir("/proc/self/task"))
    groups = [dist.new_group(backend="gloo") for _ in range(count)]
    for group in groups:
        total = torch.ones(3)
        dist.all_reduce(total, group=group)
        assert total.tolist() == [2.0] * 3
    return len(os.listdir("/proc/self/task")) - before


def test_more_groups_have_no_more_devices(world2):
    """A group has two threads that carry out its collectives. A device would be a third, which polls."""
    assert world2.run(threads_of_groups, 10) == [20, 20]

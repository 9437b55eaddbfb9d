"""Gathered weights that arrive when they are waited for and not a moment earlier, so that whoever does not wait fails.

A gather that runs beside the computing may be done before its result is read, by luck. Here the ranks gather into a
buffer of their own at once, and only waiting copies it to the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class _Gather:
    """Stands for torch's manager of coalesced collectives."""

    def __init__(self, counts: dict[str, int]):
        self.copies, self._counts = [], counts

    def wait(self) -> None:
        for place, value in self.copies:
            place.copy_(value)
        self._counts["waited"] += len(self.copies)


@contextmanager
def late_gathers() -> Iterator[dict[str, int]]:
    """Within the block; yields how many pieces were gathered, and how many late ones were begun and waited for."""
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer as buffers

    counts, now = {"all": 0, "begun": 0, "waited": 0}, []
    start = buffers._ParamAndGradBucketGroup.start_param_sync

    @contextmanager
    def manager(group, device=None, async_ops=False):
        yield now[-1]

    def gather(output, piece, group, async_op=False):
        value = output.clone()
        dist.all_gather_into_tensor(value, piece.clone(), group=group)
        now[-1].copies.append((output, value))
        counts["begun"] += 1

    def started(self, force_sync=False):
        counts["all"] += len(self.buckets)
        if force_sync:  # nobody has to wait
            start(self, force_sync=True)
            return
        now.append(_Gather(counts))
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(buffers, "_coalescing_manager", manager)
            inner.setattr(buffers, "dist_all_gather_func", gather)
            start(self)
        now.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers._ParamAndGradBucketGroup, "start_param_sync", started)
        yield counts

"""Megatron's gradient buffers, adapted to steps of several windows and to weights that are gathered late."""

from megatron.core.distributed import DistributedDataParallel


class PartDDP(DistributedDataParallel):
    """Megatron's gradient buffers of one module of a part.

    Megatron's schedule announces its first micro-batch, whose gradients Transformer Engine's linear layers then write
    over the buffer instead of adding to it (and quantise their weights anew, with FP8). The schedule runs once for each
    window of a step, so earlier windows would be lost: ``Step`` announces the first micro-batch of the step instead.

    With ``train.overlap.weights``, Megatron would gather updated weights when the next forward pass comes to them, and
    leave the old ones to everything else that reads them. Here all gathering begins after the update, and whoever reads
    weights only waits for it: ranks need not do so together.
    """

    def gather(self) -> None:
        """Begins to gather updated weights, those of the first layers first."""
        for group in [*reversed(self.bucket_groups), *reversed(self.expert_parallel_bucket_groups)]:
            group.start_param_sync()

    def wait(self) -> None:
        """Waits for the gathering, if there is any. On a GPU, the stream waits and the host does not."""
        for group in [*self.bucket_groups, *self.expert_parallel_bucket_groups]:
            group.param_gather_dispatched = True  # so that it is not begun here, nor by a forward pass
            group.finish_param_sync(skip_next_bucket_dispatch=True)

    def zero_grad_buffer(self) -> None:
        """Clears the gradients. Megatron also forgets that gathering was begun."""
        super().zero_grad_buffer()
        for group in [*self.bucket_groups, *self.expert_parallel_bucket_groups]:
            group.param_gather_dispatched = True

    def set_is_first_microbatch(self) -> None:
        """Does nothing, see above."""

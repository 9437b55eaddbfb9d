"""Megatron's gradient buffers, adapted to steps of several windows and to weights that are gathered late."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel


class PartDDP(DistributedDataParallel):
    """Megatron's gradient buffers of one module of a part.

    Megatron's schedule announces its first micro-batch, whose gradients Transformer Engine's linear layers then write
    over the buffer instead of adding to it (and quantise their weights anew, with FP8). The schedule runs once for each
    window of a step, so earlier windows would be lost: ``Step`` announces the first micro-batch of the step instead.

    Updated weights are gathered by ``gather`` and ``wait``, and not by Megatron's optimizers: each of them would gather
    all weights of its modules, so that those of a mixture of experts, which has two, would be sent twice.

    Args:
        is_late: whether modules that are called wait for their weights themselves. Megatron's hook for this also begins
            to gather, unless it finds that this was begun, and leaves old weights to everything else that reads them.
            Here all gathering begins after the update, and the hook always finds that it was: whoever reads weights
            only waits, so ranks need not do so together.
        arguments, options: see Megatron's class.
    """

    def __init__(self, *arguments: Any, is_late: bool = False, **options: Any):
        super().__init__(*arguments, **options)
        self.is_late = is_late
        if self.use_forward_hook and not is_late:
            self.disable_forward_pre_hook(param_sync=False)
        self._leave_gathering()

    def gather(self) -> None:
        """Gathers updated weights, dense ones and then experts, each from the first layers on; late ones are begun."""
        for group in [*reversed(self.bucket_groups), *reversed(self.expert_parallel_bucket_groups)]:
            group.start_param_sync(force_sync=not self.is_late)

    def _leave_gathering(self) -> None:
        """Lets no forward pass begin to gather."""
        for group in [*self.bucket_groups, *self.expert_parallel_bucket_groups]:
            group.param_gather_dispatched = True

    def wait(self) -> None:
        """Waits for weights that are late. On a GPU, the stream waits and the host does not."""
        for group in [*self.bucket_groups, *self.expert_parallel_bucket_groups]:
            group.finish_param_sync(skip_next_bucket_dispatch=True)

    def finish_grad_sync(self, *arguments: Any, **options: Any) -> None:
        """Waits for the reduction of the gradients. Megatron forgets there that gathering was begun."""
        super().finish_grad_sync(*arguments, **options)
        self._leave_gathering()

    def set_is_first_microbatch(self) -> None:
        """Does nothing, see above."""

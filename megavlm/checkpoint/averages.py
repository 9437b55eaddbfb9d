"""The moving averages of the weights (``train.ema``) in a checkpoint of a run, read as if they were the weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.convert.mcore_checkpoint import McoreCheckpoint

_PREFIX = "optimizer.state.ema."


class AveragedCheckpoint(McoreCheckpoint):
    """A checkpoint whose trained weights are their averages; frozen weights, which have none, are as they are.

    Raises:
        UserError: as for McoreCheckpoint, or the run kept no averages.
    """

    def __init__(self, path: Path) -> None:
        absent = UserError(f"{path} has no moving average of the weights", "train with train.ema, or leave out --ema")
        if (path / "config.json").is_file():  # a Hugging Face folder
            raise absent
        super().__init__(path)
        if not any(key.startswith(_PREFIX) for key in self._stored):
            raise absent

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """See McoreCheckpoint; the average of ``key`` in float32 if there is one."""
        averaged = _PREFIX + key
        return super().read(averaged if averaged in self._stored else key, first, last)

    @torch.no_grad()
    def copy_box(self, key: str, offset: Sequence[int], target: Tensor) -> None:
        """Copies a box of a tensor, which begins at ``offset``, into ``target``, whose dtype and device it gets."""
        box = zip(offset, target.shape, strict=True)
        rows, *others = (slice(first, first + count) for first, count in box)
        target.copy_(self.read(key, rows.start, rows.stop)[(slice(None), *others)])

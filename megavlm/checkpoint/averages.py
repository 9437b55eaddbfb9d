"""The moving averages of the weights (``train.ema``) in a checkpoint of a run, read as if they were the weights."""

from pathlib import Path

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
        super().__init__(path)
        if not any(key.startswith(_PREFIX) for key in self._stored):
            raise UserError(
                f"{path} has no moving average of the weights", "train with train.ema, or export without --ema"
            )

    def read(self, key: str, first: int = 0, last: int | None = None) -> Tensor:
        """See McoreCheckpoint; the average of ``key`` in float32 if there is one."""
        averaged = _PREFIX + key
        return super().read(averaged if averaged in self._stored else key, first, last)

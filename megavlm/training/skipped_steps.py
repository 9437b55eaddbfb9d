"""Steps whose loss or a gradient is NaN or infinite: all ranks skip them, and the message names the samples."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.base.errors import RunFailure
from megavlm.data.row import Row
from megavlm.model.vlm import PARTS, VLM
from megavlm.platform import Groups, device
from megavlm.platform.collectives import all_gather_objects

MOST_SAMPLES = 10  # named in a message


def describe(non_finite: list[str], row_losses: list[tuple[Row, Tensor]], groups: Groups) -> str:
    """What is not finite and which samples took part, rows first whose own loss is not finite. Call it on all ranks.

    Args:
        non_finite: of the ``GradStats``.
        row_losses: this rank's rows of the step and the weighted sum of losses of each; [] on ranks without a loss.
    """
    mine = []
    if groups.language.tp.rank() == 0:  # its peers hold the same rows and the same losses
        mine = [(row.sources, math.isfinite(nll.item() + row.loss_weights.sum().item())) for row, nll in row_losses]
    rows = [row for of_rank in all_gather_objects(mine, groups.world_host) for row in of_rank]
    suspects = dict.fromkeys(source for sources, finite in rows if not finite for source in sources)
    others = dict.fromkeys(source for sources, _ in rows for source in sources if source not in suspects)
    parts = [name for name in non_finite if name != "loss"]
    what = ["the loss"] * ("loss" in non_finite) + [f"the gradient of {', '.join(parts)}"] * bool(parts)
    text = f"{' and '.join(what)} {'is' if len(what) == 1 else 'are'} not finite"
    if suspects:
        text += f"; rows whose own loss is not finite: {_listed(suspects, MOST_SAMPLES)}"
    if others and len(suspects) < MOST_SAMPLES:
        text += f"; {'other ' if suspects else ''}samples of the step: {_listed(others, MOST_SAMPLES - len(suspects))}"
    return text


class SkippedSteps:
    """Counts skipped steps in a row.

    Args:
        most: as many may follow one another; one more ends the run.
        say: shows a message (`Progress.say`).
    """

    def __init__(self, most: int, say: Callable[[str], None]):
        self.most, self._say, self._count = most, say, 0

    def failure(self, step: int, trouble: str | None) -> RunFailure | None:
        """Takes note of a step; what to raise where it was one skip too many.

        Args:
            trouble: what ``describe`` said of the step, None if it was a good one.
        """
        self._count = self._count + 1 if trouble else 0
        if self._count > self.most:
            return RunFailure(
                f"step {step}: {trouble}. The weights were left as they are; "
                f"train.max_skipped_steps is {self.most}, and this would be skip {self._count} in a row",
                "look at these samples; lower train.lr or train.clip_grad if the loss had risen before; "
                "the same command continues from the newest checkpoint",
            )
        if trouble:
            self._say(f"step {step} skipped, weights left as they are: {trouble}")
        return None


def weights_failure(vlm: VLM) -> RunFailure | None:
    """What to raise where a weight is not finite on some rank, so that no further step can be good. Call on all ranks.

    For the rare checkpoint that follows a skipped step: it waits for the device.
    """
    bad = torch.zeros(len(PARTS), device=device())
    for index, part in enumerate(PARTS):
        for weight in (p for module in vlm.modules_of(part) for p in module.parameters()):
            bad[index] += ~weight.isfinite().all()
    dist.all_reduce(bad)
    parts = [part for part, flag in zip(PARTS, bad.tolist(), strict=True) if flag]
    if not parts:
        return None
    return RunFailure(
        f"weights of {', '.join(parts)} are not finite; no checkpoint was written",
        "continue from an older checkpoint, or check the one that model.load names",
    )


def _listed(names: dict[str, None], most: int) -> str:
    shown = list(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")

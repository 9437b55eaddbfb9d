"""Skipped steps: if the loss or a gradient is NaN or infinite, all ranks skip the step and log its samples."""

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

MOST_SAMPLES = 10  # maximum number of samples in a message


def describe(non_finite: list[str], row_losses: list[tuple[Row, Tensor]], groups: Groups) -> str:
    """Describes what is not finite and lists the samples of the step. Call it on all ranks.

    Samples of rows whose own loss is not finite are listed first.

    Args:
        non_finite: what is not finite, from ``GradStats``.
        row_losses: this rank's rows of the step, and the weighted sum of losses of each; [] on ranks without a loss.
        groups: the process groups of the run.
    """
    mine = []
    if groups.language.tp.rank() == 0:  # the other tensor-parallel ranks have the same rows and the same losses
        mine = [(row.sources, math.isfinite(nll.item() + row.loss_weights.sum().item())) for row, nll in row_losses]
    rows = [row for of_rank in all_gather_objects(mine, groups.world_host) for row in of_rank]
    suspects = dict.fromkeys(source for sources, finite in rows if not finite for source in sources)
    others = dict.fromkeys(source for sources, _ in rows for source in sources if source not in suspects)
    parts = [name for name in non_finite if name != "loss"]
    what = ["the loss"] * ("loss" in non_finite) + [f"the gradient of {', '.join(parts)}"] * bool(parts)
    text = f"{' and '.join(what)} {'is' if len(what) == 1 else 'are'} NaN or infinite"
    if suspects:
        text += f"; samples of rows whose own loss is NaN or infinite: {_listed(suspects, MOST_SAMPLES)}"
    if others and len(suspects) < MOST_SAMPLES:
        text += f"; {'other ' if suspects else ''}samples of the step: {_listed(others, MOST_SAMPLES - len(suspects))}"
    return text


class SkippedSteps:
    """Counts consecutive skipped steps.

    Args:
        most: maximum number of consecutive skipped steps; one more ends the run.
        say: prints a message (`Progress.say`).
    """

    def __init__(self, most: int, say: Callable[[str], None]):
        self.most, self._say, self._count = most, say, 0

    def failure(self, step: int, trouble: str | None) -> RunFailure | None:
        """Counts a step. Returns the error to be raised if too many consecutive steps were skipped.

        Args:
            step: number of the step.
            trouble: the result of ``describe`` for a skipped step; None if the step was not skipped.
        """
        self._count = self._count + 1 if trouble else 0
        if self._count > self.most:
            return RunFailure(
                f"step {step}: {trouble}. The weights are unchanged. "
                f"train.max_skipped_steps is {self.most}, and this is skipped step {self._count} in a row",
                "check these samples; lower train.lr or train.clip_grad if the loss rose before; "
                "the same command continues from the newest checkpoint",
            )
        if trouble:
            self._say(f"step {step} was skipped, the weights are unchanged: {trouble}")
        return None


def weights_failure(vlm: VLM) -> RunFailure | None:
    """Returns the error to be raised if a weight is NaN or infinite on any rank. Call it on all ranks.

    With such a weight, all further steps would be skipped. The function waits for the device, so it is only called for
    a checkpoint that follows a skipped step.
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
        f"weights of {', '.join(parts)} are NaN or infinite; no checkpoint was written",
        "continue from an older checkpoint, or check the checkpoint in model.load",
    )


def _listed(names: dict[str, None], most: int) -> str:
    shown = list(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")

"""The loss of value functions, which estimate the rewards that are still to come."""

import torch
from torch import Tensor

from megavlm.align.losses.arguments import check_numbers


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each value, and whether the limit has taken its gradient away: elementwise, in any one shape.

    ½ max((V − R)², (V' − R)²), where V' is V within ``clip`` of the value before the updates (as in PPO's own code).
    """
    plain = (values - returns.detach()).square()
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    near = torch.clamp(values, old_values.detach() - clip, old_values.detach() + clip)
    limited = (near - returns.detach()).square()
    return torch.maximum(plain, limited) / 2, limited > plain


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss of a whole batch of values, the mean over its target tokens, and metrics.

    Args:
        values: floating [B, T], V: the values before each target token.
        old_values: [B, T], the same before the updates; no gradient flows to them.
        returns: [B, T], R, from ``gae``.
        mask: [B, T], true or 1 at target tokens.
        clip: how far a value may move from its old one before its gradient ends; None: as far as it will.

    Returns:
        The loss, a 0-d tensor, and the metric ``value_clip_share``: the fraction of target tokens that were limited.

    Raises:
        ValueError: shapes differ, or ``clip`` is negative.
    """
    if clip is not None:
        check_numbers(clip=clip)
    for argument, tensor in {"old_values": old_values, "returns": returns, "mask": mask}.items():
        if tensor.shape != values.shape or values.ndim != 2:
            raise ValueError(
                f"{argument} has shape {list(tensor.shape)} and values {list(values.shape)}: both must be [B, T]"
            )
    losses, limited = value_losses(values, old_values, returns, clip=clip)
    there, tokens = mask.bool(), mask.sum().clamp(min=1)
    share = (limited & there).sum() / tokens
    return losses.where(there, 0.0).sum() / tokens, {"value_clip_share": share.detach()}

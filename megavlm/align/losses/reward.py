"""The reward model's loss."""

from numbers import Real

from torch import Tensor
from torch.nn.functional import logsigmoid

from megavlm.align.losses.arguments import check_numbers, mean, vectors


def reward_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | float, centering: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [B] of B pairs, and metrics: −log σ(s_c − s_j − margin) + λ (s_c + s_j)².

    Bradley–Terry, and a pull of the scores' middle to 0 (2312.09244), which the first term leaves free.

    Args:
        chosen_scores, rejected_scores: floating [B], the scores at the answers' last target token.
        margin: by how much a chosen answer ought to win, one number or [B]; 0 for plain Bradley–Terry.
        centering: λ, at least 0.

    Returns:
        Losses [B], float64 if ``chosen_scores`` is, else float32, and without gradient: ``accuracy``, the share of
        pairs where the chosen answer has the higher score; ``margin``, the mean difference of scores; ``scores/mean``
        and ``scores/std`` (divided by their number) over all 2 B scores.

    Raises:
        ValueError: shapes that differ, an option out of range.
    """
    check_numbers(centering=centering)
    chosen, rejected = vectors(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    if isinstance(margin, Real):
        check_numbers(margin=margin)
    elif not isinstance(margin, Tensor) or margin.ndim:
        _, margin = vectors(chosen_scores=chosen, margin=margin)

    difference, total = chosen - rejected, chosen + rejected
    losses = centering * total.square() - logsigmoid(difference - margin)
    middle = mean(total) / 2
    variance = (mean((chosen - middle).square()) + mean((rejected - middle).square())) / 2
    return losses, {
        "accuracy": mean((difference > 0).to(losses.dtype)),
        "margin": mean(difference),
        "scores/mean": middle,
        "scores/std": variance.sqrt(),
    }

"""The loss of reward models."""

from numbers import Real

from torch import Tensor
from torch.nn.functional import logsigmoid

from megavlm.align.losses.arguments import check_numbers, mean, vectors


def reward_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | float, centering: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the losses [B] of B pairs, and metrics: −log σ(s_c − s_j − margin) + λ (s_c + s_j)².

    The first term is the Bradley–Terry loss. The second (2312.09244) keeps the mean of the two scores near 0, which the
    first term does not determine.

    Args:
        chosen_scores, rejected_scores: floating [B], the scores at the answers' last target tokens.
        margin: the margin by which a chosen answer should win, one number or [B]; 0 for plain Bradley–Terry.
        centering: λ, at least 0.

    Returns:
        Losses [B], float64 if ``chosen_scores`` is, otherwise float32; and metrics without gradient: ``accuracy``, the
        fraction of pairs in which the chosen answer has the higher score; ``margin``, the mean difference of scores;
        ``scores/mean`` and ``scores/std`` (population standard deviation) over all 2 B scores.

    Raises:
        ValueError: shapes differ, or an option is out of range.
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

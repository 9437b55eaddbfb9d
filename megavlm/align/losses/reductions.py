"""How the losses of tokens become one number: a weighted sum, divided by a count.

Weights and count are functions of the lengths of the answers alone. The count of a batch is the sum of the counts of
its parts. So a trainer adds the weighted sums and the counts of all ranks and micro-batches, and divides once; how the
batch is cut has no influence.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def answer_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values [B, T] over the target tokens of each answer, at all of its tokens; 0 without any.

    A trainer that packs answers into rows, or cuts them over ranks, passes a function of its own instead.
    """
    means = (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return means.expand_as(values)


@dataclass(frozen=True)
class Reduction:
    """A way to add the losses of tokens.

    Attributes:
        weights: (mask, number of target tokens of each token's answer, constant length) -> weight of each token. The
            first two have one shape, or shapes that can be broadcast.
        count: number of target tokens of each answer [B] -> the number that divides the sum, 0-d.
    """

    weights: Callable[[Tensor, Tensor, int], Tensor]
    count: Callable[[Tensor], Tensor]


REDUCTIONS: dict[str, Reduction] = {
    # The mean over all target tokens of the batch: long answers count more.
    "token": Reduction(lambda mask, lengths, max_length: mask, lambda lengths: lengths.sum()),
    # The mean over answers of the means over their tokens. Answers without target tokens are not counted.
    "sequence": Reduction(
        lambda mask, lengths, max_length: mask / lengths.clamp(min=1),
        lambda lengths: (lengths > 0).to(lengths.dtype).sum(),
    ),
    # The sum over tokens, divided by the number of answers and by a constant length: length has no influence.
    "constant": Reduction(
        lambda mask, lengths, max_length: mask / max_length,
        lambda lengths: lengths.new_tensor(float(len(lengths))),
    ),
}

"""How the losses of tokens become one number: a weighted sum, divided by a count.

Weights and count are functions of the masks alone. The count of a batch is the sum of the counts of its parts. So a
trainer adds the weighted sums and the counts of all ranks and micro-batches, and divides once; how the batch is cut has
no influence.
"""

from collections.abc import Callable

from torch import Tensor


def answer_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values [B, T] over the target tokens of each answer, at all of its tokens; 0 without any.

    A trainer that packs answers into rows, or cuts them over ranks, passes a function of its own instead.
    """
    means = (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return means.expand_as(values)


def token_mean(mask: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """The mean over all target tokens of the batch: long answers count more."""
    return mask, mask.sum()


def sequence_mean(mask: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """The mean over answers of the means over their tokens. Answers without target tokens are not counted."""
    lengths = mask.sum(-1, keepdim=True)
    return mask / lengths.clamp(min=1), (lengths > 0).to(mask.dtype).sum()


def constant(mask: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """The sum over tokens, divided by the number of answers and by a constant length: length has no influence."""
    return mask / max_length, mask.new_tensor(float(mask.shape[0]))


# name → (mask [B, T], length of the longest answer allowed) -> (weights [B, T], count)
REDUCTIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "token": token_mean,
    "sequence": sequence_mean,
    "constant": constant,
}

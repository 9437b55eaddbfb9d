"""The head of a reward model, which computes a score from the last hidden state of a token."""

import torch
from torch import Tensor

KEY = "language.score_head.weight"
"""The key of its weight in a checkpoint."""


class ScoreHead(torch.nn.Module):
    """float [n, hidden] → float32 [n]. Every tensor-parallel rank has the whole head.

    Args:
        hidden: width of the decoder.
        dtype: dtype of the weight.
        sequence_parallel: whether tensor ranks see different tokens, so that its gradients must be summed.
    """

    def __init__(self, hidden: int, dtype: torch.dtype, *, sequence_parallel: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)  # a fixed seed gives equal weights on all ranks
        weight = torch.randn(1, hidden, generator=draw) / (hidden + 1) ** 0.5
        self.weight = torch.nn.Parameter(weight.to(dtype))
        # Megatron's finalize_model_grads reads this attribute of a parameter
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]  # torch does not declare it

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight).squeeze(-1).float()

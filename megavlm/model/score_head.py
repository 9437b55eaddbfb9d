"""The head of a reward model: one number for a token, from its last hidden state."""

import torch
from torch import Tensor

KEY = "language.score_head.weight"
"""Its name in a checkpoint."""


class ScoreHead(torch.nn.Module):
    """float [n, hidden] → float32 [n]. Every tensor-parallel rank has all of it.

    Args:
        hidden: width of the decoder.
        dtype: of the weight.
        sequence_parallel: whether tensor ranks see different tokens, so that its gradients are to be added up.
    """

    def __init__(self, hidden: int, dtype: torch.dtype, *, sequence_parallel: bool):
        super().__init__()
        draw = torch.Generator().manual_seed(0)  # equal on all ranks, whatever random numbers each has drawn
        weight = torch.randn(1, hidden, generator=draw) / (hidden + 1) ** 0.5
        self.weight = torch.nn.Parameter(weight.to(dtype))
        self.weight.sequence_parallel = sequence_parallel  # read by Megatron's finalize_model_grads

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight).squeeze(-1).float()

"""Rotary angles: interleaved MRoPE for the decoder, 2-D angles for the vision tower.

Both give Megatron's form, [T, 1, 1, head_dim]: the angles of the first half of a head, repeated for the second
(``rotary_interleaved=False``). Source: Qwen3-VL technical report, and transformers' ``qwen3_vl``.
"""

import torch
from torch import Tensor, nn


def _inverse_frequencies(dim: int, theta: float) -> Tensor:
    """[dim / 2] float32. Computed on the host like the reference, so that the last bit agrees on every device."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))


class InterleavedMRoPE(nn.Module):
    """Frequencies 0, 1, 2, 3, 4, 5 … turn with time, height, width, time, height, width …

    ``section`` counts the frequencies of each axis, time first; height and width take every third frequency until
    theirs are used up, time has all the rest (so the slowest frequencies belong to time).
    """

    def __init__(self, head_dim: int, theta: float, section: tuple[int, int, int]):
        super().__init__()
        axis = torch.zeros(head_dim // 2, dtype=torch.long)
        for which in (1, 2):
            axis[which : 3 * section[which] : 3] = which
        self.register_buffer("inv_freq", _inverse_frequencies(head_dim, theta), persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids: int64 [3, T] (time, height, width) -> angles float32 [T, 1, 1, head_dim]."""
        angles = position_ids.float()[self.axis].t() * self.inv_freq  # [T, head_dim / 2]
        return torch.cat((angles, angles), dim=-1)[:, None, None]


class VisionRope(nn.Module):
    """The first half of the frequencies turns with the patch's row, the second with its column."""

    def __init__(self, head_dim: int, theta: float = 10000.0):
        super().__init__()
        self.register_buffer("inv_freq", _inverse_frequencies(head_dim // 2, theta), persistent=False)

    def forward(self, coords: Tensor) -> Tensor:
        """coords: int [P, 2] (row, column in patches) -> angles float32 [P, 1, 1, head_dim]."""
        angles = (coords.float()[:, :, None] * self.inv_freq).flatten(1)  # [P, head_dim / 2]
        return torch.cat((angles, angles), dim=-1)[:, None, None]

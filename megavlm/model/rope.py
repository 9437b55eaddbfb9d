"""Rotary angles: interleaved MRoPE for the decoder, 2-D angles for the vision tower.

Both return Megatron's form, [T, 1, 1, head_dim]: the angles of the first half of a head, repeated for the second half
(``rotary_interleaved=False``). Source: the Qwen3-VL technical report and transformers' ``qwen3_vl``.
"""

import torch
from torch import Tensor, nn

from megavlm.model.rope_scaling import RopeScaling


def _inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """[dim / 2] float32. Computed on the host, like the reference, so that all bits agree on every device."""
    wavelengths = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    plain = 1.0 / wavelengths
    if scaling is None:
        return plain
    if scaling.ramp is None:
        return plain / scaling.factor
    first, last = scaling.ramp
    rising = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / ((last - first) or 1e-3)
    kept = 1 - rising.clamp(0, 1)  # the share of each frequency that is not divided by the factor
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + plain * kept


class InterleavedMRoPE(nn.Module):
    """Frequencies 0, 1, 2, 3, 4, 5 … belong to time, height, width, time, height, width …

    ``section`` has the number of frequencies for time, height and width. Height and width have every third frequency
    until they have enough, and time has all others, including the slowest. ``scaling`` stretches the frequencies; its
    factor on queries and keys is in ``TransformerConfig.softmax_scale``, since attention uses only their products.
    """

    inv_freq: Tensor
    axis: Tensor

    def __init__(
        self, head_dim: int, theta: float, section: tuple[int, int, int], scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        axis = torch.zeros(head_dim // 2, dtype=torch.long)
        for which in (1, 2):
            axis[which : 3 * section[which] : 3] = which
        self.register_buffer("inv_freq", _inverse_frequencies(head_dim, theta, scaling), persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids: int64 [3, T] (time, height, width) -> angles float32 [T, 1, 1, head_dim]."""
        angles = position_ids.float()[self.axis].t() * self.inv_freq  # [T, head_dim / 2]
        return torch.cat((angles, angles), dim=-1)[:, None, None]


class VisionRope(nn.Module):
    """The first half of the frequencies belongs to the patch's row, the second half to its column."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", _inverse_frequencies(head_dim // 2, theta), persistent=False)

    def forward(self, coords: Tensor) -> Tensor:
        """coords: int [P, 2] (row, column in patches) -> angles float32 [P, 1, 1, head_dim]."""
        angles = (coords.float()[:, :, None] * self.inv_freq).flatten(1)  # [P, head_dim / 2]
        return torch.cat((angles, angles), dim=-1)[:, None, None]

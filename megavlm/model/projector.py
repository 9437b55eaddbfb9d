"""The mergers, which turn 2 × 2 patches into one visual token of the decoder's width."""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.model.shapes import VisionShape


class Merger(nn.Module):
    """Norm, joining of adjacent patches, Linear, GELU, Linear.

    Deepstack mergers apply the norm after joining (``norm_joined``), the main merger applies it before.
    """

    def __init__(self, shape: VisionShape, dtype: torch.dtype, *, norm_joined: bool) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.joined = shape.merged_hidden
        width = self.joined if norm_joined else shape.hidden
        self.norm = nn.LayerNorm(width, eps=1e-6, device=device, dtype=dtype)
        self.norm_joined = norm_joined
        self.linear_fc1 = nn.Linear(self.joined, self.joined, device=device, dtype=dtype)
        self.linear_fc2 = nn.Linear(self.joined, shape.out_hidden, device=device, dtype=dtype)
        for linear in (self.linear_fc1, self.linear_fc2):
            nn.init.normal_(linear.weight, std=shape.init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, vision hidden] -> [P / 4, decoder hidden]. The four patches of a token are adjacent in P."""
        if self.norm_joined:
            hidden = self.norm(hidden.view(-1, self.joined))
        else:
            hidden = self.norm(hidden).view(-1, self.joined)
        return self.linear_fc2(nn.functional.gelu(self.linear_fc1(hidden)))


class Projector(MegatronModule):
    """The main merger and one merger for each deepstack level."""

    def __init__(self, shape: VisionShape, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.merger = Merger(shape, config.params_dtype, norm_joined=False)
        self.deepstack = nn.ModuleList(
            Merger(shape, config.params_dtype, norm_joined=True) for _ in shape.deepstack_layers
        )

    def forward(self, hidden: list[Tensor]) -> Tensor:
        """Outputs of VisionTower -> [1 + levels, P / 4, decoder hidden]: the embeddings, then the deepstack levels."""
        *taps, last = hidden
        return torch.stack([self.merger(last), *(merge(tap) for merge, tap in zip(self.deepstack, taps, strict=True))])

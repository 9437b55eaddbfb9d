"""The mergers: 2 × 2 patches become one visual token in the decoder's width."""

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megavlm.model.shapes import VisionShape


class Merger(nn.Module):
    """Norm, join neighbours, Linear, GELU, Linear. Deepstack mergers norm after joining, the main one before."""

    def __init__(self, shape: VisionShape, dtype: torch.dtype, *, norm_joined: bool):
        super().__init__()
        device = dict(device=torch.cuda.current_device(), dtype=dtype)
        self.joined = shape.merged_hidden
        self.norm = nn.LayerNorm(self.joined if norm_joined else shape.hidden, eps=1e-6, **device)
        self.norm_joined = norm_joined
        self.linear_fc1 = nn.Linear(self.joined, self.joined, **device)
        self.linear_fc2 = nn.Linear(self.joined, shape.out_hidden, **device)
        for linear in (self.linear_fc1, self.linear_fc2):
            nn.init.normal_(linear.weight, std=shape.init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[P, vision hidden] -> [P / 4, decoder hidden]; the four patches of a token are neighbours in P."""
        if self.norm_joined:
            hidden = self.norm(hidden.view(-1, self.joined))
        else:
            hidden = self.norm(hidden).view(-1, self.joined)
        return self.linear_fc2(nn.functional.gelu(self.linear_fc1(hidden)))


class Projector(MegatronModule):
    """The main merger and one merger per deepstack level."""

    def __init__(self, shape: VisionShape, config):
        super().__init__(config=config)
        self.merger = Merger(shape, config.params_dtype, norm_joined=False)
        self.deepstack = nn.ModuleList(
            Merger(shape, config.params_dtype, norm_joined=True) for _ in shape.deepstack_layers
        )

    def forward(self, hidden: list[Tensor]) -> Tensor:
        """Outputs of VisionTower -> [1 + levels, P / 4, decoder hidden]: plane 0 embeds, plane 1 + k is level k."""
        *taps, last = hidden
        return torch.stack([self.merger(last), *(merge(tap) for merge, tap in zip(self.deepstack, taps, strict=True))])

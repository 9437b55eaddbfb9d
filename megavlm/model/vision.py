"""The vision tower: patch embedding, interpolated positions, 2-D rotary angles, attention within a frame."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megavlm.model.kernels import Kernels
from megavlm.model.layers import layer_submodules
from megavlm.model.packed import PackedRow
from megavlm.model.rope import VisionRope
from megavlm.model.shapes import VisionShape

_OF_PATCHES = ("patches", "coords", "pos_index", "pos_weight")
_FP8_BLOCK = 128  # patches: of blockwise scaling, a multiple of what other recipes need


@dataclass
class Frames:
    """The patches of several frames, end to end.

    Attributes:
        patches: float [P, patch_dim], pixels as the processor arranges them.
        coords: int32 [P, 2], row and column of each patch in its frame.
        pos_index: int32 [P, 4], the four learned positions around each patch.
        pos_weight: float32 [P, 4], their bilinear weights.
        lengths: number of patches of each frame, as host integers that sum to P.
    """

    patches: Tensor
    coords: Tensor
    pos_index: Tensor
    pos_weight: Tensor
    lengths: list[int]

    def slice(self, patches: slice, lengths: list[int]) -> Self:
        """The frames that consist of these patches; ``lengths``: number of patches of each."""
        return replace(self, lengths=lengths, **{name: getattr(self, name)[patches] for name in _OF_PATCHES})

    def to(self, device: torch.device) -> Self:
        """The same frames on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _OF_PATCHES})

    @property
    def num_new(self) -> int:
        """The number of frames that have to go through the tower; all of them, unless ``runtime.kept_frames`` helps."""
        return len(self.lengths)

    def through(self, tower: "VisionTower") -> list[Tensor]:
        """What the tower computes of the frames: see ``VisionTower.forward``."""
        return tower(self)


class VisionTower(MegatronModule):
    """All layers before the mergers. Every rank has the whole tower.

    The patch embedding is a matrix product over flattened patches, which equals a Conv3d whose stride is its kernel.
    """

    def __init__(
        self, shape: VisionShape, config: TransformerConfig, kernels: Kernels, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        device: dict[str, Any] = dict(device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.tp_group = groups.tp  # read by MegatronModule.sharded_state_dict
        self.taps = shape.deepstack_layers
        self.patch_embed = nn.Linear(shape.patch_dim, shape.hidden, **device)
        self.position_embedding = nn.Embedding(shape.num_positions, shape.hidden, **device)
        nn.init.normal_(self.patch_embed.weight, std=shape.init_std)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.position_embedding.weight, std=shape.init_std)
        self.rope = VisionRope(shape.head_dim, shape.rope_theta)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config,
                layer_submodules(kernels, rms_norm=False, qk_norm=False, causal=False),
                layer_number=number,
                pg_collection=groups,
            )
            for number in range(1, shape.layers + 1)
        )

    def forward(self, frames: Frames) -> list[Tensor]:
        """Hidden states [P, hidden] after each deepstack layer, then those of the last layer."""
        hidden = self.patch_embed(frames.patches.to(self.patch_embed.weight.dtype))
        corners = self.position_embedding(frames.pos_index)  # [P, 4, hidden]
        hidden = hidden + (corners * frames.pos_weight[:, :, None].to(corners.dtype)).sum(1).to(hidden.dtype)
        rotary = self.rope(frames.coords)
        count, lengths = len(hidden), frames.lengths
        if self.config.fp8 and count % _FP8_BLOCK:  # products in FP8 need whole blocks: a frame of zeros fills the last
            empty = -count % _FP8_BLOCK
            hidden, rotary = (
                nn.functional.pad(hidden, (0, 0, 0, empty)),
                nn.functional.pad(rotary, (0, 0) * 3 + (0, empty)),
            )
            lengths = [*lengths, empty]
        row = PackedRow.of(lengths, hidden.device)
        hidden, taken = hidden.unsqueeze(1), []
        with get_fp8_context(self.config):
            for index, layer in enumerate(self.layers):
                hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=row)
                if index in self.taps:
                    taken.append(hidden[:count, 0])
        return [*taken, hidden[:count, 0]]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's default, applied layer by layer, because a ModuleList loses the key mapping of its layers."""
        shards: dict = {}
        for name, module in self.named_children():
            children = module.named_children() if module is self.layers else [("", module)]
            for child_name, child in children:
                path = f"{prefix}{name}.{child_name}." if child_name else f"{prefix}{name}."
                shards |= sharded_state_dict_default(child, path, sharded_offsets, metadata, tp_group=self.tp_group)
        return shards

"""Specs of Megatron's TransformerLayer for both sets of kernels, and the decoder layer that adds deepstack features."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megavlm.model.kernels import Kernels


class DeepstackLayer(TransformerLayer):
    """A decoder layer that adds its level of visual features to its output.

    The features are Megatron's ``context`` argument, float [levels, N, hidden]. TransformerBlock passes it unchanged
    from layer to layer, since there is no cross-attention, and through activation checkpointing as an argument, so
    recomputing keeps its gradient. Level i of the tensor belongs to the i-th layer of this pipeline chunk.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, layer_number: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.level = layer_number - 1  # within the chunk: Megatron adds the chunk's offset only to self.layer_number

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.mlp, MoELayer):  # set for each row, so that a recomputed layer asks for its own
            routing = kwargs["packed_seq_params"].routing
            self.mlp.router.router_replay = None if routing is None else routing.of_layer(self.layer_number)
        hidden_states, context = super().forward(*args, **kwargs)
        if context is not None and self.level < context.shape[0]:
            positions = kwargs["packed_seq_params"].visual_positions  # [N] in this rank's slice of the row
            hidden_states = hidden_states.index_add(0, positions, context[self.level].unsqueeze(1))
        return hidden_states, context


class Router(TopKRouter):
    """A router whose losses count only while the decoder is trained.

    In a frozen decoder they would have a gradient all the same: they would train the projector to give the decoder
    such features as its experts share evenly.
    """

    adapters_are_trained = False
    """True if the decoder has adapters, which are trained although the router is not."""

    def is_aux_loss_enabled(self) -> bool:
        return self._is_trained and super().is_aux_loss_enabled()

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attaches the z-loss as a mean over the row's tokens; Megatron's counts padding unevenly in a cut row."""
        if not (self.config.moe_z_loss_coeff and self._is_trained and self.training and torch.is_grad_enabled()):
            return logits
        mine = torch.ones_like(logits[:, 0]) if padding_mask is None else (~padding_mask).to(logits.dtype)
        count = mine.sum()
        dist.all_reduce(count, group=self.tp_cp_group)
        loss = (logits.logsumexp(-1).square() * mine).sum() / count.clamp(min=1)  # the ranks' parts add up
        get_moe_metrics_tracker().record("z_loss", loss, self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(logits, self.config.moe_z_loss_coeff * loss)

    @property
    def _is_trained(self) -> bool:
        return self.weight.requires_grad or self.adapters_are_trained


def _attention(kernels: Kernels, *, rms_norm: bool, qk_norm: bool, mask: AttnMaskType) -> ModuleSpec:
    fused = kernels.fuse_layernorm_and_linear()
    norm = kernels.layer_norm(rms_norm=rms_norm, for_qk=True) if qk_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=kernels.column_parallel_layer_norm_linear() if fused else kernels.column_parallel_linear(),
            core_attention=kernels.core_attention(),
            linear_proj=kernels.row_parallel_linear(),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def layer_submodules(
    kernels: Kernels, *, rms_norm: bool, qk_norm: bool, causal: bool, moe: bool = False
) -> TransformerLayerSubmodules:
    """The submodules of one layer.

    Transformer Engine fuses some norms into the linear layer that follows. With both sets of kernels these norms have
    the fused names in checkpoints, so a checkpoint of one set loads with the other.
    """
    fused = kernels.fuse_layernorm_and_linear()
    norm = kernels.layer_norm(rms_norm=rms_norm, for_qk=False)
    key_map = {} if fused else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not moe:
        mlp = partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(
                linear_fc1=kernels.column_parallel_layer_norm_linear() if fused else kernels.column_parallel_linear(),
                linear_fc2=kernels.row_parallel_linear(),
            ),
        )
        pre_mlp_norm = IdentityOp if fused else norm
        if not fused:
            key_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    else:
        experts = kernels.grouped_mlp_modules(kernels.grouped_experts)
        mlp = partial(MoELayer, submodules=MoESubmodules(experts=experts, router=Router))
        pre_mlp_norm = norm
    return TransformerLayerSubmodules(
        input_layernorm=IdentityOp if fused else norm,
        self_attention=_attention(
            kernels,
            rms_norm=rms_norm,
            qk_norm=qk_norm,
            mask=AttnMaskType.padding_causal if causal else AttnMaskType.padding,
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=pre_mlp_norm,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=key_map,
    )

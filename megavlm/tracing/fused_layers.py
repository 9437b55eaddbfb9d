"""Layers on the meta device that keep what Transformer Engine's layers keep, in a model that was built without it.

The model has the portable layers, whose parameters are those of every set of kernels. For a while, its modules get
classes whose forward passes consist of ``kept_functions``. A norm that Transformer Engine fuses with the product behind
it stays a module of its own: the pair keeps the same tensors, the input, the normalised input and the deviations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megavlm.config.settings import Settings
from megavlm.model.kernels.attention import PackedAttention
from megavlm.model.kernels.context import context_attention
from megavlm.model.kernels.portable import RMSNorm
from megavlm.model.packed import PackedRow
from megavlm.model.vlm import VLM
from megavlm.tracing import kept_functions as kept


class FusedRMSNorm(RMSNorm):
    """Also Transformer Engine's norm of queries and of keys."""

    def forward(self, x: Tensor) -> Tensor:
        return kept.Norm.apply(x, self.weight)


class _Fused:
    """What the linear layers share.

    Attributes:
        stand_in: what autograd gets for a weight's gradient: one tensor for all weights of a shape.
    """

    stand_in: Tensor

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if not weight.requires_grad:
            return super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]  # Megatron's
        gather = options["tp_group"] if options["sequence_parallel"] else None
        return kept.LinearProduct.apply(input, weight, options["bias"], self.stand_in, gather)


class FusedColumnLinear(_Fused, ColumnParallelLinear):
    """A linear layer whose weight's gradient is added to the buffer."""


class FusedRowLinear(_Fused, RowParallelLinear):
    """The same for the other direction."""


class FusedMLP(MLP):
    """An MLP whose activation is one kernel.

    Attributes:
        norm: the norm before it, as a function, if it belongs to the first product: it is then computed again with it.
    """

    norm: Callable[[Tensor], Tensor] | None = None

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        gated = config.gated_linear_unit and config.activation_func is F.silu
        if not gated and (config.gated_linear_unit or not _is_tanh_gelu(config.activation_func)):
            assert self.norm is None
            return super().forward(hidden_states, per_token_scale, **kwargs)
        normed = hidden_states if self.norm is None else self.norm(hidden_states)
        wide, bias = self.linear_fc1(normed)
        del normed
        if gated:
            probs = None if per_token_scale is None else per_token_scale.unsqueeze(-1)
            active = kept.GatedActivation.apply(wide, probs)
        else:
            active = kept.BiasActivation.apply(wide, bias)
        del wide
        return self.linear_fc2(active)


def _is_tanh_gelu(function: Any) -> bool:
    return getattr(function, "func", None) is F.gelu and function.keywords == {"approximate": "tanh"}


class FusedExperts(SequentialMLP):
    """All experts of a rank in one product."""

    stand_ins: tuple[Tensor, Tensor]

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        first, second = zip(*[(e.linear_fc1.weight, e.linear_fc2.weight) for e in self.local_experts], strict=True)
        wide = kept.GroupedProduct.apply(permuted_local_hidden_states, self.stand_ins[0], *first)
        active = kept.GatedActivation.apply(wide, permuted_probs.unsqueeze(-1))
        del wide
        return kept.GroupedProduct.apply(active, self.stand_ins[1], *second), None


class FusedSelfAttention(SelfAttention):
    """Attention with the fused rotary embedding."""

    angles: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        self.angles = rotary_pos_emb
        try:
            return super().forward(*args, rotary_pos_emb=None, **kwargs)
        finally:
            self.angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return kept.Rotation.apply(query, self.angles), kept.Rotation.apply(key, self.angles), value


class FusedAttention(PackedAttention):
    """Transformer Engine's attention, which copies values that are a piece of a larger tensor.

    Of a row that is cut over context-parallel ranks, it is the portable one, which keeps the same.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None
        query, key, value = (one.squeeze(1).contiguous() for one in (query, key, value))
        if self.context_group.size() > 1:
            out = context_attention(query, key, value, packed_seq_params, self.context_group, self.scale)
        else:
            out = kept.Attention.apply(query, key, value)
        return out.reshape(out.shape[0], 1, -1)


_OF_EACH: dict[type, type] = {RMSNorm: FusedRMSNorm, MLP: FusedMLP, SelfAttention: FusedSelfAttention}
_OF_EACH |= {PackedAttention: FusedAttention}
_LINEAR: dict[type, type] = {ColumnParallelLinear: FusedColumnLinear, RowParallelLinear: FusedRowLinear}


@contextmanager
def fused_layers(vlm: VLM, settings: Settings) -> Iterator[None]:
    """Within the block, the layers of a model on the meta device keep what those of Transformer Engine keep.

    Args:
        vlm: the model, with portable kernels.
        settings: those of the run. With adapters, norms are modules of their own and experts run one after the other;
            with ``adapter.quantize``, linear layers are Megatron's (``model.kernels.te``).
    """
    plain = settings.adapter.type is None
    known: dict[tuple[torch.Size, torch.dtype], Tensor] = {}  # as Transformer Engine keeps them

    def stand_in(weight: Tensor) -> Tensor:
        key = weight.shape, weight.dtype
        if key not in known:
            known[key] = torch.empty_like(weight, requires_grad=False)
        return known[key]

    changed: list[tuple[nn.Module, type]] = []
    norms: list[tuple[TransformerLayer, nn.Module]] = []
    heads = {id(getattr(chunk, "output_layer", None)) for chunk in vlm.language}

    def change(module: nn.Module, fused: type) -> None:
        changed.append((module, type(module)))
        module.__class__ = fused

    with torch.device("meta"):
        for root in (vlm.vision, *vlm.language):
            for module in list(root.modules()):
                of = type(module)
                if of in _OF_EACH:
                    change(module, _OF_EACH[of])
                elif of in _LINEAR and not settings.adapter.quantize and id(module) not in heads:
                    change(module, _LINEAR[of])
                    if module.weight.requires_grad:
                        module.stand_in = stand_in(module.weight)
                elif of is SequentialMLP and plain:
                    change(module, FusedExperts)
                    first = module.local_experts[0]
                    module.stand_ins = stand_in(first.linear_fc1.weight), stand_in(first.linear_fc2.weight)
                elif isinstance(module, TransformerLayer) and plain and isinstance(module.mlp, MLP):
                    norms.append((module, module.pre_mlp_layernorm))
    for layer, norm in norms:  # the MLP has it for as long
        layer.mlp.norm = norm.forward
        layer.pre_mlp_layernorm = IdentityOp()
    try:
        yield
    finally:
        for layer, norm in norms:
            layer.pre_mlp_layernorm = norm
            layer.mlp.norm = None
        for module, of in changed:
            for name in ("stand_in", "stand_ins"):
                module.__dict__.pop(name, None)
            module.__class__ = of
        for parameter in (parameter for root in (vlm.vision, *vlm.language) for parameter in root.parameters()):
            if getattr(parameter, "grad_added_to_main_grad", False):
                parameter.grad_added_to_main_grad = False

"""Experts on the meta device, where no router knows which expert a token chooses: each gets the same number of tokens.

Megatron's dispatcher reads the numbers of tokens back to the host. Here it reads those of a routing in which the
choices go round the experts, which is what the balancing loss works towards. Real numbers differ: this rank is planned
as the busiest of its expert-parallel ranks, to which the others send ``imbalance`` times as many tokens.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megavlm.model.vlm import VLM
from megavlm.tracing.known_shapes import KnownShapes

IMBALANCE = 1.3
"""Tokens of the busiest expert-parallel rank over their mean, unless something else is told: an assumption.

Without experts, or with all of them on each rank, it changes nothing.
"""


class BalancedDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher with counts of a balanced routing, in host memory."""

    imbalance = 1.0

    def preprocess(self, routing_map: Tensor) -> Tensor:
        tokens, experts = routing_map.shape
        top_k = self.config.moe_router_topk
        chosen = (torch.arange(tokens, device="cpu")[:, None] * top_k + torch.arange(top_k, device="cpu")) % experts
        balanced = torch.zeros(tokens, experts, dtype=torch.bool, device="cpu")
        per_expert = super().preprocess(balanced.scatter_(1, chosen, True))
        if per_expert.is_meta:  # Megatron has gathered the counts of all ranks on the device; each sends as this one
            here, ranks = balanced.sum(dim=0)[self.local_expert_indices], self.tp_size * self.ep_size
            if self.ep_size > 1:  # no more than all tokens can come
                here = (here * min(self.imbalance, self.ep_size)).ceil().to(here.dtype)
            self.output_splits = here.sum().expand(self.ep_size)
            self.output_splits_tp = (here.sum() * self.ep_size).expand(self.tp_size)
            self.num_global_tokens_per_local_expert = here.expand(ranks, -1)
            per_expert = here * ranks
        return per_expert


class BalancedExperts(KnownShapes):
    """Within the block, the experts of a model on the meta device get balanced numbers of tokens.

    A model without experts is not changed.
    """

    def __init__(self, vlm: VLM, imbalance: float = 1.0):
        super().__init__()
        self._top_k = vlm.decoder_config.moe_router_topk
        dispatchers = (
            getattr(module, "token_dispatcher", None) for chunk in vlm.language for module in chunk.modules()
        )
        for dispatcher in (one for one in dispatchers if isinstance(one, MoEAlltoAllTokenDispatcher)):
            dispatcher.imbalance = imbalance
            dispatcher.__class__ = BalancedDispatcher  # MoELayer chooses its dispatcher by name, so it cannot be given

    def carry_out(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.masked_select.default and args[0].is_meta:  # of a mask [experts, tokens]
            return args[0].new_empty(args[1].shape[-1] * self._top_k)
        return super().carry_out(func, args, kwargs)

"""Makes Megatron's TransformerConfig for the decoder and the vision tower, from a model's shapes and the settings."""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.config.settings import ParallelSettings, TrainSettings
from megavlm.config.speed_checks import check_recompute
from megavlm.model.shapes import Shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # for each name in shapes.ACTIVATIONS
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def check_supported(shapes: Shapes) -> None:
    """Raises a UserError for a model that can be converted, but not run."""
    if shapes.text.attention_bias:
        raise UserError(
            "config.json: text_config.attention_bias is true; no released Qwen3-VL has it, and megavlm does not "
            "support it",
            "give the folder of a Qwen3-VL",
        )


def decoder_widths(shapes: Shapes, parallel: ParallelSettings) -> dict[str, int]:
    """By name, the widths of the decoder's matrices on one rank."""
    text, widths = shapes.text, {"hidden size": shapes.text.hidden}
    widths["attention"] = text.heads * text.head_dim // parallel.tensor
    widths["queries, keys and values"] = (text.heads + 2 * text.kv_heads) * text.head_dim // parallel.tensor
    if not all(text.is_moe_layer(i) for i in range(text.layers)):
        widths["MLP"] = text.ffn // parallel.tensor
    if text.moe is not None:
        widths["expert"] = text.moe.ffn // parallel.expert_tensor
    return widths


def _fp8_format(recipe: str) -> str:
    """Whether gradients have the wider range of E5M2, or, with a scale for each few numbers, the precision of E4M3."""
    return "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid"


def _common(train: TrainSettings, kernels: str, *, fp8: bool, fused_gradients: bool) -> dict[str, Any]:
    fused, precision = kernels == "te", train.precision
    return dict(
        params_dtype=DTYPES[precision],
        bf16=precision != "fp32",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_rope_fusion=fused,  # a row is sbhd with b = 1, so TE's fused rotary embedding works for MRoPE unchanged
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fused_gradients,
        persist_layer_norm=False,
        deterministic_mode=train.deterministic,
        **(dict(fp8=_fp8_format(train.fp8.recipe), fp8_recipe=train.fp8.recipe) if fp8 else {}),
    )


def decoder_config(
    shapes: Shapes,
    parallel: ParallelSettings,
    train: TrainSettings,
    kernels: str,
    *,
    grouped_experts: bool,
    fused_gradients: bool = False,
) -> TransformerConfig:
    """The configuration of the Qwen3 decoder.

    Args:
        shapes: the model's shapes.
        parallel, train: sections of the settings.
        kernels: ``te`` or ``portable``.
        grouped_experts, fused_gradients: attributes of the ``Kernels``.
    """
    text = shapes.text
    check_supported(shapes)
    check_recompute(train, kernels)
    # Megatron's fused kernel for a GELU is the tanh approximation, whichever GELU is asked for
    options = _common(train, kernels, fp8=train.precision == "fp8", fused_gradients=fused_gradients) | dict(
        bias_activation_fusion=kernels == "te" and text.hidden_act == "silu"
    )
    if text.rope_scaling is not None and text.rope_scaling.attention_factor != 1:
        # the factor is on queries and on keys, so its square is on their products
        options["softmax_scale"] = text.rope_scaling.attention_factor**2 / math.sqrt(text.head_dim)
    if text.moe is not None:
        options |= dict(
            num_moe_experts=text.moe.num_experts,
            moe_router_topk=text.moe.top_k,
            moe_ffn_hidden_size=text.moe.ffn,
            moe_layer_freq=[int(text.is_moe_layer(i)) for i in range(text.layers)],
            # a softmax over the chosen logits equals a softmax over all that is normalised over the chosen
            moe_router_pre_softmax=False,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=train.moe_aux_loss_coeff,
            moe_z_loss_coeff=train.moe_z_loss_coeff or None,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="alltoall" if train.experts.dispatcher == "alltoall" else "flex",
            moe_grouped_gemm=grouped_experts,
            moe_permute_fusion=kernels == "te",
            moe_router_fusion=train.experts.fused_router,
        )
        if train.experts.dispatcher != "alltoall":
            if importlib.util.find_spec("deep_ep") is None:
                raise UserError(
                    f"train.experts.dispatcher is {train.experts.dispatcher}, but the package deep_ep is not installed",
                    "install DeepEP, or set it to alltoall",
                )
            options["moe_flex_dispatcher_backend"] = train.experts.dispatcher
    if train.recompute == "full":
        options |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif train.recompute != "none":
        options |= dict(recompute_granularity="selective", recompute_modules=list(train.recompute))
    if parallel.virtual_pipeline:
        # With two stages both neighbours are the same rank, and Megatron's batched sends would get mixed up
        options |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
    return TransformerConfig(
        num_layers=text.layers,
        hidden_size=text.hidden,
        num_attention_heads=text.heads,
        num_query_groups=text.kv_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[text.hidden_act],
        init_method_std=text.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=DTYPES[train.precision],
        batch_p2p_sync=False,  # it worked round an error of early versions of torch, with a wait for the GPU
        tp_comm_overlap=train.overlap.tensor,
        **options,
    )


def tower_config(
    shapes: Shapes, train: TrainSettings, kernels: str, *, fused_gradients: bool = False
) -> TransformerConfig:
    """The configuration of vision tower and projector, which every rank holds whole: there is no model parallelism."""
    vision = shapes.vision
    fp8 = train.precision == "fp8" and train.fp8.tower
    fused_gelu = kernels == "te" and vision.hidden_act == "gelu_pytorch_tanh"
    return TransformerConfig(
        num_layers=vision.layers,
        hidden_size=vision.hidden,
        num_attention_heads=vision.heads,
        ffn_hidden_size=vision.ffn,
        normalization="LayerNorm",
        layernorm_epsilon=1e-6,  # transformers' qwen3_vl has it in the code, not in config.json
        add_bias_linear=True,
        gated_linear_unit=False,
        # Megatron's fused bias and GELU is the tanh approximation, but it is chosen by the name of the exact GELU
        activation_func=F.gelu if fused_gelu else _ACTIVATIONS[vision.hidden_act],
        bias_activation_fusion=fused_gelu,
        init_method_std=vision.init_std,
        disable_parameter_transpose_cache=fp8,  # no schedule says when the weights have changed
        **_common(train, kernels, fp8=fp8, fused_gradients=fused_gradients),
    )

"""The operations that a step carries out: those of the model, and what is computed again in the backward pass."""

from collections.abc import Collection

from megavlm.config.settings import Settings
from megavlm.model.flops import Work, experts_of_a_token, forward_flops, parts_flops
from megavlm.model.shapes import Shapes


def hardware_flops(
    shapes: Shapes, work: Work, settings: Settings, frozen: Collection[str] = (), adapted: Collection[str] = ()
) -> dict[str, float]:
    """The operations of the parts "vision", "projector" and "language" over all ranks, padding left out.

    They are those of ``model.flops.parts_flops`` and

    - in attention, once more the products of queries and keys: the backward pass of FlashAttention and of torch's
      kernel for CPUs computes them again, because they are not kept;
    - the logits, which are never kept;
    - what ``train.recompute`` and ``vision.recompute`` name.

    Args:
        shapes, work, frozen, adapted: see ``step_flops``.
        settings: the settings of the run.
    """
    forward, total = forward_flops(shapes, work), parts_flops(shapes, work, frozen, adapted)
    recompute, text = settings.train.recompute, shapes.text
    head = 2 * work.target_tokens * text.hidden * text.vocab
    if len(set(frozen)) < 3:  # there is a backward pass through the decoder
        language = forward["language"]
        total["language"] += language.attention / 2 + head
        if recompute == "full":
            total["language"] += language.weights - head + language.attention
        if "core_attn" in recompute:
            total["language"] += language.attention
        of_experts = work.tokens * 2 * experts_of_a_token(text)
        if "moe" in recompute:
            total["language"] += of_experts
        if "mlp" in recompute:
            dense = sum(not text.is_moe_layer(layer) for layer in range(text.layers))
            total["language"] += work.tokens * 2 * dense * 3 * text.hidden * text.ffn
    if "vision" not in frozen:
        total["vision"] += forward["vision"].attention / 2
    if settings.vision.recompute and not {"vision", "projector"} <= set(frozen):
        total["vision"] += forward["vision"].weights + forward["vision"].attention
        total["projector"] += forward["projector"].weights
    return total

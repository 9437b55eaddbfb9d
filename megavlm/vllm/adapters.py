"""Which adapters servers of vLLM apply by themselves, so that they get them alone instead of merged weights."""

from typing import Any

from megavlm.config.settings import Settings
from megavlm.convert.hf_shapes import shapes_of
from megavlm.convert.peft_names import part_of, targeted
from megavlm.platform import on_gpu

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.25.1 allows as ``max_lora_rank``."""
_WHOLE = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
_WHOLE |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
"""The linear layers of Hugging Face's decoder that are one layer in vLLM's."""
_OF_ATTENTION = {"qkv_proj", "o_proj"}
"""In vLLM's names: all that a model with experts may have adapters on, to which vLLM applies them by themselves."""


def lora_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of vLLM's engine for the adapters of a run; {}: it cannot apply them, or there are none."""
    targets = _targets(settings)
    if not targets:
        return {}
    return {
        # On a CPU vLLM samples several times more slowly with adapters, and its kernels for GPUs take 16 bits alone.
        "enable_lora": on_gpu() and settings.train.precision != "fp32",
        "max_lora_rank": next(rank for rank in _RANKS if rank >= settings.adapter.rank),
        "lora_target_modules": targets,
    }


def takes_adapters(lora: dict[str, Any] | None, settings: Settings) -> bool:
    """Whether a server applies the adapters of a run. ``lora`` is what the server says of itself; None: none at all."""
    targets = _targets(settings)
    if not targets or lora is None:
        return False
    return lora["rank"] >= settings.adapter.rank and (lora["targets"] is None or {*targets} <= {*lora["targets"]})


def _targets(settings: Settings) -> list[str]:
    """The ends of vLLM's names of the layers with adapters; [] if it cannot apply them, or there are none.

    vLLM has LoRA of one rank and scale for all layers, and keeps all other weights as they are. Experts and the tower
    were not tried.
    """
    adapter, frozen = settings.adapter, set(settings.model.freeze) - set(settings.train.unfreeze_after)
    others = (adapter.rank_pattern, adapter.alpha_pattern, adapter.modules_to_save, adapter.quantize)
    if adapter.type != "lora" or any(others) or adapter.rank > _RANKS[-1] or not {"vision", "projector"} <= frozen:
        return []
    shapes = shapes_of(settings.model.hf)
    linears = targeted(adapter, shapes).values()
    if any(linear.experts or part_of(linear.name) != "language" for linear in linears):
        return []
    names = (linear.name.rpartition(".")[2] for linear in linears)
    ends = {_WHOLE.get(name, name) for name in names}
    if shapes.text.moe is not None and not ends <= _OF_ATTENTION:  # of its dense layers, too
        return []
    return sorted(ends)

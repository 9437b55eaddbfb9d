"""Checks that settings for speed fit each other."""

from megavlm.base.errors import UserError
from megavlm.config.sections import ParallelSettings
from megavlm.config.train_section import TrainSettings

_TE = "set model.kernels to te (Transformer Engine), or remove it"


def check_speed(train: TrainSettings, parallel: ParallelSettings, kernels: str, adapter: str | None) -> None:
    """Raises a UserError for settings that would be ignored or cannot work together, whatever the model is.

    Args:
        train, parallel: sections of the settings.
        kernels: model.kernels.
        adapter: adapter.type.
    """
    fp8, overlap = train.fp8, train.overlap
    for name in ("recipe", "tower"):
        if train.precision != "fp8" and fp8.is_changed(name):
            raise UserError(
                f"train.fp8.{name} is {getattr(fp8, name)}, but train.precision is {train.precision}: it would be "
                "ignored",
                f"remove {name}, or set train.precision to fp8",
            )
    if overlap.tensor and not (kernels == "te" and parallel.sequence_parallel and not adapter):
        raise UserError(
            f"train.overlap.tensor is true, but model.kernels is {kernels}, parallel.tensor {parallel.tensor}, "
            f"parallel.sequence {str(parallel.sequence).lower()} and adapter.type {adapter or 'null'}: it works with "
            "Transformer Engine, sequence parallelism over several tensor ranks and without adapters",
            "set model.kernels=te, parallel.tensor above 1 and parallel.sequence=true, or remove it",
        )
    if overlap.weights and not (overlap.gradients and train.optimizer == "adam"):
        raise UserError(
            f"train.overlap.weights is true, but train.overlap.gradients is {str(overlap.gradients).lower()} and "
            f"train.optimizer {train.optimizer}: weights are gathered in the pieces of the gradients, and only adam "
            "divides them",
            "set overlap.gradients=true and optimizer=adam, or remove it",
        )
    if train.offload_activations and train.recompute != "full":
        raise UserError(
            f"train.offload_activations is true, but train.recompute is {train.recompute}: only the layers' inputs can "
            "be in host memory, and computing the rest again is faster than copying it",
            "set train.recompute=full, or remove it",
        )
    if train.experts.fused_router and kernels != "te":
        raise UserError(f"train.experts.fused_router is true, but model.kernels is {kernels}", _TE)
    check_recompute(train, kernels)


def check_recompute(train: TrainSettings, kernels: str) -> None:
    """Raises a UserError for modules of ``train.recompute`` that the kernels (te, portable, auto) cannot recompute."""
    modules = train.recompute
    if isinstance(modules, str):
        return
    if not modules or len(set(modules)) < len(modules):
        raise UserError(
            f"train.recompute is {modules}: it names no module, or one twice", "name each module once, or set none"
        )
    if kernels == "te" and "core_attn" in modules:
        raise UserError(
            "train.recompute has core_attn (selective means the same), but Transformer Engine's attention keeps only "
            "its result: computing it twice would cost time and free nothing",
            "set train.recompute to none, or to a list such as [mlp]",
        )
    if kernels == "portable" and (lacking := ", ".join({"layernorm", "moe_act"} & set(modules))):
        raise UserError(
            f"train.recompute has {lacking}, but model.kernels is portable: Megatron recomputes it only with "
            "Transformer Engine",
            _TE,
        )
    if {"moe", "moe_act"} <= set(modules):
        raise UserError("train.recompute has moe and moe_act: moe includes it", "remove moe_act")
    if train.precision == "fp8" and train.fp8.recipe == "delayed" and {"layernorm", "moe_act"} & set(modules):
        raise UserError(
            f"train.recompute is {modules}, but train.fp8.recipe is delayed: Megatron recomputes layernorm and moe_act "
            "only with scales of the tensor itself",
            "choose recipe blockwise or tensorwise, or remove the modules",
        )

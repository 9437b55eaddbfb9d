"""Checks that settings for speed fit the shapes of a model."""

from megavlm.base.errors import UserError
from megavlm.config.sections import ParallelSettings
from megavlm.config.speed_sections import FP8_BLOCKS
from megavlm.config.train_section import TrainSettings


def check_speed_with_model(
    train: TrainSettings,
    parallel: ParallelSettings,
    *,
    seq_length: int,
    decoder_widths: dict[str, int],
    tower_widths: dict[str, int],
    num_experts: int | None,
    all_layers_have_experts: bool,
) -> None:
    """Raises a UserError if settings for speed do not fit a model.

    Args:
        train, parallel: sections of the settings.
        seq_length: number of tokens in a row.
        decoder_widths: by name, the widths of the decoder's matrices on one rank.
        tower_widths: the same of the vision tower.
        num_experts: experts in a layer; None for a dense model.
        all_layers_have_experts: whether no layer has a dense MLP.
    """
    experts = [name for name in ("dispatcher", "fused_router") if train.experts.is_changed(name)]
    modules = set(train.recompute) if isinstance(train.recompute, list) else set()
    if num_experts is None and (experts or modules & {"moe", "moe_act"}):
        what = f"train.experts.{experts[0]}" if experts else f"train.recompute ({', '.join(sorted(modules))})"
        raise UserError(f"{what} is set for experts, but the model is dense: it would be ignored", "remove it")
    if all_layers_have_experts and "mlp" in modules:
        raise UserError(
            "train.recompute has mlp, but every layer of the model has experts: it would be ignored",
            "name moe or moe_act instead",
        )
    if train.experts.dispatcher != "alltoall" and parallel.expert * parallel.expert_tensor == 1:
        raise UserError(
            f"train.experts.dispatcher is {train.experts.dispatcher}, but every rank has all experts whole: nothing "
            "would be sent",
            "set parallel.expert above 1, or remove it",
        )
    if train.precision == "fp8":
        _check_fp8(train, parallel, seq_length, decoder_widths, tower_widths if train.fp8.tower else {})


def _check_fp8(
    train: TrainSettings,
    parallel: ParallelSettings,
    seq_length: int,
    decoder_widths: dict[str, int],
    tower_widths: dict[str, int],
) -> None:
    block, recipe = FP8_BLOCKS[train.fp8.recipe], train.fp8.recipe
    ranks = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    if seq_length % (ranks * block):
        least = -(-seq_length // (ranks * block)) * ranks * block
        raise UserError(
            f"data.seq_length is {seq_length}, which gives a rank {seq_length / ranks:g} tokens of a row; with "
            f"train.precision fp8 and train.fp8.recipe {recipe} the number must be divisible by {block}",
            f"set data.seq_length to {least}"
            + (", or train.fp8.recipe to tensorwise, which needs 16" if block > 16 else ""),
        )
    for part, widths in (("decoder", decoder_widths), ("vision tower", tower_widths)):
        wrong = {name: width for name, width in widths.items() if width % block}
        if wrong:
            listed = ", ".join(f"{name} {width}" for name, width in wrong.items())
            raise UserError(
                f"train.fp8.recipe is {recipe}, which needs widths divisible by {block}, but on a rank the {part} has "
                f"{listed}",
                "choose recipe tensorwise, which needs 16"
                + (", or set train.fp8.tower to false" if part != "decoder" else ""),
            )

"""Checks whether a parallel layout fits the number of processes, the batch size and the shapes of a model."""

import math
from collections.abc import Mapping

from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.config.settings import ParallelSettings, TrainSettings, check_seq_length


def check_layout(
    parallel: ParallelSettings,
    world_size: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
    num_experts: int | None,
    num_layers: int,
    seq_length: int,
    global_batch_size: int | None,
    ffn: int | None = None,
    expert_ffn: int | None = None,
) -> int:
    """Checks that all sizes are divisible as the layout needs, before any process group is created.

    Args:
        parallel: the layout.
        world_size: number of processes.
        num_heads, num_kv_heads, vocab_size, num_layers: sizes of the language model.
        num_experts: experts in an MoE layer; None for a dense model.
        seq_length: number of tokens in a row.
        global_batch_size: number of rows in a step; None if nothing is trained.
        ffn, expert_ffn: inner widths of an MLP and of an expert; None if the model has none.

    Returns:
        The data-parallel size.

    Raises:
        UserError: a size is not divisible; the message names the nearest values that are.
    """
    data_parallel = check_world_size(parallel, world_size, global_batch_size)
    check_seq_length(seq_length, parallel)
    tensor, pipeline, chunks = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline or 1
    cut = {
        "attention heads": num_heads,
        "key/value heads": num_kv_heads,
        "vocabulary entries": vocab_size,
        "columns of an MLP": ffn or 0,
    }
    for what, count in cut.items():
        _divides("parallel.tensor", tensor, what, count, _divisors(math.gcd(*cut.values())))
    _divides("parallel.expert_tensor", parallel.expert_tensor, "columns of an expert", expert_ffn or 0)
    if parallel.first_stage_layers or parallel.last_stage_layers:
        _check_uneven_stages(parallel, num_layers)
    else:
        if chunks > 1 and num_layers % (pipeline * chunks):
            raise UserError(
                f"parallel.pipeline × parallel.virtual_pipeline is {pipeline} × {chunks} = {pipeline * chunks}, which "
                f"does not divide the model's {num_layers} layers",
                f"products that do: {_listed(_divisors(num_layers))}{_uneven_remedy(parallel, num_layers)}",
            )
        if num_layers % pipeline:
            raise UserError(
                f"parallel.pipeline is {pipeline}, which does not divide the model's {num_layers} layers",
                f"values that do: {_listed(_divisors(num_layers))}{_uneven_remedy(parallel, num_layers)}",
            )
    if num_experts is None:
        for name in ("expert", "expert_tensor"):
            if getattr(parallel, name) > 1:
                raise UserError(
                    f"parallel.{name} is {getattr(parallel, name)}, but the model is dense: it would be ignored",
                    f"set parallel.{name} to 1, or point model.hf at a mixture-of-experts model",
                )
    else:
        _divides("parallel.expert", parallel.expert, "experts", num_experts)
        if tensor > 1 and not parallel.sequence:
            raise UserError(
                f"parallel.sequence is false and parallel.tensor is {tensor}, but the model is a mixture of experts: "
                "with tensor parallelism, Megatron trains experts only with sequence parallelism",
                "set parallel.sequence to true",
            )
    return data_parallel


def check_world_size(parallel: ParallelSettings, world_size: int, global_batch_size: int | None = None) -> int:
    """The part of `check_layout` that needs no model: processes and batch size. Returns the data-parallel size."""
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_parallel:
        raise UserError(
            f"{counted(world_size, 'process', 'es')} cannot hold the layout parallel.tensor × parallel.pipeline × "
            f"parallel.context = {parallel.tensor} × {parallel.pipeline} × {parallel.context} = {model_parallel}",
            f"start {_multiples(world_size, model_parallel)} processes, or change the layout",
        )
    expert_parallel = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world_size % expert_parallel:
        raise UserError(
            f"{counted(world_size, 'process', 'es')} cannot hold the layout parallel.expert × parallel.expert_tensor × "
            f"parallel.pipeline = {parallel.expert} × {parallel.expert_tensor} × {parallel.pipeline} = "
            f"{expert_parallel}",
            f"start {_multiples(world_size, expert_parallel)} processes, or change the layout",
        )
    data_parallel = world_size // model_parallel
    if global_batch_size is not None:
        _check_batch(global_batch_size, parallel, world_size, data_parallel, "train.global_batch_size")
    return data_parallel


def check_batch_ramp(ramp: Mapping[int, int], parallel: ParallelSettings, world_size: int) -> None:
    """Raises a UserError if rows of an entry of train.batch_ramp cannot be divided among the processes."""
    data_parallel = check_world_size(parallel, world_size)
    for step, rows in ramp.items():
        _check_batch(rows, parallel, world_size, data_parallel, f"train.batch_ramp[{step}]")


def _check_batch(
    global_batch_size: int, parallel: ParallelSettings, world_size: int, data_parallel: int, key: str
) -> None:
    model_parallel = world_size // data_parallel
    if global_batch_size % data_parallel:
        raise UserError(
            f"{key} is {global_batch_size}, which is not divisible by the {data_parallel} "
            f"data-parallel ranks ({world_size} processes / {model_parallel})",
            f"the nearest valid batch sizes: {_multiples(global_batch_size, data_parallel)}",
        )
    if parallel.virtual_pipeline and (global_batch_size // data_parallel) % parallel.pipeline:
        raise UserError(
            f"{key} is {global_batch_size}, which gives each of the {data_parallel} data-parallel "
            f"ranks {counted(global_batch_size // data_parallel, 'micro-batch', 'es')}; with parallel.virtual_pipeline "
            f"that number must be divisible by parallel.pipeline = {parallel.pipeline}",
            f"the nearest valid batch sizes: {_multiples(global_batch_size, data_parallel * parallel.pipeline)}",
        )


def check_prompts(prompts: int, mini_batches: int, data_parallel: int) -> None:
    """Raises a UserError if the prompts of a step cannot be divided among the data-parallel ranks and mini-batches."""
    if prompts % (data_parallel * mini_batches):
        ranks = counted(data_parallel, "data-parallel rank")
        raise UserError(
            f"rollout.prompts is {prompts}, which cannot be divided evenly among {ranks} and align.mini_batches = "
            f"{mini_batches}",
            f"the nearest valid numbers: {_multiples(prompts, data_parallel * mini_batches)}",
        )


def check_window(window: int | None, parallel: ParallelSettings) -> None:
    """Raises a UserError if a window of micro-batches cannot fill an interleaved pipeline."""
    if window and parallel.virtual_pipeline and window % parallel.pipeline:
        raise UserError(
            f"vision.window is {window}; with parallel.virtual_pipeline it must be divisible by parallel.pipeline = "
            f"{parallel.pipeline}",
            f"the nearest valid windows: {_multiples(window, parallel.pipeline)}; or null, for the whole step",
        )


def check_expert_settings(train: TrainSettings, num_experts: int | None, *, decoder_trained: bool = True) -> None:
    """Raises a UserError if a setting for experts has no effect.

    Args:
        train: the section of the settings.
        num_experts: experts in an MoE layer; None for a dense model.
        decoder_trained: whether the decoder, or adapters in it, are ever trained.
    """
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        value = getattr(train, name)
        if not value or not train.is_changed(name):
            continue
        if num_experts is None:
            raise UserError(
                f"train.{name} is {value:g}, but the model is dense: it would be ignored",
                "remove it, or point model.hf at a mixture-of-experts model",
            )
        if not decoder_trained:
            raise UserError(
                f"train.{name} is {value:g}, but model.freeze has language: it would be ignored",
                "remove it, or remove language from model.freeze",
            )


def _check_uneven_stages(parallel: ParallelSettings, num_layers: int) -> None:
    """Checks that the remaining layers divide evenly over the other stages, and each stage's layers over its chunks."""
    given = {
        name: getattr(parallel, name)
        for name in ("first_stage_layers", "last_stage_layers")
        if getattr(parallel, name) is not None
    }
    listed = " and ".join(f"parallel.{name} {layers}" for name, layers in given.items())
    rest, stages = num_layers - sum(given.values()), parallel.pipeline - len(given)
    if rest < stages or (stages == 0 and rest) or (stages and rest % stages):
        raise UserError(
            f"{listed} of the model's {num_layers} layers leave {rest} for {counted(stages, 'other stage')}",
            "; ".join(
                [
                    "choose numbers that leave the same number of layers, at least one, to each of the other stages",
                    *filter(None, (_that_fit(parallel, num_layers, name, given) for name in given)),
                ]
            ),
        )
    chunks = parallel.virtual_pipeline or 1
    if chunks > 1 and not stages:
        raise UserError(
            f"{listed} determine all stages of an interleaved pipeline, which Megatron does not support",
            "set only one of the two; the other follows from it",
        )
    for name, layers in {**given, "layers of every other stage": rest // stages if stages else chunks}.items():
        if layers % chunks:
            raise UserError(
                f"{listed}: {name} is {layers}, which is not divisible by parallel.virtual_pipeline = {chunks}",
                f"choose multiples of {chunks}",
            )


def _uneven_remedy(parallel: ParallelSettings, num_layers: int) -> str:
    """The settings with which stages of different sizes hold the layers, as the end of a remedy; "" if none can."""
    found = _that_fit(parallel, num_layers, "first_stage_layers", {})
    return f"; or give one stage another number of layers: {found} (or parallel.last_stage_layers)" if found else ""


def _that_fit(parallel: ParallelSettings, num_layers: int, name: str, given: dict[str, int]) -> str:
    """ "parallel.NAME can be 5 or 8 or 11", values next to an even share; "" if none leaves the other stages equal."""
    others = {key: layers for key, layers in given.items() if key != name}
    stages, chunks = parallel.pipeline - 1 - len(others), parallel.virtual_pipeline or 1
    rest = num_layers - sum(others.values())
    fitting = [
        layers
        for layers in range(chunks, rest + 1, chunks)
        if (rest - layers >= stages * chunks and (rest - layers) % (stages * chunks) == 0 if stages else layers == rest)
    ]
    if not fitting or (not stages and chunks > 1):
        return ""
    nearest = sorted(fitting, key=lambda layers: (abs(layers - num_layers / parallel.pipeline), layers))[:3]
    return f"parallel.{name} can be {' or '.join(map(str, sorted(nearest)))}"


def _divides(setting: str, value: int, what: str, count: int, allowed: list[int] | None = None) -> None:
    """Raises a UserError if `value` does not divide `count`, with the values that do, or that are ``allowed``."""
    if count % value:
        raise UserError(
            f"{setting} is {value}, which does not divide the model's {count} {what}",
            f"values that do: {_listed(allowed or _divisors(count))}",
        )


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _listed(numbers: list[int], most: int = 8) -> str:
    return ", ".join(str(n) for n in numbers[:most]) + (", …" if len(numbers) > most else "")


def _multiples(number: int, of: int) -> str:
    """The nearest multiples of `of` below and above `number`, as text."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)

"""`megavlm export`: converts a checkpoint to a Hugging Face folder, with adapters merged or written separately."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from megavlm.base import yaml_files
from megavlm.base.byte_sizes import parse_size
from megavlm.base.errors import UserError
from megavlm.checkpoint.averages import AveragedCheckpoint
from megavlm.checkpoint.held import held
from megavlm.checkpoint.load_weights import check_base, shapes_at_start
from megavlm.config.data_sections import LIMITS, DataSettings
from megavlm.config.settings import Settings
from megavlm.convert import mcore_to_hf
from megavlm.convert.adapter import REWARD_HEAD, Adapter
from megavlm.data.limits import changed_limits, load_processor, write_limits
from megavlm.hub.card import Card, model_type_of
from megavlm.hub.facts import RunFacts, hub_name, license_of
from megavlm.rollout.answerer import stop_tokens
from megavlm.runtime.adapter_start import warn_of_other_base
from megavlm.runtime.weights import Weights, choose

_GENERATION = "generation_config.json"


def main(
    settings: Settings,
    out: Path,
    adapter: bool = False,
    shard_size: str | None = None,
    base_model: str | None = None,
    ema: bool = False,
) -> int:
    """Writes ``out`` from ``model.load``, or the run in ``output``, with the other files of ``model.hf``.

    The run may go on meanwhile, and delete its checkpoint. The limits of pictures and videos in the processor files are
    those of ``settings.data`` or, where these are null, of the run that trained the weights. A model card says what
    they were trained on.

    Args:
        settings: the settings of the run.
        out: the folder to write.
        adapter: write only ``model.adapter``, in peft's format. Otherwise it is merged into the weights.
        shard_size: largest size of a file of weights, such as "5GB"; None: the files of ``model.hf``.
        base_model: the name on the hub of the model in ``model.hf``, for the card; None: that of its folder in the
            hub's cache, if it is one.
        ema: write the moving average of the trained weights (``train.ema``) instead of the weights.

    Raises:
        UserError: the adapter or the checkpoint is missing or does not fit.
    """
    shard_bytes = parse_size(shard_size) if shard_size is not None else None
    if adapter and shard_size is not None:
        raise UserError("--shard-size with --adapter would be ignored: peft reads one file", "leave out one of them")
    with ExitStack() as stack:
        kept, weights = _chosen(settings, stack, ema)
        return _export(kept, weights, out, adapter, shard_bytes, base_model)


def _export(
    settings: Settings,
    weights: Weights,
    out: Path,
    adapter: bool,
    shard_bytes: int | None,
    base_model: str | None,
) -> int:
    model, found = settings.model, None
    shapes = shapes_at_start(model)
    if model.adapter is None and settings.adapter.type is not None:
        raise UserError(
            f"adapter.type is {settings.adapter.type}, but model.adapter is not set, so the base model would be "
            "exported without an adapter",
            "set model.adapter to the run that trained the adapter, or adapter.type to null",
        )
    if model.adapter is not None:
        found = Adapter(model.adapter, shapes, AveragedCheckpoint(model.adapter) if weights.ema else None)
    limits = _limits(settings, weights)
    print(f"weights · {weights}", flush=True)
    listed = ", ".join(f"data.{name}={value}" for name, value in limits.items())
    base = base_model or hub_name(model.hf)

    # read before the weights are written, so that a damaged file of the run does not cost them
    facts = RunFacts(weights.run, weights.step) if weights.run is not None and weights.step is not None else None
    for cause in facts.left_out if facts is not None else ():
        print(f"the model card does not tell of an earlier run: {cause}", flush=True)
    name, model_type = out.absolute().name, model_type_of(model.hf)
    card = Card(name, model_type, facts, base, license_of(model.hf), adapter, limits=listed)

    def write_card(folder: Path) -> None:
        replace(card, has_head=(folder / REWARD_HEAD).is_file()).write(folder)

    if not adapter:
        load = model.load
        assert load is not None  # ``choose`` requires it
        check_base(load)
        if found is not None:
            warn_of_other_base(found.folder, load)
        changes = changed_limits(model.hf, DataSettings().model_copy(update=limits)) if limits else {}

        def finish(folder: Path) -> None:
            write_limits(folder, changes)
            _write_generation_config(folder)
            write_card(folder)

        mcore_to_hf(
            load,
            model.hf,
            out,
            adapter=found,
            resize_vocabulary=model.resize_vocabulary,
            shard_bytes=shard_bytes,
            overwrite=settings.overwrite,
            finish=finish,
            source=AveragedCheckpoint(load) if weights.ema and found is None else None,
        )
        if limits:
            print(f"the processor files carry the limits of training: {listed}")
    elif found is None:
        raise UserError(
            "--adapter exports only the adapter, but model.adapter is not set",
            "set model.adapter to the run that trained the adapter",
        )
    else:
        found.write(out, base or model.hf, overwrite=settings.overwrite, finish=write_card)
        if limits:
            print(f"an adapter has no processor files; use it with the limits of training: {listed}")
    print(f"{'the adapter' if adapter else 'the model'} is exported to {out}, with a model card (README.md)")
    return 0


def _chosen(settings: Settings, stack: ExitStack, ema: bool) -> tuple[Settings, Weights]:
    """``choose``, with folders in ``model`` that stay until ``stack`` ends, although a run may delete its checkpoints.

    If a run has deleted its newest checkpoint just before, there is a newer one, which is taken.
    """
    before = None
    while True:
        chosen, weights = choose(settings, ema=ema)
        folders = {"load": chosen.model.load, "adapter": chosen.model.adapter}
        try:
            kept = {key: stack.enter_context(held(path)) for key, path in folders.items() if path is not None}
        except FileNotFoundError as error:
            if weights == before:
                raise UserError(f"{error.filename} does not exist", "name the run, or another checkpoint") from None
            before = weights
        else:
            return chosen.model_copy(update={"model": chosen.model.model_copy(update=kept)}), weights


def _write_generation_config(folder: Path) -> None:
    """Writes the tokens that end an answer into an exported folder whose model had no such file."""
    if (folder / _GENERATION).is_file() or not (folder / "tokenizer_config.json").is_file():
        return
    tokenizer = load_processor(folder).tokenizer
    ends = list(stop_tokens(folder, tokenizer))
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def _limits(settings: Settings, weights: Weights) -> dict[str, Any]:
    """The limits of pictures and videos that are not null in these settings or, if null there, in those of the run."""
    run: dict[str, Any] = {}
    if weights.run is not None and (config := weights.run / "config.yaml").is_file():
        run = yaml_files.read_file(config).tree.get("data") or {}
    return {name: run[name] for name in LIMITS if run.get(name) is not None} | settings.data.limits

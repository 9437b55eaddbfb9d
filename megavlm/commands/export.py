"""`megavlm export`: converts a checkpoint to a Hugging Face folder, with adapters merged or written separately."""

from pathlib import Path
from typing import Any

from megavlm.base import yaml_files
from megavlm.base.errors import UserError
from megavlm.checkpoint.averages import AveragedCheckpoint
from megavlm.checkpoint.load_weights import check_base, shapes_at_start
from megavlm.config.data_sections import LIMITS, DataSettings
from megavlm.config.settings import Settings
from megavlm.convert import mcore_to_hf
from megavlm.convert.adapter import Adapter
from megavlm.data.limits import changed_limits, write_limits
from megavlm.runtime.adapter_start import warn_of_other_base
from megavlm.runtime.weights import Weights, choose


def main(settings: Settings, out: Path, adapter: bool = False, ema: bool = False) -> int:
    """Writes ``out`` from ``model.load``, or the run in ``output``, with the other files of ``model.hf``.

    The limits of pictures and videos in the processor files are those of ``settings.data`` or, where these are null,
    of the run that trained the weights.

    Args:
        settings: the settings of the run.
        out: the folder to write.
        adapter: write only ``model.adapter``, in peft's format. Otherwise it is merged into the weights.
        ema: write the moving average of the trained weights (``train.ema``) instead of the weights.

    Raises:
        UserError: the adapter or the checkpoint is missing or does not fit.
    """
    settings, weights = choose(settings)
    model, found = settings.model, None
    shapes = shapes_at_start(model)
    if model.adapter is None and settings.adapter.type is not None:
        raise UserError(
            f"adapter.type is {settings.adapter.type}, but model.adapter is not set, so the base model would be "
            "exported without an adapter",
            "set model.adapter to the run that trained the adapter, or adapter.type to null",
        )
    if model.adapter is not None:
        found = Adapter(model.adapter, shapes, AveragedCheckpoint(model.adapter) if ema else None)
    limits = _limits(settings, weights)
    print(f"weights · {weights}{', moving average' if ema else ''}", flush=True)
    listed = ", ".join(f"data.{name}={value}" for name, value in limits.items())
    if not adapter:
        load = weights.load
        check_base(load)
        if found is not None:
            warn_of_other_base(found.folder, load)
        changes = changed_limits(model.hf, DataSettings().model_copy(update=limits)) if limits else {}
        mcore_to_hf(
            load,
            model.hf,
            out,
            adapter=found,
            resize_vocabulary=model.resize_vocabulary,
            overwrite=settings.overwrite,
            source=AveragedCheckpoint(load) if ema and found is None else None,
        )
        write_limits(out, changes)
        if limits:
            print(f"the processor files carry the limits of training: {listed}")
    elif found is None:
        raise UserError(
            "--adapter exports only the adapter, but model.adapter is not set",
            "set model.adapter to the run that trained the adapter",
        )
    else:
        found.write(out, model.hf, overwrite=settings.overwrite)
        if limits:
            print(f"an adapter has no processor files; use it with the limits of training: {listed}")
    print(f"{'the adapter' if adapter else 'the model'} is exported to {out}")
    return 0


def _limits(settings: Settings, weights: Weights) -> dict[str, Any]:
    """The limits of pictures and videos that are not null in these settings or, if null there, in those of the run."""
    run: dict[str, Any] = {}
    if weights.run is not None and (config := weights.run / "config.yaml").is_file():
        run = yaml_files.read_file(config).tree.get("data") or {}
    return {name: run[name] for name in LIMITS if run.get(name) is not None} | settings.data.limits

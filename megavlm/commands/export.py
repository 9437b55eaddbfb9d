"""`megavlm export`: converts a checkpoint to a Hugging Face folder, with adapters merged or written separately."""

from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import check_base
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.convert import mcore_to_hf
from megavlm.convert.adapter import Adapter
from megavlm.model.shapes import Shapes
from megavlm.runtime.adapter_start import warn_of_other_base


def main(settings: Settings, out: Path, adapter: bool = False) -> int:
    """Writes ``out`` from ``model.load``, with config, tokenizer and processor from ``model.hf``.

    Args:
        settings: the settings of the run.
        out: the folder to write.
        adapter: write only ``model.adapter``, in peft's format. Otherwise it is merged into the weights.

    Raises:
        UserError: the adapter or the checkpoint is missing or does not fit.
    """
    model, found = settings.model, None
    if model.adapter is None and settings.adapter.type is not None:
        raise UserError(
            f"adapter.type is {settings.adapter.type}, but model.adapter is not set, so the base model would be "
            "exported without an adapter",
            "set model.adapter to the run that trained the adapter, or adapter.type to null",
        )
    if model.adapter is not None:
        found = Adapter(find_checkpoint(model.adapter), Shapes.from_hf(model.hf))
    if not adapter:
        load = find_checkpoint(required(model.load, "model.load"))
        check_base(load)
        if found is not None:
            warn_of_other_base(found.folder, load)
        mcore_to_hf(load, model.hf, out, adapter=found, overwrite=settings.overwrite)
    elif found is None:
        raise UserError(
            "--adapter exports only the adapter, but model.adapter is not set",
            "set model.adapter to the run that trained the adapter",
        )
    else:
        found.write(out, model.hf, overwrite=settings.overwrite)
    print(f"exported · {out}")
    return 0

"""`megavlm export`: a Hugging Face folder out of a checkpoint, adapters merged or apart."""

from pathlib import Path

from megavlm.config.errors import UserError
from megavlm.config.settings import Settings
from megavlm.convert import mcore_to_hf
from megavlm.convert.adapter import Adapter
from megavlm.model.shapes import Shapes
from megavlm.training.checkpoint_folders import find_checkpoint


def main(settings: Settings, out: Path, adapter: bool = False) -> int:
    """Writes ``out`` from ``model.load``; config, tokenizer and processor come from ``model.hf``.

    ``model.adapter`` is merged in; with ``adapter`` it is all that is written, in peft's format.
    """
    model, found = settings.model, None
    if model.adapter is not None:
        found = Adapter(find_checkpoint(model.adapter), Shapes.from_hf(model.hf))
    if not adapter:
        mcore_to_hf(find_checkpoint(model.load), model.hf, out, adapter=found, overwrite=settings.overwrite)
    elif found is None:
        raise UserError("--adapter asks for the adapter alone, but model.adapter is not set", "set it to the run")
    else:
        found.write(out, model.hf, overwrite=settings.overwrite)
    print(f"exported · {out}")
    return 0

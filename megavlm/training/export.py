"""`megavlm export`: a Hugging Face folder out of a checkpoint."""

from pathlib import Path

from megavlm.config.settings import Settings
from megavlm.convert import mcore_to_hf
from megavlm.training.setup import find_checkpoint


def main(settings: Settings, out: Path) -> int:
    """Writes ``out`` from ``model.load``; config, tokenizer and processor come from ``model.hf``."""
    mcore_to_hf(find_checkpoint(settings.model.load), settings.model.hf, out, overwrite=settings.overwrite)
    print(f"exported · {out}")
    return 0

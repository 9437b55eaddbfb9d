"""What a verb needs beyond well-formed settings: keys that must be set, files that must exist."""

from collections.abc import Iterable
from functools import reduce
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.config import describe
from megavlm.config.settings import Settings


def check_required(settings: Settings, keys: Iterable[str], verb: str) -> None:
    """Raises UserError that names the dotted `keys` which `verb` needs and which are null or empty."""
    meanings = {entry.key: entry.meaning for entry in describe.entries()}
    missing = [key for key in keys if reduce(getattr, key.split("."), settings) in (None, [])]
    if missing:
        listed = ", ".join(f"{key} ({meanings[key]})" for key in missing)
        example = f"{missing[0]}=…"
        raise UserError(f"{verb} needs {listed}", f"set it in the file or on the command line: {example}")


def check_files(settings: Settings, keys: Iterable[str]) -> None:
    """Raises UserError that names all files of `keys` (model.hf, model.load, data.train, …) that do not exist.

    data.train stands for the replay source too. URLs are not looked at.
    """
    paths = {}
    for key in keys:
        if key == "data.train":
            paths |= {name: source.path for name, source in settings.data.leaves.items()}
        else:
            paths[key] = reduce(getattr, key.split("."), settings)
    missing = {key: path for key, path in paths.items() if isinstance(path, Path) and not path.exists()}
    remedy = f"relative paths start from {Path.cwd()}"
    if len(missing) == 1:
        key, path = missing.popitem()
        raise UserError(f"{key} is {path}, which does not exist", remedy)
    if missing:
        listed = "\n  ".join(f"{key}: {path}" for key, path in missing.items())
        raise UserError(f"these files do not exist:\n  {listed}", remedy)
    if "model.hf" in paths and not (settings.model.hf / "config.json").is_file():
        raise UserError(
            f"model.hf is {settings.model.hf}, a folder without config.json",
            "name a folder in Hugging Face's model format",
        )


def check_stage(settings: Settings) -> None:
    """Raises UserError where the settings contradict ``stage``.

    Stage 0 trains the projector alone; later stages start from a checkpoint.
    """
    frozen = set(settings.model.freeze)
    if settings.stage == 0 and frozen != {"vision", "language"}:
        raise UserError(
            f"stage is 0, which trains the projector alone, but model.freeze is {sorted(frozen)}",
            "set model.freeze: [vision, language], or choose stage 1",
        )
    if settings.stage == 0 and settings.train.unfreeze_after:
        raise UserError(
            "stage is 0, which trains the projector alone, but train.unfreeze_after is "
            f"{settings.train.unfreeze_after}",
            "remove train.unfreeze_after, or choose stage 1",
        )
    if settings.stage > 0 and settings.model.load is None:
        raise UserError(
            f"stage is {settings.stage}, which continues stage {settings.stage - 1}, but model.load is not set",
            "set model.load to the output folder, or a checkpoint, of the stage before",
        )

"""What a command needs besides its settings: files that must exist, and packages that must be installed."""

import glob
import importlib.util
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings


def check_files(settings: Settings, keys: Iterable[str]) -> None:
    """Raises a UserError that names all files of `keys` (model.hf, model.load, data.train, …) that do not exist.

    data.train includes the replay sources; reward and environment mean models and Python files. URLs are not checked.
    """
    paths: dict[str, Path | str | None] = {}
    for key in keys:
        if key == "data.train":
            leaves = settings.data.leaves
            paths |= {name: source.path for name, source in leaves.items()}
            paths |= {f"{name.removesuffix('path')}media": source.media for name, source in leaves.items()}
        elif key == "data.eval":
            several = len(settings.data.eval) > 1
            paths |= {
                f"{key}[{n}].path" if several else key: source.path for n, source in enumerate(settings.data.eval)
            }
        elif key == "environment":
            paths["the file of environment.python"] = settings.environment.file
        elif key == "reward":
            paths |= {f"the file of the reward {reward.key}": reward.model or reward.file for reward in settings.reward}
        else:
            paths[key] = settings.model.start if key == "model.load" else attrgetter(key)(settings)
    missing = {key: path for key, path in paths.items() if isinstance(path, Path) and not _exists(path, key)}
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
            "give a folder in Hugging Face's model format",
        )


def _exists(path: Path, key: str) -> bool:
    try:
        return path.exists() or (glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True)))
    except OSError as error:  # a folder above it may not be read, or the name is too long
        raise UserError(f"{key} is {path}, which cannot be read: {error.strerror}", "check this path") from None


def check_packages(settings: Settings) -> None:
    """Raises a UserError if a setting needs a package that is not installed."""
    if settings.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "log.tensorboard is true, but the package tensorboard is not installed",
            "pip install tensorboard, or set it to false",
        )

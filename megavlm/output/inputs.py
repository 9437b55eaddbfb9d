"""The data and models of a run are recognised by their content, so that they may be moved while it is interrupted.

``OUTPUT/inputs.json`` has the digest of each (``base.content``) by the path that the settings name.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from megavlm.base.atomic_files import write_text
from megavlm.base.content import content_digest
from megavlm.base.json_files import parse_json
from megavlm.config.data_sections import DataSource
from megavlm.config.settings import Settings

FILE = "inputs.json"  # within the output folder
_STEP = re.compile(r"step_(\d+)")  # the name of a complete checkpoint


def note_inputs(settings: Settings, output: Path) -> list[str]:
    """Notes the inputs in the output folder. Returns one text for each whose content has changed at the same path."""
    noted, texts = _noted(output), []
    added = {}
    for key, path in _inputs(settings).items():
        found = _digest(path)
        if found is None or noted.get(path) == found:
            continue
        if path in noted:
            texts.append(f"{key}: {path} has other content than at the last start of this run, which goes on with it")
        added[path] = found
    if added:
        with suppress(OSError):
            write_text(output / FILE, json.dumps(noted | added, indent=1) + "\n")
    return texts


def at_noted_paths(before: Settings, now: Settings, output: Path) -> Settings:
    """The settings `now`, with the paths of `before` for inputs that have been moved since then.

    Args:
        before: the settings of the run in the output folder.
        now: the settings of this start.
        output: the output folder.
    """

    def choose(old: Any, new: Any) -> Any:
        is_other = old is not None and new is not None and old != new
        return old if is_other and has_moved(old, new, output) else new

    def sources(old: list[DataSource], new: list[DataSource]) -> list[DataSource]:
        chosen = [
            here.model_copy(
                update={"path": choose(there.path, here.path), "sources": sources(there.sources, here.sources)}
            )
            for there, here in zip(old, new, strict=False)
        ]
        return chosen + new[len(chosen) :]

    paths = {name: choose(getattr(before.model, name), getattr(now.model, name)) for name in _MODEL}
    data = now.data.model_copy(update={"train": sources(before.data.train, now.data.train)})
    if before.data.replay is not None and now.data.replay is not None:
        replay = sources(before.data.replay.sources, now.data.replay.sources)
        data = data.model_copy(update={"replay": now.data.replay.model_copy(update={"sources": replay})})
    return now.model_copy(
        update={
            "model": now.model.model_copy(update=paths),
            "align": now.align.model_copy(update={"reference": choose(before.align.reference, now.align.reference)}),
            "data": data,
        }
    )


def has_moved(old: str | Path, new: str | Path, output: Path) -> bool:
    """Whether `new` has the content that the run in `output` has noted for its input `old`."""
    known = _noted(output).get(str(old))
    return known is not None and known == _digest(str(new))


_MODEL = ("hf", "load", "adapter")


def _inputs(settings: Settings) -> dict[str, str]:
    """The paths of data and models by their keys. The evaluation data may change in any case."""
    named = {f"model.{name}": getattr(settings.model, name) for name in _MODEL}
    named |= {key: source.path for key, source in settings.data.leaves.items()}
    named["align.reference"] = settings.align.reference
    named["environment"] = settings.environment.file
    named |= {f"reward[{n}]": reward.file or reward.model for n, reward in enumerate(settings.reward)}
    return {key: str(path) for key, path in named.items() if path is not None}


def _noted(output: Path) -> dict[str, str]:
    try:
        found = parse_json((output / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(path: str) -> str | None:
    """The digest of a local file or folder; of the folder of another run, that of its newest checkpoint."""
    folder = Path(path)
    with suppress(OSError):
        checkpoints = [child for child in (folder / "checkpoints").iterdir() if _STEP.fullmatch(child.name)]
        if checkpoints:
            return content_digest(max(checkpoints, key=lambda child: int(child.name.removeprefix("step_"))))
    return content_digest(folder)

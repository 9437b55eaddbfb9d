"""`megavlm infer`: generates answers to the questions of a data file, or to one prompt on the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.sources import read_samples
from megavlm.media.files import File
from megavlm.runtime.eval_rows import note_settings
from megavlm.runtime.generation import answer_all
from megavlm.runtime.session import start


def main(settings: Settings, prompt: str | None = None, image: Sequence[Path] = (), video: Sequence[Path] = ()) -> int:
    """Writes ``answers.jsonl`` (index, answer) for ``data.eval`` in file order, or prints the answer to ``prompt``."""
    if settings.parallel.context > 1:
        raise UserError(
            f"parallel.context is {settings.parallel.context}, but generation does not support context parallelism",
            "set parallel.context=1 on the command line; checkpoints can be loaded in any layout",
        )
    session = start(settings, training=False)
    renderer = Renderer(settings.model.hf, settings.data)
    samples = None
    if session.groups.is_leader:
        if prompt is None:
            groups = session.groups
            data = settings.data.eval
            assert data is not None, "data.eval must be set"
            samples = read_samples(data, renderer, "prompt", rank=groups.dp_rank, num_ranks=groups.dp_size)
        else:
            samples = iter([renderer.encode(_record(prompt, image, video), File, "--prompt", kind="prompt")])
    answers = answer_all(session, renderer, samples)
    if not session.is_first:
        return 0
    if prompt is not None:
        print(answers[0]["answer"])
        return 0
    note_settings(settings)
    path = required(settings.output, "output") / "answers.jsonl"
    write_text(path, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    print(f"{len(answers)} answers · {path}")
    return 0


def _record(prompt: str, images: Sequence[Path], videos: Sequence[Path]) -> dict:
    """The record of one question; pictures and videos without a mark in the prompt are put before it."""
    marks = "<image>" * (len(images) - prompt.count("<image>")) + "<video>" * (len(videos) - prompt.count("<video>"))
    record: dict[str, list] = {"messages": [{"role": "user", "content": marks + prompt}]}
    if images:
        record["images"] = [str(path) for path in images]
    if videos:
        record["videos"] = [str(path) for path in videos]
    return record

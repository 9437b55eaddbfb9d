"""`megavlm infer`: generates answers to the questions of a data file, or to one prompt on the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.sources import media_access, read_samples
from megavlm.media.files import File
from megavlm.records.marks import escaped, num_marks
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
            access, rank, num_ranks = media_access(settings.data), groups.dp_rank, groups.dp_size
            samples = read_samples(data, renderer, "prompt", access=access, rank=rank, num_ranks=num_ranks)
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


def _record(prompt: str, images: Sequence[Path], videos: Sequence[Path]) -> dict[str, list]:
    """The record of one question; pictures and videos without a mark in the prompt are put before it.

    Without pictures (videos), <image> (<video>) in the prompt is a word.
    """
    marks = ""
    for kind, files in (("image", images), ("video", videos)):
        if files:
            marks += f"<{kind}>" * (len(files) - num_marks(prompt, kind))
        else:
            prompt = escaped(prompt, kind)
    return {
        "messages": [{"role": "user", "content": marks + prompt}],
        "images": [str(path) for path in images],
        "videos": [str(path) for path in videos],
    }

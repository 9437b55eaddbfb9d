"""`megavlm infer`: generates answers to the questions of a data file, or to one prompt on the terminal."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.media.files import File
from megavlm.records.questions import marked
from megavlm.rollout.answerer import Answerer, without_fp8
from megavlm.runtime.evaluation import Evaluation
from megavlm.runtime.session import start
from megavlm.runtime.weights import choose, tell


def main(
    settings: Settings,
    prompt: str | None = None,
    image: Sequence[Path] = (),
    video: Sequence[Path] = (),
    ema: bool = False,
) -> int:
    """Writes ``answers.jsonl`` for ``data.eval`` in file order, or prints the answer to ``prompt``.

    A line has ``index``, ``sample``, ``question``, ``media``, ``reference`` (see ``EvalSamples``) and ``answer``, or
    ``answers`` if ``generate.samples`` asks for several. What was loaded and the settings of sampling are in
    ``answers.json``. With ``ema``, the moving average of the weights answers (``train.ema``).
    """
    settings, weights = choose(settings, ema=ema)
    session = start(without_fp8(settings), training=False, ema=ema)
    renderer = Renderer(settings.model.hf, settings.data)
    if prompt is not None:
        tell(weights, session, sys.stderr)
        record = _record(prompt, image, video)
        answers = Answerer(session, renderer).answer(lambda: renderer.encode(record, File, "--prompt", kind="prompt"))
        for number, answer in enumerate(answers or (), start=1):  # on rank 0
            if settings.generate.samples > 1:  # an answer may have several lines
                print(f"--- answer {number} of {settings.generate.samples}")
            print(answer)
        return 0
    tell(weights, session)
    sampling = settings.generate.model_dump(mode="json", exclude={"batch_size", "cache_gib"}) | {
        "seed": settings.train.seed
    }
    evaluation = Evaluation(session, weights, renderer, "answers.jsonl", "prompt", {"sampling": sampling})
    lines, skipped = evaluation.stream("answering", Answerer(session, renderer).answers)
    if session.is_first:
        count = len(lines) * settings.generate.samples
        print(" · ".join(filter(None, (f"{count} answers", skipped, str(evaluation.path)))))
    return 0


def _record(prompt: str, images: Sequence[Path], videos: Sequence[Path]) -> dict[str, list]:
    """The record of one question."""
    return {
        "messages": [{"role": "user", "content": marked(prompt, len(images), len(videos))}],
        "images": list(map(str, images)),
        "videos": list(map(str, videos)),
    }

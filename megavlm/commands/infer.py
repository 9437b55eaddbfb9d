"""`megavlm infer`: generates answers to the questions of a data file, or to one prompt on the terminal."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.media.files import File
from megavlm.records.questions import marked
from megavlm.rollout.answerer import Answerer, without_fp8
from megavlm.rollout.engine import Engine
from megavlm.runtime.evaluation import Evaluation
from megavlm.runtime.session import Session, start
from megavlm.runtime.weights import choose, tell
from megavlm.vllm.of_session import vllm_engine

_FOLDER = "vllm_infer"  # in the output folder: what is in `vllm` belongs to a run that may be going on
_LEAST_OF_VLLM = 0.01  # vLLM raises lower temperatures to this; 0 is greedy


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

    With ``rollout.engine`` vllm, servers of vLLM answer, which get the weights once.

    Raises:
        UserError: nothing can be answered; servers do not start or do not fit; settings that would be ignored.
    """
    settings, weights = choose(settings, ema=ema)
    _check_vllm(settings)
    session = start(without_fp8(settings), training=False, ema=ema)
    renderer = Renderer(settings.model.hf, settings.data)
    tell(weights, session, None if prompt is None else sys.stderr)
    if prompt is not None:
        record = _record(prompt, image, video)
        with _engine(session) as engine:
            answers = Answerer(session, renderer, engine).answer(
                lambda: renderer.encode(record, File, "--prompt", kind="prompt")
            )
        for number, answer in enumerate(answers or (), start=1):  # on rank 0
            if settings.generate.samples > 1:  # an answer may have several lines
                print(f"--- answer {number} of {settings.generate.samples}")
            print(answer)
        return 0
    sampling = settings.generate.model_dump(mode="json", exclude={"batch_size", "cache_gib"}) | {
        "seed": settings.train.seed
    }
    if settings.rollout.engine == "vllm":
        sampling["engine"] = "vllm"
    evaluation = Evaluation(session, weights, renderer, "answers.jsonl", "prompt", {"sampling": sampling})
    with _engine(session) as engine:
        lines, skipped = evaluation.stream("answering", Answerer(session, renderer, engine).answers)
    if session.is_first:
        count = len(lines) * settings.generate.samples
        print(" · ".join(filter(None, (f"{count} answers", skipped, str(evaluation.path)))))
    return 0


@contextmanager
def _engine(session: Session) -> Iterator[Engine | None]:
    """Servers of vLLM with the weights of the session, if the settings name them; else None."""
    settings = session.settings
    if settings.rollout.engine != "vllm":
        yield None
        return
    assert settings.output is not None, "_check_vllm refuses it"
    engine = vllm_engine(session, settings.output / _FOLDER)
    try:
        engine.sync()
        yield engine
    finally:
        engine.close()


def _check_vllm(settings: Settings) -> None:
    """Raises UserError for settings that servers of vLLM would ignore, or need."""
    generate = settings.generate
    if settings.rollout.engine != "vllm":
        return
    for name, instead in (
        ("batch_size", "set rollout.max_sequences instead"),
        ("cache_gib", "set rollout.cache_gib instead"),
        ("batch_invariant", "remove it, or set rollout.engine to megatron"),
    ):
        if generate.is_changed(name):
            value = getattr(generate, name)
            raise UserError(f"generate.{name} is {value}, but rollout.engine is vllm: it would be ignored", instead)
    if 0 < generate.temperature < _LEAST_OF_VLLM:
        raise UserError(
            f"generate.temperature is {generate.temperature:g}, but vLLM would sample at {_LEAST_OF_VLLM:g}",
            f"set 0 (greedy), a temperature of at least {_LEAST_OF_VLLM:g}, or rollout.engine to megatron",
        )
    if settings.output is None:
        raise UserError("rollout.engine is vllm, whose servers need a folder for their logs", "set output")


def _record(prompt: str, images: Sequence[Path], videos: Sequence[Path]) -> dict[str, list]:
    """The record of one question."""
    return {
        "messages": [{"role": "user", "content": marked(prompt, len(images), len(videos))}],
        "images": list(map(str, images)),
        "videos": list(map(str, videos)),
    }

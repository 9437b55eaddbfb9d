"""Answers the prompts of a command with the settings of the section ``generate``."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.row import Sample
from megavlm.model.shapes import Shapes
from megavlm.platform.collectives import while_others_wait
from megavlm.rollout.builtin import BuiltinEngine
from megavlm.rollout.engine import Engine, Prompt, Sampling
from megavlm.rollout.sampling import mixed_seed
from megavlm.runtime.session import Session


class Answerer:
    """Answers prompts. Create it on all ranks.

    Args:
        session: the session of the command.
        renderer: renders the prompts and decodes the answers.
        engine: has the weights of the session already; None: the built-in one, which uses those of the session.
    """

    def __init__(self, session: Session, renderer: Renderer, engine: Engine | None = None):
        self._session, self._renderer = session, renderer
        settings, tokenizer = session.settings.generate, renderer.processor.tokenizer
        self._sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k,
            stop=stop_tokens(session.settings.model.hf, tokenizer),
            stop_strings=tuple(settings.stop),
            banned=vision_tokens(session.shapes),
        )  # fmt: skip
        self._engine = engine or BuiltinEngine(
            session.vlm,
            places=settings.batch_size,
            cache_gib=settings.cache_gib,
            cache_setting="generate.cache_gib",
            prompt_tokens=session.settings.data.seq_length,
            chunk_tokens=session.settings.train.logprob_chunk_tokens,
            batch_invariant=settings.batch_invariant,
            decode=tokenizer.decode,
            special=tokenizer.all_special_ids,
        )

    def answers(self, samples: Iterator[Sample] | None) -> Iterator[dict]:
        """Yields ``{"index", "answer"}`` of each prompt; with several ``generate.samples`` ``{"index", "answers"}``.

        Call it on all ranks, and iterate to the end.

        Args:
            samples: the prompts on the leader of each model-parallel group; None elsewhere.
        """
        settings, tokenizer = self._session.settings, self._renderer.processor.tokenizer
        prompts = None
        if samples is not None:
            prompts = (
                Prompt(s, tuple(mixed_seed(settings.train.seed, s.index, n) for n in range(settings.generate.samples)))
                for s in samples
            )
        for answered in self._engine.generate(prompts, self._sampling):
            texts = [text_of(tokenizer, answer.tokens, self._sampling.stop_strings) for answer in answered.answers]
            found = {"answer": texts[0]} if settings.generate.samples == 1 else {"answers": texts}
            yield {"index": answered.prompt.sample.index, **found}

    def answer(self, ask: Callable[[], Sample | None]) -> list[str] | None:
        """Answers one prompt. Call it on all ranks.

        Args:
            ask: returns the prompt, or None. It is called on rank 0 and may take as long as it likes.

        Returns:
            ``generate.samples`` answers on rank 0, [] elsewhere; None on all ranks without a prompt.

        Raises:
            Exception: what ``ask`` raises, on all ranks.
        """
        groups = self._session.groups
        prompt = while_others_wait(ask, groups.world_host)
        if prompt is None:
            return None
        samples = iter([prompt] if self._session.is_first else []) if groups.is_leader else None
        found = list(self.answers(samples))
        return [text for line in found for text in line.get("answers", [line.get("answer")])]


def text_of(tokenizer: Any, tokens: list[int], stop_strings: Sequence[str]) -> str:
    """The text of an answer up to the first stop string in it."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(ends, default=len(text))]


def stop_tokens(hf: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end an answer: those of generation_config.json, or the tokenizer's end token."""
    if (hf / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(hf).eos_token_id
        if ends is not None:
            return (ends,) if isinstance(ends, int) else tuple(ends)
    return (tokenizer.eos_token_id,)


def vision_tokens(shapes: Shapes) -> tuple[int, ...]:
    """Returns the tokens that must not be sampled: in an answer there is no picture that they could stand for."""
    return (shapes.image_token_id, shapes.video_token_id, shapes.vision_start_token_id, shapes.vision_end_token_id)


def without_fp8(settings: Settings) -> Settings:
    """The settings with bf16 instead of fp8, whose kernels do not accept the few tokens of a step of sampling."""
    if settings.train.precision != "fp8":
        return settings
    return settings.model_copy(update={"train": settings.train.model_copy(update={"precision": "bf16"})})

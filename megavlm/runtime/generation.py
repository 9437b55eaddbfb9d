"""Generates answers to prompts on all data-parallel ranks: packs the prompts, encodes the frames, runs the decoder."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row, Sample
from megavlm.model.generate import Sampling, generate
from megavlm.platform import device
from megavlm.platform.collectives import while_others_wait
from megavlm.runtime.feed import Feed, Window
from megavlm.runtime.forward import encode_window, feature_planes
from megavlm.runtime.session import Session


def check_context(settings: Settings) -> None:
    """Raises UserError for a layout with a pipeline or context parallelism, in which answers cannot be generated."""
    for name, size in (("context", settings.parallel.context), ("pipeline", settings.parallel.pipeline)):
        if size > 1:
            raise UserError(
                f"parallel.{name} is {size}, but generation does not support it",
                f"set parallel.{name}=1 on the command line; checkpoints can be loaded in any layout",
            )


class Answerer:
    """Answers prompts with the settings of the section ``generate``.

    Args:
        session: the session of the command.
        renderer: renders the prompts and decodes the answers.
        done: the number of prompts that an interrupted start has answered; sampling goes on with other random numbers.
    """

    def __init__(self, session: Session, renderer: Renderer, done: int = 0):
        self._session, self._renderer = session, renderer
        settings, shapes = session.settings.generate, session.shapes
        self._sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k,
            stop=stop_tokens(session.settings.model.hf, renderer),
            banned=(
                shapes.image_token_id, shapes.video_token_id,
                shapes.vision_start_token_id, shapes.vision_end_token_id,
            ),
        )  # fmt: skip
        seed = session.settings.train.seed + session.groups.dp_rank + (done << 32)
        self._source = torch.Generator(device()).manual_seed(seed)

    def rows(self, samples: Iterator[Sample]) -> Iterator[Row]:
        """Packs ``generate.batch_size`` prompts into each row; the row is as long as its prompts."""
        settings = self._session.settings
        slices = settings.parallel.tensor
        while waiting := list(itertools.islice(samples, settings.generate.batch_size)):
            tokens = sum(len(sample.input_ids) for sample in waiting)
            yield self._renderer.pack(waiting, -(-tokens // slices) * slices)

    def answers(self, window: Window) -> list[dict]:
        """Returns ``{"index", "answer"}`` of each prompt in a window of one row. Call it on all ranks."""
        tokens = _generate(self._session, window, self._sampling, self._source)
        texts = self._renderer.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        indices = window.micro_batches[0].host.indices
        return [{"index": i, "answer": text} for i, text in zip(indices, texts, strict=True)]

    def answer(self, ask: Callable[[], Sample | None]) -> str | None:
        """Returns the answer to one prompt; None without a prompt. Call it on all ranks.

        Args:
            ask: returns the prompt, or None. It is called on rank 0 and may take as long as it likes.

        Raises:
            Exception: what ``ask`` raises, on all ranks.
        """
        prompt = while_others_wait(ask, self._session.groups.world_host)
        if prompt is None:
            return None
        row = self.rows(iter([prompt])) if self._session.groups.is_leader else None
        feed = Feed(self._session.vlm, row)
        rows = feed.rows(1)
        assert rows is not None, "there is one row"
        return self.answers(next(feed.windows(rows, 1)))[0]["answer"]


def stop_tokens(hf: Path, renderer: Renderer) -> list[int]:
    """Returns the tokens that end an answer: those of generation_config.json, or the tokenizer's end token."""
    if (hf / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(hf).eos_token_id
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return [renderer.processor.tokenizer.eos_token_id]


def _generate(session: Session, window: Window, sampling: Sampling, source: torch.Generator) -> list[list[int]]:
    vlm, micro_batch = session.vlm, window.micro_batches[0]
    with torch.no_grad():
        encode_window(vlm, window)
    host, parallel = micro_batch.host, session.settings.parallel
    visual, deepstack = feature_planes(vlm, vlm.language[0], micro_batch)
    positions = micro_batch.row.visual_positions
    assert visual is not None, "the first pipeline stage has the embeddings"
    assert positions is not None, "the window is encoded"
    return generate(
        vlm.language[0],
        micro_batch.input_ids,
        micro_batch.position_ids,
        host.segment_lengths[: host.num_samples],
        (positions, visual, deepstack),
        sampling,
        tensor_slices=parallel.tensor if parallel.sequence_parallel else 1,
        generator=source,
        all_finished=_everywhere if parallel.expert > 1 else lambda finished: bool(finished.all()),
    )


def _everywhere(finished: torch.Tensor) -> bool:
    """Whether every sequence of every rank is finished; the experts of one rank process the tokens of other ranks."""
    open_ones = (~finished).any().int()
    dist.all_reduce(open_ones, op=dist.ReduceOp.MAX)
    return not open_ones.item()

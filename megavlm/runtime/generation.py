"""Generates answers to prompts on all data-parallel ranks: packs the prompts, encodes the frames, runs the decoder."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from megavlm.data.renderer import Renderer
from megavlm.data.row import Row, Sample
from megavlm.model.generate import Sampling, generate
from megavlm.platform import device
from megavlm.runtime.eval_rows import EvalRows
from megavlm.runtime.feed import Window
from megavlm.runtime.forward import encode_window, feature_planes
from megavlm.runtime.session import Session


def answer_all(session: Session, renderer: Renderer, samples: Iterator[Sample] | None) -> list[dict]:
    """Answers all prompts. Returns ``{"index", "answer"}`` of every prompt in order on rank 0, [] on the other ranks.

    Args:
        session: the session of the command.
        renderer: renders the prompts and decodes the answers.
        samples: the prompts of this data-parallel rank, on the leader of each model-parallel group; None elsewhere.
    """
    settings, groups = session.settings.generate, session.groups
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k,
        stop=stop_tokens(session.settings.model.hf, renderer),
        banned=(
            session.shapes.image_token_id, session.shapes.video_token_id,
            session.shapes.vision_start_token_id, session.shapes.vision_end_token_id,
        ),
    )  # fmt: skip
    source = torch.Generator(device()).manual_seed(session.settings.train.seed + groups.dp_rank)
    rows = EvalRows(session, _rows(samples, renderer, session) if samples is not None else None, "answering")
    answers = []
    for window, real in rows:
        tokens = _generate(session, window, sampling, source)
        if real and groups.is_leader:
            texts = renderer.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            indices = window.micro_batches[0].host.indices
            answers += [{"index": i, "answer": text} for i, text in zip(indices, texts, strict=True)]
    return sorted(rows.gather(answers), key=lambda answer: answer["index"])


def stop_tokens(hf: Path, renderer: Renderer) -> list[int]:
    """Returns the tokens that end an answer: those of generation_config.json, or the tokenizer's end token."""
    if (hf / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(hf).eos_token_id
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return [renderer.processor.tokenizer.eos_token_id]


def _rows(samples: Iterator[Sample], renderer: Renderer, session: Session) -> Iterator[Row]:
    """Packs ``generate.batch_size`` prompts into each row; the row is as long as its prompts."""
    slices = session.settings.parallel.tensor
    waiting: list[Sample] = []

    def row() -> Row:
        tokens = sum(len(sample.input_ids) for sample in waiting)
        return renderer.pack(waiting, -(-tokens // slices) * slices)

    for sample in samples:
        waiting.append(sample)
        if len(waiting) == session.settings.generate.batch_size:
            yield row()
            waiting.clear()
    if waiting:
        yield row()


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

"""`megavlm infer`: answers to the questions of a data file, or to one prompt on the terminal."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GenerationConfig

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.files import File
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row, Sample
from megavlm.data.sources import read_samples
from megavlm.model.generate import Sampling, generate
from megavlm.platform import device
from megavlm.training.eval_rows import EvalRows, note_settings
from megavlm.training.feed import Window
from megavlm.training.forward import encode_window, feature_planes
from megavlm.training.setup import Session, start


def main(settings: Settings, prompt: str | None = None, image: Sequence[Path] = (), video: Sequence[Path] = ()) -> int:
    """Writes ``answers.jsonl`` (index, answer) for ``data.eval`` in its order, or prints the answer to ``prompt``."""
    if settings.parallel.context > 1:
        raise UserError(
            f"parallel.context is {settings.parallel.context}, but answers are made without context parallelism",
            "set parallel.context=1 on the command line; any checkpoint loads in any layout",
        )
    session = start(settings, training=False)
    renderer = Renderer(settings.model.hf, settings.data)
    samples = None
    if session.groups.is_leader:
        if prompt is None:
            groups = session.groups
            samples = read_samples(
                settings.data.eval, renderer, "prompt", rank=groups.data_rank, num_ranks=groups.data_size
            )
        else:
            samples = iter([renderer.encode(_record(prompt, image, video), File, "--prompt", kind="prompt")])
    answers = answer_all(session, renderer, samples)
    if not session.is_first:
        return 0
    if prompt is not None:
        print(answers[0]["answer"])
        return 0
    note_settings(settings)
    path = settings.output / "answers.jsonl"
    write_text(path, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    print(f"{len(answers)} answers · {path}")
    return 0


def answer_all(session: Session, renderer: Renderer, samples: Iterator[Sample] | None) -> list[dict]:
    """``{"index", "answer"}`` of every prompt in order, on rank 0 (elsewhere empty).

    Args:
        samples: this data rank's prompts, on the leader of each model-parallel group.
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
    source = torch.Generator(device()).manual_seed(session.settings.train.seed + groups.data_rank)
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
    """Tokens that end an answer: generation_config.json's, else the tokenizer's end token."""
    if (hf / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(hf).eos_token_id
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return [renderer.processor.tokenizer.eos_token_id]


def _record(prompt: str, images: Sequence[Path], videos: Sequence[Path]) -> dict:
    """A record of one question; pictures whose place the prompt does not mark come first."""
    marks = "<image>" * (len(images) - prompt.count("<image>")) + "<video>" * (len(videos) - prompt.count("<video>"))
    record = {"messages": [{"role": "user", "content": marks + prompt}]}
    if images:
        record["images"] = [str(path) for path in images]
    if videos:
        record["videos"] = [str(path) for path in videos]
    return record


def _rows(samples: Iterator[Sample], renderer: Renderer, session: Session) -> Iterator[Row]:
    """``generate.batch_size`` prompts make a row of their own length."""
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
    return generate(
        vlm.language[0],
        micro_batch.input_ids,
        micro_batch.position_ids,
        host.segment_lengths[: host.num_samples],
        (micro_batch.row.visual_positions, visual, deepstack),
        sampling,
        tensor_slices=parallel.tensor if parallel.sequence_parallel else 1,
        generator=source,
        all_finished=_everywhere if parallel.expert > 1 else lambda finished: bool(finished.all()),
    )


def _everywhere(finished: torch.Tensor) -> bool:
    """Whether every sequence of every rank is finished: experts of one rank serve the tokens of others."""
    open_ones = (~finished).any().int()
    dist.all_reduce(open_ones, op=dist.ReduceOp.MAX)
    return not open_ones.item()

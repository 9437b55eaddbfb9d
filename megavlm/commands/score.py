"""`megavlm score`: log-probabilities of every target token of a data file, or a reward model's scores."""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import has_score_head
from megavlm.config.data_sections import DataSettings
from megavlm.config.settings import Settings
from megavlm.convert.adapter import Adapter
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE, Row, Sample, padded_length
from megavlm.data.sources import read_samples
from megavlm.model.shapes import Shapes
from megavlm.runtime.eval_rows import EvalRows, note_settings
from megavlm.runtime.forward import encode_window, logprobs_of, scores_of
from megavlm.runtime.session import start


def main(settings: Settings, reward: bool = False) -> int:
    """Reads ``data.eval``, writes ``scores.jsonl`` in its order: index, logprobs, sum, tokens; or index, score.

    Args:
        reward: the score that a reward model gives to the last target token of each sample.
    """
    model = settings.model
    if reward and model.adapter is not None:
        scored = Adapter(find_checkpoint(model.adapter), Shapes.from_hf(model.hf)).reward_head is not None
    else:
        scored = not reward or has_score_head(find_checkpoint(model.load))
    if not scored:
        raise UserError(
            f"{model.adapter or model.load} has no reward head",
            "name a checkpoint of megavlm rm, or leave --reward out",
        )
    session = start(settings, training=False, score_head=reward)
    samples = None
    if session.groups.is_leader:
        renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
        samples = read_samples(
            settings.data.eval, renderer, "tune", rank=session.groups.dp_rank, num_ranks=session.groups.dp_size
        )
    rows = EvalRows(session, fill_rows(samples, renderer, settings.data) if samples is not None else None, "scoring")
    scores: list[dict] = []
    for window, real in rows:
        with torch.no_grad():
            encode_window(session.vlm, window)
        micro_batch = window.micro_batches[0]
        if reward:
            values = scores_of(session.vlm, micro_batch).tolist()
            found = [{"index": i, "score": v} for i, v in zip(micro_batch.host.indices, values, strict=True)]
        else:
            logprobs = logprobs_of(session.vlm, micro_batch, settings.train.logprob_chunk_tokens)
            found = sample_scores(micro_batch.host, logprobs)
        if real and session.groups.is_leader:
            scores += found
    scores = rows.gather(scores)
    if session.is_first:
        note_settings(settings)
        path = settings.output / "scores.jsonl"
        write_text(path, "".join(json.dumps(score) + "\n" for score in sorted(scores, key=lambda s: s["index"])))
        if reward:
            summary = f"mean score {sum(score['score'] for score in scores) / max(1, len(scores)):.4f}"
        else:
            mean = sum(score["sum"] for score in scores) / max(1, sum(score["tokens"] for score in scores))
            summary = f"mean log-probability {mean:.4f}"
        print(f"{len(scores)} samples · {summary} · {path}")
    return 0


def fill_rows(samples: Iterator[Sample], renderer: Renderer, data: DataSettings) -> Iterator[Row]:
    """Fills rows in the order of the samples; one sample a row with ``data.packing`` none."""
    waiting: list[Sample] = []
    for sample in samples:
        full = sum(padded_length(len(s.input_ids), renderer.pad_multiple) for s in [*waiting, sample]) > data.seq_length
        if waiting and (full or data.packing == "none"):
            yield renderer.pack(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield renderer.pack(waiting)


def sample_scores(row: Row, logprobs: Tensor) -> list[dict]:
    """One result per sample of a row. ``logprobs``: [T], as of ``logprobs_of``."""
    lengths = row.segment_lengths
    results = []
    for values, labels, index in zip(logprobs.split(lengths), row.labels.split(lengths), row.indices, strict=False):
        values = values[labels != IGNORE].tolist()
        results.append({"index": index, "logprobs": values, "sum": sum(values), "tokens": len(values)})
    return results

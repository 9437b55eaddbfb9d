"""Rows and results of `megavlm score`: packs the samples of a data file in order, and what is read of each row."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from megavlm.config.data_sections import DataSettings
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE, Row, Sample, padded_length
from megavlm.model.language import LanguageModel
from megavlm.platform import Groups, device, to_device
from megavlm.runtime.feed import MicroBatch


def fill_rows(samples: Iterator[Sample], renderer: Renderer, data: DataSettings) -> Iterator[Row]:
    """Packs samples into rows in their order; with ``data.packing`` none, each row has one sample."""
    waiting: list[Sample] = []
    for sample in samples:
        full = sum(padded_length(len(s.input_ids), renderer.pad_multiple) for s in [*waiting, sample]) > data.seq_length
        if waiting and (full or data.packing == "none"):
            yield renderer.pack(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield renderer.pack(waiting)


def row_logprobs(
    chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch, groups: Groups, chunk_tokens: int
) -> Tensor:
    """The log-probability of each target of a row, and 0 at other positions: float32 [T], the same on all ranks.

    Args:
        chunk: the last chunk of the decoder.
        hidden: [t, 1, hidden], its hidden states; each context-parallel rank has those of its part of the row.
        micro_batch: the micro-batch of the row.
        groups: the process groups of the decoder.
        chunk_tokens: number of targets whose logits exist at a time.
    """
    logprobs, _ = chunk.token_logprobs(hidden, micro_batch.targets, chunk_tokens)
    at = micro_batch.targets.row_index.flatten()  # on the host, so that nothing here waits for the device
    there = (at >= 0).nonzero().flatten()
    row = logprobs.new_zeros(len(micro_batch.host.labels))
    row[to_device(at[there], device())] = logprobs.flatten()[to_device(there, device())]
    if groups.language.cp.size() > 1:
        dist.all_reduce(row, group=groups.language.cp)
    return row


def row_rewards(
    chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch, groups: Groups, sequence_parallel: bool
) -> Tensor:
    """The reward head's score at the last target of each sample: float32 [samples], the same on all ranks.

    Args:
        chunk, hidden, micro_batch, groups: see ``row_logprobs``.
        sequence_parallel: whether each tensor-parallel rank has a slice of the hidden states.
    """
    scores = chunk.scores(hidden, micro_batch.last_targets)
    for group in (groups.language.cp, *([groups.language.tp] if sequence_parallel else [])):
        if group.size() > 1:
            dist.all_reduce(scores, group=group)
    return scores


def sample_scores(row: Row, logprobs: Tensor) -> list[dict]:
    """The results of the samples of a row: index, logprobs, sum, tokens, and loss, the mean over the targets or None.

    Args:
        row: the row.
        logprobs: [T], from ``row_logprobs``.
    """
    lengths = row.segment_lengths
    results = []
    for values, labels, index in zip(logprobs.split(lengths), row.labels.split(lengths), row.indices, strict=False):
        of_targets = values[labels != IGNORE].tolist()
        total, count = sum(of_targets), len(of_targets)
        loss = -total / count if count else None
        results.append({"index": index, "logprobs": of_targets, "sum": total, "tokens": count, "loss": loss})
    return results

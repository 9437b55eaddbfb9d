"""Rows and results of `megavlm score`: packs the samples of a data file in order and splits log-probabilities."""

from collections.abc import Iterator

from torch import Tensor

from megavlm.config.data_sections import DataSettings
from megavlm.data.renderer import Renderer
from megavlm.data.row import IGNORE, Row, Sample, padded_length


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


def sample_scores(row: Row, logprobs: Tensor) -> list[dict]:
    """The results of the samples of a row: index, logprobs, sum, tokens.

    Args:
        row: the row.
        logprobs: [T], from ``logprobs_of``.
    """
    lengths = row.segment_lengths
    results = []
    for values, labels, index in zip(logprobs.split(lengths), row.labels.split(lengths), row.indices, strict=False):
        of_targets = values[labels != IGNORE].tolist()
        results.append({"index": index, "logprobs": of_targets, "sum": sum(of_targets), "tokens": len(of_targets)})
    return results

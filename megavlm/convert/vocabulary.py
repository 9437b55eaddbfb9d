"""The number of rows of word embedding and output layer: whether the tokenizer's ids fit, and how rows are added."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened
from megavlm.convert.weight_source import WeightSource
from megavlm.model.shapes import Shapes

TABLES = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")
"""The keys of the tensors that have a row for each token. A tied model has only the first."""
MULTIPLE = 128  # of rows in a resized model, as in the released ones: the same in every layout up to tensor = 128
_ROWS = 8192  # number of rows that are summed at a time


def check_tokenizer(shapes: Shapes, hf: Path) -> None:
    """Raises a UserError if the tokenizer of ``hf`` has ids for which the model has no row."""
    largest, rows = largest_id(hf), shapes.text.vocab
    if largest is not None and largest >= rows:
        raise UserError(
            f"the tokenizer of {hf} has ids up to {largest}, but the vocabulary of the model has only {rows} rows "
            f"(text_config.vocab_size in config.json): ids from {rows} on have no embedding",
            "set model.resize_vocabulary to true, which adds rows, or use the tokenizer that belongs to the model",
        )


def resized(shapes: Shapes, hf: Path) -> Shapes:
    """The shapes with rows for all ids of the tokenizer of ``hf``: at least as many as before, a multiple of 128.

    Raises:
        UserError: there is no tokenizer.
    """
    largest = largest_id(hf)
    if largest is None:
        raise UserError(
            f"model.resize_vocabulary is true, but {hf} has no tokenizer", "add its files, or set this to false"
        )
    rows = max(shapes.text.vocab, largest + 1)
    return shapes.with_vocabulary(-(-rows // MULTIPLE) * MULTIPLE)


def stored_shapes(shapes: Shapes, hf: Path, checkpoint: WeightSource) -> Shapes:
    """The shapes, or the resized ones if the checkpoint is of a run with ``model.resize_vocabulary``."""
    largest = largest_id(hf)
    if largest is None or largest < shapes.text.vocab:
        return shapes
    grown = resized(shapes, hf)
    stored = {checkpoint.tensors[key][0][0] for key in TABLES if key in checkpoint.tensors}
    return grown if stored == {grown.text.vocab} else shapes


def largest_id(folder: str | Path) -> int | None:
    """The largest id that the tokenizer of a Hugging Face folder has for a token; None if there is no tokenizer.

    Raises:
        UserError: a file of the tokenizer is damaged.
    """
    ids = [token for name, find in _FILES.items() for token in _read(Path(folder) / name, find)]
    return max(ids, default=None)


def _of_tokenizer(content: Any) -> Iterator[int]:
    yield from (token["id"] for token in content.get("added_tokens") or [])
    tokens = content["model"]["vocab"]
    yield from tokens.values() if isinstance(tokens, dict) else range(len(tokens))


# What transformers reads: the tokenizer in one file or in the older form, and tokens that were added to it.
_FILES: dict[str, Callable[[Any], Any]] = {
    "tokenizer.json": _of_tokenizer,
    "vocab.json": lambda content: content.values(),
    "added_tokens.json": lambda content: content.values(),
    "tokenizer_config.json": lambda content: map(int, content.get("added_tokens_decoder") or {}),
}


def _read(file: Path, find: Callable[[Any], Any]) -> list[int]:
    if not file.exists():
        return []
    try:
        return [int(token) for token in find(parse_json(file.read_text(encoding="utf-8")))]
    except Exception as error:  # it may be any JSON, or none
        raise UserError(
            f"{file} cannot be read as a file of a tokenizer: {shortened(repr(error))}", "fetch the file again"
        ) from None


def mean_row(checkpoint: WeightSource, key: str) -> Tensor:
    """float32 [hidden]: the mean of all rows of a table."""
    count, hidden = checkpoint.tensors[key][0]
    total = torch.zeros(hidden, dtype=torch.float64)
    for first in range(0, count, _ROWS):
        total += checkpoint.read(key, first, min(first + _ROWS, count)).double().sum(0)
    return (total / count).float()


def read_rows(checkpoint: WeightSource, key: str, first: int, last: int, mean: Tensor | None = None) -> Tensor:
    """Rows [first, last) of a table; rows that the checkpoint lacks are ``mean``, by default that of all others."""
    count = checkpoint.tensors[key][0][0]
    if last <= count:
        return checkpoint.read(key, first, last)
    mean = mean_row(checkpoint, key) if mean is None else mean
    added = mean.to(checkpoint.tensors[key][1]).expand(last - max(first, count), -1)
    return torch.cat([checkpoint.read(key, first, count), added]) if first < count else added.clone()


def fewer_rows(checkpoint: WeightSource, shapes: Shapes) -> list[str]:
    """The keys of those tables for which a checkpoint has fewer rows than the model."""
    return [key for key in TABLES if key in checkpoint.tensors and checkpoint.tensors[key][0][0] < shapes.text.vocab]

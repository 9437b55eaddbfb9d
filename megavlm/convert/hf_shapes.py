"""The shapes of the model that a Hugging Face folder contains: those of config.json, corrected as transformers does."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from megavlm.config.sections import ModelSettings
from megavlm.convert.hf_folder import INDEX, SINGLE_FILE, HfLayout, HfWeights
from megavlm.convert.names import HF_EMBEDDING, HF_OUTPUT
from megavlm.convert.vocabulary import check_tokenizer, resized
from megavlm.model.shapes import Shapes

CONFIG = "config.json"
_log = logging.getLogger(__name__)


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is one of Hugging Face's with a model, and no Megatron checkpoint, run or adapter of peft's."""
    return any(os.path.lexists(path / name) for name in (CONFIG, SINGLE_FILE, INDEX))


def layout_of(start: Path) -> HfLayout | None:
    """The files of a Hugging Face folder, or those that a checkpoint records; None if it records none.

    Raises:
        UserError: all errors of ``open_weights`` and ``HfLayout.of_checkpoint``.
    """
    return open_weights(start)[1].layout if is_hf_folder(start) else HfLayout.of_checkpoint(start)


def shapes_of(hf: Path, start: Path | None = None) -> Shapes:
    """The shapes in a folder's config.json, for a model whose weights are in ``start``.

    If ``start`` is, or was converted from, a folder with an output layer of its own, the model is untied whatever
    config.json says, as transformers loads it (``open_weights``).

    Raises:
        UserError: all errors of ``Shapes.from_hf`` and ``layout_of``.
    """
    shapes = Shapes.from_hf(hf)
    layout = layout_of(start) if start is not None else None
    return replace(shapes, tied=False) if layout is not None and layout.untied else shapes


def model_shapes(model: ModelSettings, start: Path | None = None) -> Shapes:
    """``shapes_of`` the folder in ``model.hf``; with ``model.resize_vocabulary`` with rows for all tokens.

    Raises:
        UserError: all errors of ``shapes_of``, and those of ``vocabulary.resized`` or ``vocabulary.check_tokenizer``.
    """
    shapes = shapes_of(model.hf, start)
    if model.resize_vocabulary:
        return resized(shapes, model.hf)
    check_tokenizer(shapes, model.hf)
    return shapes


def open_weights(hf: Path) -> tuple[Shapes, HfWeights]:
    """The weights of a folder, and the shapes of their model.

    If config.json has ``tie_word_embeddings: true`` and the folder has an ``lm_head.weight`` with other values than the
    word embedding, the model is untied, and ``layout.untied`` of the weights says so. transformers 5 does the same.

    Raises:
        UserError: all errors of ``shapes_of`` and ``HfWeights``.
    """
    shapes, weights = shapes_of(hf), HfWeights(hf)
    if not shapes.tied or not has_own_output(weights):
        return shapes, weights
    weights.layout = replace(weights.layout, untied=True)
    return replace(shapes, tied=False), weights


def warn_of_own_output(hf: Path, layout: HfLayout) -> None:
    """Logs a warning if the folder's model is untied although its config.json says otherwise (``open_weights``)."""
    if layout.untied:
        _log.warning(
            "%s: config.json has tie_word_embeddings: true, but %s differs from %s. The model is taken as untied, as "
            "transformers does; both weights are kept. Set tie_word_embeddings to false to silence this warning.",
            hf, HF_OUTPUT, HF_EMBEDDING,
        )  # fmt: skip


def has_own_output(weights: HfWeights) -> bool:
    """Whether a folder has an output layer whose values differ from those of the word embedding."""
    tensors = weights.layout.tensors
    if not {HF_EMBEDDING, HF_OUTPUT} <= tensors.keys() or tensors[HF_EMBEDDING].shape != tensors[HF_OUTPUT].shape:
        return False
    embedding, output = weights.read(HF_EMBEDDING), weights.read(HF_OUTPUT)
    return not torch.equal(embedding.to(output.dtype), output)

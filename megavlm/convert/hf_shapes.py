"""The shapes of the model that a Hugging Face folder contains: those of config.json, corrected as transformers does."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from megavlm.config.sections import ModelSettings
from megavlm.convert.hf_folder import HfLayout, HfWeights
from megavlm.convert.names import HF_EMBEDDING, HF_OUTPUT
from megavlm.convert.vocabulary import check_tokenizer, resized
from megavlm.model.shapes import Shapes

_log = logging.getLogger(__name__)


def shapes_of(hf: Path, checkpoint: Path | None = None) -> Shapes:
    """The shapes in a folder's config.json, for a model whose weights are in ``checkpoint``.

    If that checkpoint was converted from a folder with an output layer of its own, the model is untied whatever
    config.json says, as transformers loads it (``open_weights``).

    Raises:
        UserError: all errors of ``Shapes.from_hf``.
    """
    shapes = Shapes.from_hf(hf)
    layout = HfLayout.of_checkpoint(checkpoint) if checkpoint is not None else None
    return replace(shapes, tied=False) if layout is not None and layout.untied else shapes


def model_shapes(model: ModelSettings, checkpoint: Path | None = None) -> Shapes:
    """``shapes_of`` the folder in ``model.hf``; with ``model.resize_vocabulary`` with rows for all tokens.

    Raises:
        UserError: all errors of ``shapes_of``, and those of ``vocabulary.resized`` or ``vocabulary.check_tokenizer``.
    """
    shapes = shapes_of(model.hf, checkpoint)
    if model.resize_vocabulary:
        return resized(shapes, model.hf)
    check_tokenizer(shapes, model.hf)
    return shapes


def open_weights(hf: Path) -> tuple[Shapes, HfWeights]:
    """The weights of a folder, and the shapes of their model.

    If config.json has ``tie_word_embeddings: true`` and the folder has an ``lm_head.weight`` with other values than the
    word embedding, the model is untied, and a warning says so. transformers 5 does the same.

    Raises:
        UserError: all errors of ``shapes_of`` and ``HfWeights``.
    """
    shapes, weights = shapes_of(hf), HfWeights(hf)
    if not shapes.tied or not has_own_output(weights):
        return shapes, weights
    _log.warning(
        "%s: config.json has tie_word_embeddings: true, but %s differs from %s. The model is taken as untied, as "
        "transformers does; both weights are kept. Set tie_word_embeddings to false to silence this warning.",
        hf, HF_OUTPUT, HF_EMBEDDING,
    )  # fmt: skip
    return replace(shapes, tied=False), weights


def has_own_output(weights: HfWeights) -> bool:
    """Whether a folder has an output layer whose values differ from those of the word embedding."""
    tensors = weights.layout.tensors
    if not {HF_EMBEDDING, HF_OUTPUT} <= tensors.keys() or tensors[HF_EMBEDDING].shape != tensors[HF_OUTPUT].shape:
        return False
    embedding, output = weights.read(HF_EMBEDDING), weights.read(HF_OUTPUT)
    return not torch.equal(embedding.to(output.dtype), output)

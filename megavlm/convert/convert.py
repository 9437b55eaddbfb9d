"""The conversions in both directions. Each makes one pass over the weights in constant memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from megavlm.base.errors import UserError
from megavlm.base.new_output import new_folder, progress_bar
from megavlm.convert import vocabulary
from megavlm.convert.adapter import REWARD_HEAD, Adapter
from megavlm.convert.check_checkpoint import check_checkpoint
from megavlm.convert.hf_folder import HF_LAYOUT, HfLayout, HfWeights, HfWriter, copy_configuration
from megavlm.convert.hf_shapes import has_own_output, is_hf_folder, layout_of, shapes_of, warn_of_own_output
from megavlm.convert.hf_source import HfSource, check_names, open_source
from megavlm.convert.mcore_checkpoint import TensorToWrite, write_checkpoint
from megavlm.convert.names import HF_EMBEDDING, HF_OUTPUT, Entry, table
from megavlm.convert.threads import in_threads
from megavlm.convert.weight_source import WeightSource
from megavlm.model import score_head


def hf_to_mcore(hf: str | Path, out: str | Path, *, overwrite: bool = False, progress: bool = True) -> None:
    """Converts a Hugging Face Qwen3-VL folder into a Megatron checkpoint that loads in any parallel layout.

    Tensors keep their dtype. Neither a GPU nor memory for the whole model is needed. The checkpoint is of the model
    that transformers loads: untied if ``lm_head.weight`` differs from the word embedding, whatever config.json says.

    Args:
        hf: folder with config.json and safetensors files.
        out: checkpoint folder to create.
        overwrite: whether to replace an existing checkpoint.
        progress: whether to show a progress bar on standard error.

    Raises:
        UserError: a tensor or file in ``hf`` is missing, damaged, unknown or quantised, or has a wrong shape; ``out``
            exists.
    """
    hf, out = Path(hf), Path(out)
    source = HfSource(hf)
    warn_of_own_output(hf, source.layout)
    written = [
        TensorToWrite(key, shape, dtype, partial(source.read, key), source.pieces(key))
        for key, (shape, dtype) in source.tensors.items()
    ]
    total = sum(info.nbytes for info in source.layout.tensors.values())
    with new_folder(out, overwrite=overwrite, mark="metadata.json") as unfinished:
        (unfinished / HF_LAYOUT).write_text(source.layout.to_json(), encoding="utf-8")
        with progress_bar(f"{hf.name} → {out.name}", total, show=progress) as advance:
            write_checkpoint(unfinished, written, {"step": 0, "model_type": source.shapes.model_type}, advance)


def mcore_to_hf(
    mcore: str | Path,
    hf: str | Path,
    out: str | Path,
    *,
    adapter: Adapter | None = None,
    resize_vocabulary: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    finish: Callable[[Path], None] = lambda folder: None,
    source: WeightSource | None = None,
) -> None:
    """Converts a Megatron checkpoint, whether converted or saved by training, into a Hugging Face folder.

    The weights may also be those of a Hugging Face folder, for an adapter to be merged into them.

    Names, files and dtypes are those of the weights in ``hf`` if it has any, or else those recorded in the checkpoint.
    Without either, they are transformers' names, files of 5 GB and the dtype of the checkpoint.

    Args:
        mcore: checkpoint or Hugging Face folder; optimizer states are ignored.
        hf: folder with config.json and the files of processor and tokenizer, which are copied.
        out: folder to create.
        adapter: adapter to merge into the weights. Weights that were trained in full with it replace those of
            ``mcore``.
        resize_vocabulary: whether to write a row for each token of the tokenizer in ``hf``, as
            ``model.resize_vocabulary`` does: rows that ``mcore`` lacks are the mean of the others. If False, rows
            beyond those of ``hf`` are written only if ``mcore`` is of a run with that setting.
        dtype: dtype of all weights, instead of those above.
        shard_bytes: largest size of a file of weights, instead of the files above.
        overwrite: whether to replace an existing model folder.
        progress: whether to show a progress bar on standard error.
        finish: called with the folder before it gets its name, to add files to it.
        source: where to read the weights of ``mcore``, if not as they are.

    Raises:
        UserError: the checkpoint is of another model than ``hf``; it is a Hugging Face folder to which nothing would
            be done; ``out`` exists; and all errors of HfWeights and
            ``open_source``.
    """
    mcore, hf, out = Path(mcore), Path(hf), Path(out)
    if out.resolve() == hf.resolve():
        raise UserError(f"--out and --hf are the same folder: {out}", "choose another --out")
    if is_hf_folder(mcore):
        if out.resolve() == mcore.resolve():
            raise UserError(f"--out is the folder with the weights: {out}", "choose another --out")
        if adapter is None and dtype is None and not resize_vocabulary:
            raise UserError(
                f"{mcore} is a Hugging Face folder already, not a checkpoint (it has no metadata.json): there is "
                "nothing to convert",
                "name the run or the checkpoint that is to be converted",
            )
    in_hf, checkpoint = shapes_of(hf, mcore), source or open_source(mcore)
    shapes = vocabulary.resized(in_hf, hf) if resize_vocabulary else vocabulary.stored_shapes(in_hf, hf, checkpoint)
    entries = table(shapes)
    check_checkpoint(checkpoint, shapes, fewer_rows=resize_vocabulary)
    if shapes.tied and HfWeights.present(hf) and has_own_output(HfWeights(hf)):
        raise UserError(
            f"{hf} has an lm_head.weight that differs from the word embedding, but {mcore} has no output layer of its "
            "own",
            "convert the folder again with hf2mcore.py, or give a folder without that weight",
        )
    trained = adapter.others if adapter is not None else None
    newer = adapter.other_weights if adapter is not None else set()
    layout = hf_layout(hf, mcore)
    if layout is None:
        stored = checkpoint.tensors[entries[0].key][1]
        layout = HfLayout.sharded({name: shape for entry in entries for name, shape in entry.hf.items()}, stored)
    grown = shapes.text.vocab if shapes.text.vocab != in_hf.text.vocab else None
    if grown is not None:
        layout = layout.with_rows((HF_EMBEDDING, HF_OUTPUT), grown)
    check_names(entries, layout, hf if HfWeights.present(hf) else mcore / HF_LAYOUT)
    layout = layout if dtype is None else layout.with_dtype(dtype)
    layout = layout if shard_bytes is None else layout.with_files_of(shard_bytes)
    tensors = layout.tensors
    with new_folder(out, overwrite=overwrite, mark="config.json") as partial:
        copy_configuration(hf, partial, dtype, grown)
        writer = HfWriter(partial, layout)
        total = sum(info.nbytes for info in tensors.values())
        with progress_bar(f"writing {out.name}", total, show=progress) as advance:

            def convert(piece: tuple[Entry, int, int]) -> None:
                entry, first, last = piece
                source = trained if trained is not None and entry.key in newer else checkpoint
                tensor = vocabulary.read_rows(source, entry.key, first, last)
                wanted = [_piece_shape(entry, tensors[name].shape) for name in entry.hf]
                parts = entry.layout.to_hf(tensor, wanted)
                if adapter is not None:
                    parts = adapter.merged(entry, parts, piece=first // max(1, last - first))
                for name, part in zip(entry.hf, parts, strict=True):
                    for target in (name, *(copy for copy in entry.copies if copy in tensors)):
                        writer.write(target, part, first)
                        advance(part.numel() * tensors[target].torch_dtype.itemsize)

            in_threads(convert, [(entry, *piece) for entry in entries for piece in rows(entry)])
            writer.close()
        head = adapter.reward_head if adapter is not None else None
        if head is None and score_head.KEY in checkpoint.tensors:
            head = checkpoint.read(score_head.KEY)
        if head is not None:
            save_file({"weight": head}, partial / REWARD_HEAD)
        finish(partial)


def hf_layout(hf: str | Path, mcore: str | Path | None = None) -> HfLayout | None:
    """The layout for a converted folder: that of the weights in ``hf``, or else that of ``mcore`` (``layout_of``)."""
    if HfWeights.present(Path(hf)):
        return HfWeights(Path(hf)).layout
    return layout_of(Path(mcore)) if mcore is not None else None


def rows(entry: Entry) -> list[tuple[int, int]]:
    """The ranges of axis 0 that are converted one at a time."""
    size = entry.shape[0] // entry.pieces
    return [(piece * size, (piece + 1) * size) for piece in range(entry.pieces)]


def _piece_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one piece of an HF tensor. Pieces are always cut along axis 0."""
    return (shape[0] // entry.pieces, *shape[1:])

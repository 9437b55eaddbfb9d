"""Merges an adapter into a Hugging Face folder, in one pass over the weights."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.base.new_output import new_folder, progress_bar
from megavlm.convert.adapter import REWARD_HEAD, Adapter
from megavlm.convert.convert import rows
from megavlm.convert.hf_folder import HfWriter, copy_configuration, short_list
from megavlm.convert.hf_shapes import open_weights, warn_of_own_output
from megavlm.convert.hf_source import check_names
from megavlm.convert.names import Entry, table
from megavlm.convert.threads import in_threads
from megavlm.convert.vocabulary import check_tokenizer
from megavlm.model import score_head


def merge_adapter(
    hf: str | Path, adapter: str | Path, out: str | Path, *, overwrite: bool = False, progress: bool = True
) -> None:
    """Writes the Hugging Face folder ``out``: the model of ``hf`` with an adapter merged in. Files and dtypes stay.

    Args:
        hf: the model's folder.
        adapter: folder in peft's format, or the checkpoint of a run that trained an adapter.
        out: the folder to create.
        overwrite: whether to replace an existing model folder.
        progress: whether to show a progress bar on standard error.

    Raises:
        UserError: all errors of ``Adapter``, ``HfWeights`` and ``check_tokenizer``; ``out`` exists; the checkpoint also
            has weights that were trained in full.
    """
    hf, out = Path(hf), Path(out)
    shapes, weights = open_weights(hf)
    warn_of_own_output(hf, weights.layout)
    check_tokenizer(shapes, hf)
    entries, found = table(shapes), Adapter(adapter, shapes)
    check_names(entries, weights.layout, hf)
    whole = sorted(found.other_weights - {score_head.KEY})
    if whole:
        raise UserError(
            f"{adapter} also has weights that were trained in full: {short_list(whole)}",
            "use megavlm export, which includes them",
        )
    total = sum(info.nbytes for info in weights.layout.tensors.values())
    with new_folder(out, overwrite=overwrite, mark="config.json") as partial:
        copy_configuration(hf, partial)
        writer = HfWriter(partial, weights.layout)
        with progress_bar(f"{hf.name} + {Path(adapter).name} → {out.name}", total, show=progress) as advance:

            def copy(piece: tuple[Entry, int, int]) -> None:
                entry, number, first = piece
                parts = [_rows(weights.read(name), number, entry.pieces) for name in entry.hf]
                for name, part in zip(entry.hf, found.merged(entry, parts, number), strict=True):
                    copies = [copy for copy in entry.copies if copy in weights.layout.tensors]
                    for target in (name, *copies):
                        writer.write(target, part, first)
                        advance(part.nbytes)

            in_threads(copy, [(e, number, first) for e in entries for number, (first, _) in enumerate(rows(e))])
            writer.close()
        if found.reward_head is not None:
            save_file({"weight": found.reward_head}, partial / REWARD_HEAD)


def _rows(tensor: Tensor, number: int, pieces: int) -> Tensor:
    return tensor.chunk(pieces)[number] if pieces > 1 else tensor

"""Compares the weights in a folder with the model that config.json describes, in both directions.

Every command and tool that reads weights calls this before it does anything, because a part of a larger model would
load without an error.
"""

from collections.abc import Collection, Mapping

from megavlm.base.errors import UserError
from megavlm.convert.hf_folder import short_list
from megavlm.convert.model_facts import differences, of_weights
from megavlm.convert.names import MCORE_OUTPUT, Entry, table
from megavlm.convert.peft_names import CHECKPOINT_PREFIX
from megavlm.convert.tensor_order import Shape
from megavlm.convert.weight_source import WeightSource
from megavlm.model import score_head
from megavlm.model.shapes import Shapes

PARTS = ("vision.", "projector.", "language.")
"""The beginnings of the keys of a model's weights. Others belong to adapters, optimizers and further models."""


def check_checkpoint(checkpoint: WeightSource, shapes: Shapes, *, prefix: str = "", fewer_rows: bool = False) -> None:
    """Checks that a folder contains all weights of a model with their shapes, and no other weights of a model.

    It is a checkpoint or a Hugging Face folder. A reward head may be missing. The word embedding and the output layer
    may have further rows that are all zero, from a padded vocabulary.

    Args:
        checkpoint: where the weights are. Its files and objects are checked, too (``check_contents``).
        shapes: shapes of the model.
        prefix: the beginning of the keys of a model that is not the main model of a run.
        fewer_rows: whether the embedding and the output layer may have fewer rows (``model.resize_vocabulary``).

    Raises:
        UserError: the checkpoint is damaged, of another model, or contains only an adapter; the message says in the
            terms of config.json what differs.
    """
    entries = table(shapes)
    stored = {
        key.removeprefix(prefix): shape
        for key, (shape, _) in checkpoint.tensors.items()
        if key.startswith(tuple(prefix + part for part in PARTS))
    }
    if not any(entry.key in stored for entry in entries):
        if any(key.startswith(CHECKPOINT_PREFIX) for key in checkpoint.tensors):
            raise UserError(
                f"{checkpoint.path} contains an adapter without its base weights",
                "give a checkpoint of the base weights, and the adapter beside it (model.adapter, or merge_adapter.py)",
            )
        raise UserError(
            f"{checkpoint.path} contains no weights of a Qwen3-VL that megavlm has written",
            "give a checkpoint that hf2mcore.py or training has written",
        )
    for entry in entries:
        if entry.padded and entry.key in stored and _may_differ(checkpoint, prefix, entry, fewer_rows):
            stored[entry.key] = entry.shape
    _compare(stored, _expected(entries, shapes), checkpoint)
    checkpoint.check_contents()


def check_trained_parts(checkpoint: WeightSource, shapes: Shapes, single: Collection[str] = ()) -> None:
    """Checks the weights that a checkpoint of adapters contains beside them: of parts that were trained in full.

    ``single``: keys of weights that must be there without the rest of their part (``adapter.modules_to_save``).

    Raises:
        UserError: as ``check_checkpoint``.
    """
    stored = {key: shape for key, (shape, _) in checkpoint.tensors.items() if key.startswith(PARTS)}
    parts = {key.partition(".")[0] for key in stored if key != score_head.KEY and key not in single}
    expected = {
        key: shape
        for key, shape in _expected(table(shapes), shapes).items()
        # the output layer of a reward model is not trained
        if key in stored
        or key in single
        or (key.partition(".")[0] in parts and key not in (MCORE_OUTPUT, score_head.KEY))
    }
    _compare(stored, expected, checkpoint)


def _expected(entries: list[Entry], shapes: Shapes) -> dict[str, Shape]:
    return {entry.key: entry.shape for entry in entries} | {score_head.KEY: (1, shapes.text.hidden)}


def _may_differ(checkpoint: WeightSource, prefix: str, entry: Entry, fewer_rows: bool) -> bool:
    """Whether a tensor with a row for each token may have the number of rows that it has."""
    key = prefix + entry.key
    shape, ours = checkpoint.tensors[key][0], entry.shape[0]
    if len(shape) != len(entry.shape) or shape[1:] != entry.shape[1:] or shape[0] == ours:
        return False
    return fewer_rows if shape[0] < ours else not checkpoint.read(key, ours, shape[0]).any()


def _compare(stored: Mapping[str, Shape], expected: Mapping[str, Shape], source: WeightSource) -> None:
    missing = [key for key in expected if key not in stored and key != score_head.KEY]
    unknown = [key for key in stored if key not in expected]
    shapes = [key for key in expected if key in stored and stored[key] != expected[key]]
    found = [f"missing tensor {short_list(missing, 2)}"] if missing else []
    found += [f"further tensor {short_list(unknown, 2)}"] if unknown else []
    if shapes:
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        there, here = list(stored[shapes[0]]), list(expected[shapes[0]])
        found.append(f"{shapes[0]} has shape {there}, but config.json implies {here}{more}")
    if not found:
        return
    different = differences(f"the {source.kind}", of_weights(stored), of_weights(expected))
    raise UserError(
        f"{source.path} is a {source.kind} of another model than config.json describes"
        f"{f': {different}' if different else ''} ({'; '.join(found)})",
        "use the Hugging Face folder (model.hf, --hf) of the model that the weights are of, or other weights",
    )

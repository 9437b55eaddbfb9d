"""Where a run with adapters starts: what they are, and the first values of them and of the weights below."""

import logging
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megavlm.adapters.attach import Adapters
from megavlm.base.errors import UserError
from megavlm.checkpoint.fingerprint import digest_of_folders
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import load_some, load_weights
from megavlm.config.adapter_section import AdapterSettings
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.convert.adapter import ADAPTER_MODEL, Adapter
from megavlm.convert.peft_config import config_of
from megavlm.convert.peft_names import part_of, targeted
from megavlm.model import score_head
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM

_log = logging.getLogger(__name__)


def with_stored_adapter(settings: Settings, shapes: Shapes) -> Settings:
    """The same settings, with the adapter section that ``model.adapter`` is of, if it is set.

    Raises:
        UserError: there is a section that says something else.
    """
    if settings.model.adapter is None:
        return settings
    section, stored = settings.adapter, Adapter(find_checkpoint(settings.model.adapter), shapes).settings
    if section.type is not None:
        ours, theirs = ({k: _sorted(v) for k, v in config_of(s, shapes).items()} for s in (section, stored))
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different:
            listed = "; ".join(f"{name} {ours.get(name)}, there {theirs.get(name)}" for name in different)
            raise UserError(
                f"the adapter section is of another adapter than model.adapter: {listed}",
                "remove the section, or remove model.adapter to start with a fresh one",
            )
        stored = AdapterSettings(**{**stored.model_dump(), "quantize": section.quantize})
    return settings.model_copy(update={"adapter": stored})


def check_adapter(settings: Settings, shapes: Shapes) -> None:
    """Whether the adapter, of the section or of ``model.adapter``, goes with the model and the other sections.

    Raises:
        UserError: it does not; the message says which setting to change.
    """
    adapter, model = settings.adapter, settings.model
    if adapter.type is None:
        return
    if model.load is None:
        raise UserError(
            f"adapter.type is {adapter.type}, but model.load is not set: adapters sit on trained weights",
            "set model.load, or adapter.type to null",
        )
    parts = {part_of(name): name for name in targeted(adapter, shapes)}
    for part, name in parts.items():
        if part in model.freeze:
            raise UserError(
                f"model.freeze has {part}, but there is an adapter on {name}",
                f"take {part} out of model.freeze: with adapters in it, its own weights do not learn",
            )
    if settings.train.optimizer == "galore":
        raise UserError(
            f"train.optimizer is galore, but adapter.type is {adapter.type}: adapters have no large matrices",
            "use train.optimizer adam",
        )
    if adapter.dropout and settings.vision.recompute and parts.keys() - {"language"}:
        raise UserError(
            "adapter.dropout is set with vision.recompute: the tower would hide other features the second time",
            "set one of them to its default, or put adapters on the decoder alone",
        )
    if adapter.quantize and "language" not in {*parts, *model.freeze} - settings.train.unfreeze_after.keys():
        raise UserError(
            f"adapter.quantize is {adapter.quantize}, but the decoder, whose linears it stores in 4 bits, learns",
            "put adapters on it, freeze it for good, or set quantize to null",
        )


def load_start(settings: Settings, vlm: VLM, adapters: Adapters | None) -> None:
    """Loads ``model.load``, if it is set, and puts adapters where they start from: ``model.adapter``, or no change."""
    model = settings.model
    if model.load is not None:
        load_weights(find_checkpoint(model.load), vlm)
    if adapters is None:
        return
    source = None
    if model.adapter is not None:
        folder = find_checkpoint(model.adapter)
        if dist.get_rank() == 0:
            warn_of_other_base(folder, find_checkpoint(required(model.load, "model.load")))
        source = Adapter(folder, vlm.shapes)
        if others := source.other_weights - {score_head.KEY}:  # of parts that learned beside the adapters
            load_some(folder, vlm, lambda key: key in others)
        for chunk in vlm.language if source.reward_head is not None else ():
            if hasattr(chunk, "score_head"):
                chunk.score_head.weight.data.copy_(source.reward_head)
    adapters.begin(source, settings.train.seed)


def warn_of_other_base(adapter: Path, load: Path) -> None:
    """Says so where the checkpoint of an adapter was trained on other weights than those of ``load``."""
    if (adapter / ADAPTER_MODEL).is_file():  # peft's, which does not tell
        return
    identity = dist_checkpointing.load_common_state_dict(str(adapter)).get("identity", {})
    base = identity.get("base below the adapters")
    if base is not None and base != digest_of_folders(load):
        _log.warning("the adapter of %s was trained on other weights than those of %s", adapter, load)


def _sorted(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value

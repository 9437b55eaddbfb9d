"""Start of a run with adapters: its settings, and the first values of the adapters and of the base weights."""

import logging
from pathlib import Path

import torch.distributed as dist

from megavlm.adapters.attach import Adapters
from megavlm.base.errors import UserError
from megavlm.checkpoint.averages import AveragedCheckpoint
from megavlm.checkpoint.fingerprint import digest_of_folders
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import load_some, load_weights
from megavlm.config.adapter_section import AdapterSettings
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.convert.adapter import ADAPTER_MODEL, Adapter
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.peft_config import config_of
from megavlm.convert.peft_names import part_of, rank_of, saved_whole, targeted
from megavlm.model import score_head
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM

_log = logging.getLogger(__name__)


def with_stored_adapter(settings: Settings, shapes: Shapes) -> Settings:
    """Returns the settings with the section ``adapter`` replaced by that of ``model.adapter``, if that is set.

    Raises:
        UserError: the settings have a section ``adapter`` that contradicts it.
    """
    if settings.model.adapter is None:
        return settings
    section, stored = settings.adapter, Adapter(find_checkpoint(settings.model.adapter), shapes).settings
    if section.type is not None:
        ours, theirs = ({k: _sorted(v) for k, v in config_of(s, shapes).items()} for s in (section, stored))
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if different:
            listed = "; ".join(f"{name} is {ours.get(name)}, in model.adapter {theirs.get(name)}" for name in different)
            raise UserError(
                f"the section adapter does not match model.adapter: {listed}",
                "remove the section, or remove model.adapter to start with a new adapter",
            )
        kept = {name: getattr(section, name) for name in ("quantize", "lr_ratio")}  # which peft's format does not have
        stored = AdapterSettings(**{**stored.model_dump(), **kept})
    return settings.model_copy(update={"adapter": stored})


def check_adapter(settings: Settings, shapes: Shapes) -> None:
    """Checks that the section ``adapter`` fits the model and the other sections.

    Raises:
        UserError: it does not; the message says which setting to change.
    """
    adapter, model = settings.adapter, settings.model
    if adapter.type is None:
        return
    if model.start is None:
        load = "not set" if model.load is None else model.load
        raise UserError(
            f"adapter.type is {adapter.type}, but model.load is {load}: adapters are added to trained weights",
            "set model.load to these weights, or adapter.type to null",
        )
    linears = targeted(adapter, shapes)
    packed = [key for key in saved_whole(adapter, shapes) if key.startswith("language.") and ".linear_" in key]
    if adapter.quantize and any(key.endswith(".weight") for key in packed):
        raise UserError(
            f"adapter.quantize is {adapter.quantize}, but adapter.modules_to_save trains {packed[0]}, which would be "
            "stored in 4 bits",
            "remove linear layers from modules_to_save, or set adapter.quantize to null",
        )
    for name, linear in linears.items():
        if adapter.type != "fourierft" and rank_of(adapter, name) > max(linear.out, linear.inner):
            raise UserError(
                f"adapter.rank is {rank_of(adapter, name)} for {name}, which has {linear.out} × {linear.inner} weights",
                "lower adapter.rank or adapter.rank_pattern",
            )
    parts = {part_of(name): name for name in linears}
    for part, name in parts.items():
        if part in model.freeze:
            raise UserError(
                f"model.freeze contains {part}, but there is an adapter on {name}",
                f"remove {part} from model.freeze: the base weights of a part with adapters are always frozen",
            )
    if settings.train.optimizer in ("galore", "muon"):
        raise UserError(
            f"train.optimizer is {settings.train.optimizer}, but adapter.type is {adapter.type}: adapters have no "
            "large matrices",
            "set train.optimizer to adam",
        )
    if adapter.dropout and settings.vision.recompute and parts.keys() - {"language"}:
        raise UserError(
            "adapter.dropout is set together with vision.recompute: recomputation would drop other features",
            "set one of them to its default, or use adapters only in the decoder",
        )
    if adapter.quantize and "language" not in {*parts, *model.freeze} - settings.train.unfreeze_after.keys():
        raise UserError(
            f"adapter.quantize is {adapter.quantize}, which stores the decoder's linear layers in 4 bits, but these "
            "layers are trained",
            "use adapters in the decoder, freeze it for the whole run, or set adapter.quantize to null",
        )


def load_start(settings: Settings, vlm: VLM, adapters: Adapters | None, *, ema: bool = False) -> None:
    """Loads ``model.load``, unless the run starts from random weights, and sets the first values of the adapters.

    With ``ema``, what was trained last, adapters or weights, is read from its moving averages.
    Adapters start from ``model.adapter`` or, without it, from values that do not change the model's output.
    """
    model = settings.model
    if model.start is not None:
        load_weights(find_checkpoint(model.start), vlm, ema=ema and model.adapter is None)
    if adapters is None:
        return
    folder = find_checkpoint(model.adapter) if model.adapter is not None else None
    if folder is not None and dist.get_rank() == 0:
        warn_of_other_base(folder, find_checkpoint(required(model.start, "model.load")))
    begin_adapters(vlm, adapters, folder, settings.train.seed, ema=ema)


def begin_adapters(vlm: VLM, adapters: Adapters, folder: Path | None, seed: int, *, ema: bool = False) -> None:
    """Sets the first values of adapters, and of what was trained beside them, to those in ``folder``.

    With ``ema``, they are the moving averages there. Without a folder, adapters get values that do not change the
    model's output.
    """
    source = None
    if folder is not None:
        source = Adapter(folder, vlm.shapes, AveragedCheckpoint(folder) if ema else None)
        if others := source.other_weights - {score_head.KEY}:  # of parts without adapters that were trained as well
            load_some(folder, vlm, lambda key: key in others, source.others)
        for chunk in vlm.language if source.reward_head is not None else ():
            if hasattr(chunk, "score_head"):
                chunk.score_head.weight.data.copy_(source.reward_head)
    adapters.begin(source, seed)


def warn_of_other_base(adapter: Path, load: Path) -> None:
    """Logs a warning if the adapter in the checkpoint ``adapter`` was trained with a base model other than ``load``."""
    if (adapter / ADAPTER_MODEL).is_file():  # an adapter of peft, which has no digest of its base model
        return
    identity = McoreCheckpoint(adapter).common_state().get("identity", {})
    base = identity.get("base below the adapters")
    if base is not None and base != digest_of_folders(load):
        _log.warning("the adapter in %s was trained with a base model other than %s", adapter, load)


def _sorted(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value

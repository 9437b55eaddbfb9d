"""Further models of a run: a critic, reward models. With adapters they share the base weights of the main model."""

from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist
from torch.nn import Parameter

from megavlm.adapters.attach import Adapters
from megavlm.adapters.nf4 import share_quantized
from megavlm.base.errors import UserError
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import has_score_head, load_weights
from megavlm.config.adapter_section import AdapterSettings
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.convert.adapter import Adapter
from megavlm.convert.check_checkpoint import check_checkpoint
from megavlm.convert.hf_source import open_source
from megavlm.convert.peft_config import ADAPTER_CONFIG
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import PARTS, VLM
from megavlm.platform import Groups
from megavlm.runtime.adapter_start import begin_adapters, warn_of_other_base

_OWN = ("adapters.", "score_head.")  # the beginnings of names of parameters that no other model has


def further_model(
    settings: Settings,
    shapes: Shapes,
    groups: Groups,
    main: VLM,
    main_adapters: Adapters | None,
    load: Path | None,
    *,
    trained: bool,
    score_head: bool,
) -> tuple[VLM, Adapters | None]:
    """Builds a model with the shapes and the layout of the main model, and loads its weights.

    What stays frozen in both models and starts from the same weights exists once: the new model's parameters have the
    storage of the main model's.

    Args:
        settings: the settings of the run.
        shapes, groups: those of the main model.
        main, main_adapters: the main model, which has its first weights if it has adapters.
        load: checkpoint, run folder or Hugging Face folder; an adapter belongs on the weights of ``model.load``. None:
            it starts as the main model does.
        trained: whether its weights will change; otherwise the whole model is frozen and in eval mode. Beside a main
            model with adapters, only its own adapters and head change, and parts that are trained in full.
        score_head: whether it has the head of a reward or value model.

    Raises:
        UserError: ``load`` is damaged, or of another model.
    """
    path = find_checkpoint(load) if load is not None else None
    is_adapter = path is not None and (path / ADAPTER_CONFIG).is_file()
    if path is None or is_adapter:
        base = find_checkpoint(required(settings.model.start, "model.load"))
    else:
        base = path
    section, source = AdapterSettings(), None
    if path is not None and is_adapter:
        source = path
        stored = Adapter(path, shapes).settings
        kept = {name: getattr(settings.adapter, name) for name in ("quantize", "lr_ratio")}
        section = AdapterSettings(**{**stored.model_dump(), **kept})
        if dist.get_rank() == 0:
            warn_of_other_base(path, base)
    elif main_adapters is not None and trained:
        section = settings.adapter
        if path is None and settings.model.adapter is not None:
            source = find_checkpoint(settings.model.adapter)
    vlm = VLM(shapes, settings.model_copy(update={"adapter": section}), groups, score_head=score_head)
    adapters = Adapters(vlm, section) if section.type is not None else None
    if not trained:
        for module in (module for part in PARTS for module in vlm.modules_of(part)):
            module.requires_grad_(False)
    pairs: list[tuple[Parameter, Parameter]] = []
    is_whole = False
    if path is None or is_adapter:  # what is frozen has the values of the main model
        if adapters is not None and main_adapters is not None:
            share_quantized(adapters.linears, main_adapters.linears)
        pairs, is_whole = _frozen_in_both(vlm, main, settings.train.unfreeze_after.keys())
    if not is_whole:
        load_weights(base, vlm)
    for mine, theirs in pairs:
        mine.data = theirs.data
    if adapters is not None:
        begin_adapters(vlm, adapters, source, settings.train.seed)
    return vlm.train(trained), adapters


def check_further_models(settings: Settings, shapes: Shapes) -> None:
    """Compares the names and shapes in the weights of the critic and of reward models with those of the main model.

    Nothing is built for it, so that a run of another model's critic ends at once. Folders that do not exist are not
    looked at (``check_files`` names them).

    Raises:
        UserError: weights are damaged, or of another model.
    """
    loads = {"align.critic.load": settings.align.critic.load}
    loads |= {f"reward {reward.key}": reward.model for reward in settings.reward}
    for name, load in loads.items():
        if load is None or not load.exists():
            continue
        path = find_checkpoint(load)
        try:
            if (path / ADAPTER_CONFIG).is_file():
                Adapter(path, shapes)
            else:
                check_checkpoint(open_source(path), shapes, fewer_rows=settings.model.resize_vocabulary)
        except UserError as error:
            raise UserError(f"{name}: {error.message}", error.remedy) from None


def has_reward_head(path: Path, shapes: Shapes) -> bool:
    """Whether a checkpoint, a Hugging Face folder or an adapter contains the head of a reward model."""
    if (path / ADAPTER_CONFIG).is_file():
        return Adapter(path, shapes).reward_head is not None
    return has_score_head(path)


def _frozen_in_both(vlm: VLM, main: VLM, later: Collection[str]) -> tuple[list[tuple[Parameter, Parameter]], bool]:
    """The parameters that are frozen in both models, in pairs, and whether these are all but adapters and heads.

    ``later`` are the parts of the main model that are unfrozen later.
    """
    pairs, is_whole = [], True
    for part in PARTS:
        for module, other in zip(vlm.modules_of(part), main.modules_of(part), strict=True):
            theirs = dict(other.named_parameters())
            for name, parameter in module.named_parameters():
                if name.startswith(_OWN):
                    continue
                if parameter.requires_grad or part in later or theirs[name].requires_grad:
                    is_whole = False
                else:
                    pairs.append((parameter, theirs[name]))
    return pairs, is_whole

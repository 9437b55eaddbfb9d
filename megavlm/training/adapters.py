"""Where a run with adapters starts: what they are, and the first values of them and of the weights below."""

from megavlm.config.adapter_section import AdapterSettings
from megavlm.config.errors import UserError
from megavlm.config.settings import Settings
from megavlm.convert.adapter import Adapter
from megavlm.convert.peft_config import config_of
from megavlm.convert.peft_names import part_of, targeted
from megavlm.model import score_head
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.training.checkpoint_folders import find_checkpoint
from megavlm.training.state import load_some, load_weights


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
            told = "; ".join(f"{name} {ours.get(name)}, there {theirs.get(name)}" for name in different)
            raise UserError(
                f"the adapter section is of another adapter than model.adapter: {told}",
                "remove the section, or remove model.adapter to start with a fresh one",
            )
        stored = AdapterSettings(**{**stored.model_dump(), "quantize": section.quantize})
    return settings.model_copy(update={"adapter": stored})


def check_adapter(settings: Settings, shapes: Shapes) -> None:
    """Raises UserError for targets that the model does not have, or that lie in a part of ``model.freeze``."""
    if settings.adapter.type is None:
        return
    for name in targeted(settings.adapter, shapes):
        if part_of(name) in settings.model.freeze:
            raise UserError(
                f"model.freeze has {part_of(name)}, but adapter.targets puts an adapter on {name}",
                f"take {part_of(name)} out of model.freeze: with adapters in it, its own weights do not learn",
            )


def load_start(settings: Settings, vlm: VLM) -> None:
    """Loads ``model.load``, if it is set, and puts adapters where they start from: ``model.adapter``, or no change."""
    model = settings.model
    if model.load is not None:
        load_weights(find_checkpoint(model.load), vlm)
    if vlm.tuning is None:
        return
    source = None
    if model.adapter is not None:
        folder = find_checkpoint(model.adapter)
        source = Adapter(folder, vlm.shapes)
        if others := source.other_weights - {score_head.KEY}:  # of parts that learned beside the adapters
            load_some(folder, vlm, lambda key: key in others)
        for chunk in vlm.language if source.reward_head is not None else ():
            if hasattr(chunk, "score_head"):
                chunk.score_head.weight.data.copy_(source.reward_head)
    vlm.tuning.begin(source, settings.train.seed)


def _sorted(value):
    return sorted(value) if isinstance(value, list) else value

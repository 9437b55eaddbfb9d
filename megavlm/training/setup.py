"""What every verb that runs the model does first: process groups, shapes, checks, the model and its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megavlm.config.adapter_section import AdapterSettings
from megavlm.config.errors import UserError
from megavlm.config.layout import check_dense_settings, check_layout, check_window
from megavlm.config.settings import Settings
from megavlm.convert.adapter import Adapter
from megavlm.convert.peft_config import config_of
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.platform import Groups, init
from megavlm.training.checkpoint_folders import latest
from megavlm.training.hang_watch import collective_minutes
from megavlm.training.state import load_some, load_weights
from megavlm.tuners.attach import Tuning


@dataclass
class Session:
    """A model on its ranks, with its weights."""

    settings: Settings
    shapes: Shapes
    groups: Groups
    vlm: VLM

    @property
    def is_first(self) -> bool:
        """Whether this process writes and shows what the run has to say."""
        return dist.get_rank() == 0


def check_shapes(settings: Settings, shapes: Shapes, world_size: int, *, training: bool = True) -> int:
    """Whether this model fits this layout on so many processes; returns the data-parallel size.

    Raises:
        UserError: it does not; the message says which values would.
    """
    text = shapes.text
    check_dense_settings(settings.train, text.moe.num_experts if text.moe else None)
    check_window(settings.vision.window, settings.parallel)
    data_size = check_layout(
        settings.parallel,
        world_size,
        num_heads=text.heads,
        num_kv_heads=text.kv_heads,
        vocab_size=text.vocab,
        num_experts=text.moe.num_experts if text.moe else None,
        num_layers=text.layers,
        ffn=text.ffn,
        expert_ffn=text.moe.ffn if text.moe else None,
        seq_length=settings.data.seq_length,
        global_batch_size=settings.train.global_batch_size if training else None,
    )
    if training and settings.vision.deal == "world" and data_size == 1:
        raise UserError(
            "vision.deal is world, but there is one data-parallel rank: it would be ignored",
            "set vision.deal to model_parallel, or start more processes",
        )
    return data_size


def start(settings: Settings, *, training: bool, load: bool = True, score_head: bool = False) -> Session:
    """Builds the model on this rank and loads ``model.load`` into it, if it is set.

    Args:
        training: whether weights will change; otherwise the model is in eval mode.
        load: False for a run that may have a checkpoint of its own.
        score_head: with the head of a reward model.
    """
    share_frames = training and settings.vision.deal == "world"
    groups = init(
        settings.parallel,
        settings.train.seed,
        collective_minutes(settings.train.hang_minutes),
        data_peers=share_frames,
    )
    shapes = Shapes.from_hf(settings.model.hf)
    check_shapes(settings, shapes, dist.get_world_size(), training=training)
    if settings.parallel.pipeline > 1 and not training:
        raise UserError(
            f"parallel.pipeline is {settings.parallel.pipeline}, but scoring and answering run in one stage",
            "set parallel.pipeline=1 on the command line; any checkpoint loads in any layout",
        )
    adapter = settings.adapter
    if settings.model.adapter is not None:
        adapter = Adapter(find_checkpoint(settings.model.adapter), shapes).settings
        adapter = agreed(settings.adapter, adapter, shapes)
        settings = settings.model_copy(update={"adapter": adapter})
    vlm = VLM(shapes, settings, groups, share_frames=share_frames, score_head=score_head)
    if adapter.type is not None:
        vlm.tuning = Tuning(vlm, adapter, settings.model.freeze)
    session = Session(settings, shapes, groups, vlm)
    vlm.train(training)
    if load:
        load_start(session)
    return session


def load_start(session: Session) -> None:
    """Loads ``model.load``, if it is set, and puts adapters where they start from."""
    model, vlm = session.settings.model, session.vlm
    if model.load is not None:
        load_weights(find_checkpoint(model.load), vlm)
    if vlm.tuning is None:
        return
    source = None
    if model.adapter is not None:
        folder = find_checkpoint(model.adapter)
        source = Adapter(folder, session.shapes)
        if others := source.other_weights:  # of parts that learned beside the adapters
            load_some(folder, vlm, lambda key: key in others)
    vlm.tuning.begin(source, session.settings.train.seed)


def agreed(section: AdapterSettings, stored: AdapterSettings, shapes: Shapes) -> AdapterSettings:
    """The adapter section where there is an adapter to start from, which says itself what it is.

    Raises:
        UserError: the section says something else.
    """
    if section.type is None:
        return stored
    ours, theirs = config_of(section, shapes), config_of(stored, shapes)
    different = [name for name in ours.keys() | theirs.keys() if _sorted(ours.get(name)) != _sorted(theirs.get(name))]
    if different:
        told = "; ".join(f"{name} {ours.get(name)}, there {theirs.get(name)}" for name in sorted(different))
        raise UserError(
            f"the adapter section is of another adapter than model.adapter: {told}",
            "remove the adapter section, or model.adapter to start with a fresh one",
        )
    return stored.model_copy(update={"quantize": section.quantize})


def _sorted(value):
    return sorted(value) if isinstance(value, list) else value


def find_checkpoint(path: Path) -> Path:
    """``model.load`` as a checkpoint: itself, or the newest one of the run folder that it names."""
    if (path / "checkpoints").is_dir():
        newest = latest(path / "checkpoints")
        if newest is None:
            raise UserError(f"model.load is {path}, a run that has no complete checkpoint yet", "name another one")
        return newest
    return path

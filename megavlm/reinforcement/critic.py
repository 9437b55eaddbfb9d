"""The critic of ppo: a second model with a head of its own, and what updates its weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megavlm.adapters.attach import Adapters
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.config.train_section import TrainSettings
from megavlm.model.vlm import VLM
from megavlm.optim.optimizers import Optimizers
from megavlm.reinforcement.value_objective import ValueObjective
from megavlm.runtime.feed import Feed, window_size
from megavlm.runtime.parking import Parking, own_weights
from megavlm.runtime.session import Model, Session
from megavlm.training.step import Step

CRITIC = "critic"
"""Its name in the session and in checkpoints."""


def add_critic(session: Session) -> Step:
    """Adds the critic to the session, with its first weights. Returns what updates them. Call it on all ranks.

    Raises:
        UserError: ``align.critic.load`` is damaged or of another model.
    """
    align = session.settings.align
    session.add_model(CRITIC, align.critic.load, trained=True, score_head=True)
    step = critic_step(session)
    if CRITIC in align.offload:
        step.awake = _parked(step, session.vlm)
    return step


def bare_critic(session: Session) -> Step:
    """The same without weights, for a dry run."""
    settings = session.settings
    with torch.device("meta"):
        vlm = VLM(session.shapes, settings, session.groups, score_head=True)
        adapters = Adapters(vlm, settings.adapter) if settings.adapter.type is not None else None
    session.models[CRITIC] = Model(vlm, adapters)
    return critic_step(session)


def critic_step(session: Session) -> Step:
    """What updates the weights of the critic, which is in the session."""
    settings, vlm = session.settings, session.models[CRITIC].vlm
    updates = settings.align.updates * settings.align.mini_batches
    optimizers = Optimizers(vlm, train_of_critic(settings), updates)
    objective = value_objective(session)
    window, names = window_size(settings), settings.data.source_names
    return Step(vlm, optimizers, Feed(vlm, None), settings.rows_per_step(1), objective, window, names)


def value_objective(session: Session) -> ValueObjective:
    """The objective of the critic."""
    settings = session.settings
    sequence_parallel = settings.parallel.sequence_parallel
    return ValueObjective(settings.align.critic.clip, session.groups.language, sequence_parallel=sequence_parallel)


def train_of_critic(settings: Settings) -> TrainSettings:
    """The section ``train`` of the critic. Its lowest learning rate is the same fraction of its highest one.

    Averages, groups and rates of layers are those of the policy alone.
    """
    train, critic = settings.train, settings.align.critic
    lr = required(train.lr, "train.lr") if critic.lr is None else critic.lr
    warmup_steps = train.warmup if critic.warmup_steps is None else critic.warmup_steps
    lowest = train.min_lr * lr / required(train.lr, "train.lr")
    changed: dict[str, Any] = {"lr": lr, "min_lr": lowest, "warmup_steps": warmup_steps, "warmup_share": None}
    changed |= {"ema": None, "groups": [], "layer_decay": 1.0}
    return train.model_copy(update=changed)


def _parked(step: Step, main: VLM) -> Parking:
    """Keeps the critic, its gradients and the state of its optimizer in host memory while it is not used."""
    own, ddps = own_weights(step.vlm, [main]), [ddp for ddps in step.optimizers.ddp.values() for ddp in ddps]
    buffers = [buffer for ddp in ddps for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)]

    def kept() -> Iterator[Tensor]:
        yield from own
        yield from (buffer.param_data for buffer in buffers if buffer.param_data is not None)
        if step.optimizers.train.offload_optimizer:
            return  # there it is already
        for optimizer in (one.optimizer for ones in step.optimizers.parts.values() for one in ones):
            yield from (p for group in optimizer.param_groups for p in group["params"])
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim)

    return Parking(kept, lambda: [buffer.grad_data for buffer in buffers])

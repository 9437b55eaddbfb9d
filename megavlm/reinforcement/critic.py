"""The critic of ppo: a second model with a head of its own, and what updates its weights."""



from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.config.train_section import TrainSettings
from megavlm.optim.optimizers import Optimizers
from megavlm.reinforcement.value_objective import ValueObjective
from megavlm.runtime.feed import Feed
from megavlm.runtime.session import Session
from megavlm.training.step import Step

CRITIC = "critic"
"""Its name in the session and in checkpoints."""


def add_critic(session: Session) -> Step:
    """Adds the critic to the session, with its first weights. Returns what updates them. Call it on all ranks.

    Raises:
        UserError: ``align.critic.load`` is damaged or of another model.
    """
    settings = session.settings
    load = settings.align.critic.load or required(settings.model.start, "model.load")
    session.add_model(CRITIC, load, trained=True, score_head=True)
    return critic_step(session)


def critic_step(session: Session) -> Step:
    """What updates the weights of the critic, which is in the session."""
    settings, vlm = session.settings, session.models[CRITIC].vlm
    updates = settings.align.updates * settings.align.mini_batches
    optimizers = Optimizers(vlm, train_of_critic(settings), updates)
    objective = value_objective(session)
    window = settings.vision.window or settings.rows_per_step(1)
    return Step(
        vlm, optimizers, Feed(vlm, None), settings.rows_per_step(1), objective, window, settings.data.source_names
    )


def value_objective(session: Session) -> ValueObjective:
    """The objective of the critic."""
    settings = session.settings
    sequence_parallel = settings.parallel.sequence_parallel
    return ValueObjective(settings.align.critic.clip, session.groups.language, sequence_parallel=sequence_parallel)


def train_of_critic(settings: Settings) -> TrainSettings:
    """The section ``train`` of the critic. Its lowest learning rate is the same fraction of its highest one."""
    train, critic = settings.train, settings.align.critic
    lr = required(train.lr, "train.lr") if critic.lr is None else critic.lr
    warmup_steps = train.warmup_steps if critic.warmup_steps is None else critic.warmup_steps
    lowest = train.min_lr * lr / required(train.lr, "train.lr")
    return train.model_copy(update={"lr": lr, "min_lr": lowest, "warmup_steps": warmup_steps})

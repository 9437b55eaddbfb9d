"""What the settings of reinforcement learning say about the loss, checked."""

from dataclasses import dataclass

from megavlm.align.loss_tables import GAE, POLICY_LOSSES, losses_of
from megavlm.align.losses import check_policy
from megavlm.align.losses.advantages import options_of as advantage_options
from megavlm.align.sampling_checks import check_names
from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.settings import Settings
from megavlm.reinforcement.policy_objective import PolicyOptions

REPLACEMENTS = 4
"""How often flat groups are replaced with the loss dapo, unless ``rollout.replace_flat`` is set."""
PPO_BETA = 0.05
"""Default of ``align.beta`` for ppo."""
# Settings of the section align that are read beside the options of the loss and the advantage.
_OWN = {
    "loss", "advantage", "beta", "kl_in", "updates", "mini_batches", "correction", "correction_lowest",
    "correction_highest", "overlong_cache", "mask_truncated", "offload", "routing_replay",
}  # fmt: skip
_OF_PPO = {"discount", "gae_lambda", "whiten", "critic"}


@dataclass(frozen=True)
class Policy:
    """What the settings say about the loss, checked.

    Attributes:
        options: the loss.
        kl_in_reward: weight of the divergence from the reference model in the rewards; 0: it has none there.
        advantage: the name of the advantage, and its options.
        replacements: how many times flat groups are replaced in a step.
    """

    options: PolicyOptions
    kl_in_reward: float
    advantage: tuple[str, dict[str, float]]
    replacements: int

    @property
    def has_reference(self) -> bool:
        """Whether the model is compared with a reference model."""
        return self.options.beta > 0 or self.kl_in_reward > 0

    @property
    def has_critic(self) -> bool:
        """Whether advantages are those of tokens, from the values of a critic."""
        return self.advantage[0] == GAE

    @classmethod
    def of(cls, settings: Settings, verb: str = "grpo") -> "Policy":
        """Raises UserError if ``verb`` (grpo or ppo) would ignore a setting, or if it is not allowed for the loss."""
        align, rollout, is_ppo = settings.align, settings.rollout, verb == "ppo"
        check_names(settings, verb)
        loss = align.loss or losses_of(verb)[0]
        of_losses = {name for entry in POLICY_LOSSES.values() for name in entry.options}
        options = {name: value for name in sorted(of_losses) if (value := getattr(align, name)) is not None}
        advantage = align.advantage or (GAE if is_ppo else "dr_grpo" if loss == "dr_grpo" else "grpo")
        of_advantage = {} if align.ddof is None else {"ddof": float(align.ddof)}
        for name in of_advantage.keys() - (set() if is_ppo else advantage_options(advantage).keys()):
            raise UserError(f"align.{name} is set, but align.advantage is {advantage}: it would be ignored",
                            f"remove align.{name}")  # fmt: skip
        for name in options.keys() - POLICY_LOSSES[loss].options.keys():
            having = ", ".join(other for other in losses_of(verb) if name in POLICY_LOSSES[other].options)
            raise UserError(
                f"align.{name} is set, but align.loss is {loss}, which does not have it: it would be ignored",
                f"remove align.{name}" + (f", or choose a loss that has it: {having}" if having else ""),
            )
        try:
            entry = check_policy(loss, options)
        except ValueError as error:
            raise UserError(f"align: {error}") from None
        for name in type(align).model_fields:
            used = {*_OWN, "ddof", *of_losses, *(_OF_PPO if is_ppo else ())}
            if name not in used and align.is_changed(name):
                raise UserError(f"align.{name} is not used by {verb}, so it would be ignored", f"remove align.{name}")
        beta = (PPO_BETA if is_ppo else entry.beta) if align.beta is None else align.beta
        _check_models(settings, beta, verb)
        given = {"lowest": align.correction_lowest, "highest": align.correction_highest}
        limits = {name: value for name, value in given.items() if value is not None}
        most = settings.answer_tokens
        replacements = rollout.replace_flat
        if replacements is None:
            replacements = REPLACEMENTS if loss == "dapo" else 0
        in_reward = align.kl_in == "reward" or (align.kl_in is None and is_ppo)
        of_loss, of_reward = (0.0, beta) if in_reward else (beta, 0.0)
        chosen = PolicyOptions(loss, of_loss, most, rollout.temperature, options, align.correction, limits)
        return cls(chosen, of_reward, (advantage, of_advantage), replacements)


def _check_models(settings: Settings, beta: float, verb: str) -> None:
    """Raises UserError if a setting belongs to a model that there is not."""
    align = settings.align
    has = {
        "reference": beta > 0,
        "critic": verb == "ppo",
        "reward": any(reward.model is not None for reward in settings.reward),
    }
    reasons = {
        "reference": ("align.beta is 0, so that there is no reference model", "set align.beta above 0"),
        "critic": (f"{verb} has no critic", "use megavlm ppo"),
        "reward": ("no reward is a model", "add a reward with model"),
    }
    if align.kl_in == "reward" and not beta:
        why, remedy = reasons["reference"]
        raise UserError(
            f"align.kl_in is {quoted(align.kl_in)}, but {why}: it would be ignored", f"remove align.kl_in, or {remedy}"
        )
    for name in align.offload:
        if not has[name]:
            why, remedy = reasons[name]
            raise UserError(
                f"align.offload has {name}, but {why}: it would be ignored", f"remove {name} from it, or {remedy}"
            )

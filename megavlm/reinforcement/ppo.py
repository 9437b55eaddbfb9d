"""`megavlm ppo`: reinforcement learning with a critic, which estimates for each token the rewards to come."""

from megavlm.align.preference_method import check_reference
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.reinforcement.critic import CRITIC, add_critic, bare_critic
from megavlm.reinforcement.grpo import PolicyMethod
from megavlm.reinforcement.policy import Policy
from megavlm.reinforcement.policy_objective import PolicyObjective
from megavlm.reinforcement.policy_step import PolicyStep
from megavlm.reinforcement.ppo_step import PpoStep
from megavlm.reinforcement.rollouts import Rollouts
from megavlm.reinforcement.token_advantages import AdvantageOptions
from megavlm.runtime.session import Session
from megavlm.training.start_weights import StartWeights
from megavlm.training.step import Step


class PpoMethod(PolicyMethod):
    """A training method (see ``training.method.Method``) in which a critic learns beside the policy."""

    verb = "ppo"

    def bare_others(self, session: Session) -> dict[str, Step]:
        return {CRITIC: bare_critic(session)}

    def _others(self, session: Session) -> dict[str, Step]:
        self._critic = add_critic(session)
        return {CRITIC: self._critic}

    def _step(
        self,
        session: Session,
        step: Step,
        rollouts: Rollouts,
        objective: PolicyObjective,
        renderer: Renderer | None,
        start: StartWeights | None,
    ) -> PolicyStep:
        options = advantage_options(session.settings, self._policy)
        return PpoStep(session, step, rollouts, objective, renderer, start, self._critic, options)


def advantage_options(settings: Settings, policy: Policy) -> AdvantageOptions:
    """What defines the advantages of tokens."""
    align = settings.align
    return AdvantageOptions(align.discount, align.gae_lambda, policy.kl_in_reward, align.whiten)


def method(settings: Settings) -> PpoMethod:
    """Makes the method. Raises UserError for settings that do not fit it."""
    if Policy.of(settings, PpoMethod.verb).has_reference:
        check_reference(settings, "ppo with align.beta above 0")
    return PpoMethod(settings)

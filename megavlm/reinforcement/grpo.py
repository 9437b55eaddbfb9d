"""`megavlm grpo`: reinforcement learning from groups of answers that are compared with each other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

from megavlm.align.losses import ADVANTAGES, POLICY_LOSSES, check_policy
from megavlm.align.losses.advantages import options_of as advantage_options
from megavlm.align.preference_method import check_reference
from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.layout import check_prompts
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.reinforcement.divergence import Divergence
from megavlm.reinforcement.engines import make_engine
from megavlm.reinforcement.policy_objective import PolicyObjective, PolicyOptions
from megavlm.reinforcement.policy_step import PolicyStep
from megavlm.reinforcement.reward_models import RewardModels
from megavlm.reinforcement.rollouts import Rollouts
from megavlm.rewards.pool import RewardPool
from megavlm.rollout.answerer import stop_tokens, vision_tokens
from megavlm.rollout.engine import Sampling
from megavlm.runtime.session import Session
from megavlm.training.memory_check import longest_row
from megavlm.training.method import Prepared
from megavlm.training.start_weights import StartWeights
from megavlm.training.step import Step

LOSSES = tuple(name for name in POLICY_LOSSES if name != "ppo")
REPLACEMENTS = 4
"""How often flat groups are replaced with the loss dapo, unless ``rollout.replace_flat`` is set."""
# Settings of the section align that grpo reads beside the options of its loss and advantage.
_OWN = {
    "loss", "advantage", "beta", "kl_in", "updates", "mini_batches", "correction", "correction_lowest",
    "correction_highest", "overlong_cache", "mask_truncated", "offload_reference", "routing_replay",
}  # fmt: skip


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

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """Raises UserError if a setting would be ignored, or is not allowed for the loss."""
        align, rollout = settings.align, settings.rollout
        loss = align.loss or "grpo"
        if loss not in LOSSES:
            raise UserError(f"align.loss is {loss}, which is no loss of grpo", f"choose one of {', '.join(LOSSES)}")
        of_losses = {name for entry in POLICY_LOSSES.values() for name in entry.options}
        options = {name: value for name in sorted(of_losses) if (value := getattr(align, name)) is not None}
        advantage = align.advantage or ("dr_grpo" if loss == "dr_grpo" else "grpo")
        if advantage not in ADVANTAGES:
            allowed = ", ".join(ADVANTAGES)
            raise UserError(f"align.advantage is {advantage}, which is no advantage", f"choose one of {allowed}")
        of_advantage = {} if align.ddof is None else {"ddof": float(align.ddof)}
        for name in of_advantage.keys() - advantage_options(advantage).keys():
            raise UserError(f"align.{name} is set, but align.advantage is {advantage}: it would be ignored",
                            f"remove align.{name}")  # fmt: skip
        for name in options.keys() - POLICY_LOSSES[loss].options.keys():
            having = ", ".join(other for other in LOSSES if name in POLICY_LOSSES[other].options)
            raise UserError(
                f"align.{name} is set, but align.loss is {loss}, which does not have it: it would be ignored",
                f"remove align.{name}, or choose a loss that has it: {having}",
            )
        try:
            entry = check_policy(loss, options)
        except ValueError as error:
            raise UserError(f"align: {error}") from None
        for name in type(align).model_fields:
            if name not in {*_OWN, "ddof", *of_losses} and align.is_changed(name):
                raise UserError(f"align.{name} is not used by grpo, so it would be ignored", f"remove align.{name}")
        beta = entry.beta if align.beta is None else align.beta
        for key, is_set in (("offload_reference", align.offload_reference), ("kl_in", align.kl_in == "reward")):
            if is_set and not beta:
                raise UserError(
                    f"align.{key} is {quoted(getattr(align, key))}, but align.beta is 0, so that there is no reference "
                    "model: it would be ignored",
                    f"remove align.{key}, or set align.beta above 0",
                )
        given = {"lowest": align.correction_lowest, "highest": align.correction_highest}
        limits = {name: value for name, value in given.items() if value is not None}
        most = rollout.max_new_tokens
        replacements = rollout.replace_flat
        if replacements is None:
            replacements = REPLACEMENTS if loss == "dapo" else 0
        in_loss, in_reward = (beta, 0.0) if align.kl_in == "loss" else (0.0, beta)
        chosen = PolicyOptions(loss, in_loss, most, rollout.temperature, options, align.correction, limits)
        return cls(chosen, in_reward, (advantage, of_advantage), replacements)


class PolicyMethod:
    """A training method (see ``training.method.Method``) that learns from answers that the model samples itself."""

    scores = False

    def __init__(self, settings: Settings):
        self._policy = Policy.of(settings)
        loss, (advantage, _) = self._policy.options.loss, self._policy.advantage
        self.title = f"reinforcement learning · {loss}" + (f", advantage {advantage}" if advantage != loss else "")

    def bare_objective(self, session: Session) -> PolicyObjective:
        chunk_tokens = session.settings.train.logprob_chunk_tokens
        return PolicyObjective(self._policy.options, chunk_tokens, session.groups.language)

    def prepare(self, session: Session, heartbeat: Callable[[str], None]) -> Prepared:
        settings, groups = session.settings, session.groups
        prompts = required(settings.rollout.prompts, "rollout.prompts")
        check_prompts(prompts, settings.align.mini_batches, groups.dp_size)
        if settings.rollout.batch_invariant and dist.get_world_size() > 1:
            raise UserError(
                f"rollout.batch_invariant is true, but there are {dist.get_world_size()} processes; bits agree only in "
                "one",
                "start one process, or remove rollout.batch_invariant",
            )
        is_moe = session.shapes.text.moe is not None
        can_replay = is_moe and settings.rollout.engine == "megatron"
        replays = can_replay if settings.align.routing_replay is None else settings.align.routing_replay
        if replays and not is_moe:
            raise UserError(
                "align.routing_replay is true, but the model is not a mixture of experts: it would be ignored",
                "remove align.routing_replay",
            )
        if replays:
            _check_replay(settings)
        renderer, loader, rewards = None, None, None
        if groups.is_leader:
            renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
            most = settings.rollout.max_new_tokens
            loader = build_loader(
                settings.data.model_copy(update={"packing": "none"}),
                Renderer.of_prompts(settings.model.hf, settings.data, most),
                "prompt",
                dp_rank=groups.dp_rank,
                dp_size=groups.dp_size,
                seed=settings.train.seed,
                rows_per_step=prompts // groups.dp_size,
                output=settings.output,
            )
            rewards = RewardPool(settings.reward, settings.reward_pool.workers)
        heartbeat("opening the prompts and the rewards")
        models = RewardModels(session, settings.reward, renderer)
        policy, objective = self._policy, self.bare_objective(session)
        start = StartWeights(session, offload=settings.align.offload_reference) if policy.has_reference else None
        divergence = None
        if start is not None and policy.kl_in_reward:
            divergence = Divergence(session, start, objective, renderer, policy.kl_in_reward)
        heartbeat("loading the reward models and the reference model")

        tokenizer = (renderer or Renderer(settings.model.hf, settings.data)).tokenizer
        stops = stop_tokens(settings.model.hf, tokenizer)

        def make_step(step: Step, rows: Iterator[Row] | None) -> PolicyStep:
            engine = make_engine(
                session,
                decode=tokenizer.decode,
                special=tokenizer.all_special_ids,
                records_routing=replays,
            )
            rollouts = Rollouts(
                session,
                engine,
                _sampling(session, stops),
                renderer,
                loader,
                rows,
                rewards,
                models,
                divergence,
                policy.advantage,
                policy.replacements,
            )
            in_loss = start if policy.options.beta else None
            return PolicyStep(session, step, rollouts, objective, renderer, in_loss)

        updates = settings.align.updates * settings.align.mini_batches
        longest = (lambda: longest_row(renderer)) if renderer is not None else None
        return Prepared(objective, loader, longest, loader, make_step, updates)


def method(settings: Settings) -> PolicyMethod:
    """Makes the method. Raises UserError for settings that do not fit it."""
    if Policy.of(settings).has_reference:
        check_reference(settings, "grpo with align.beta above 0")
    return PolicyMethod(settings)


def _sampling(session: Session, stops: tuple[int, ...]) -> Sampling:
    rollout = session.settings.rollout
    return Sampling(
        rollout.max_new_tokens,
        rollout.temperature,
        rollout.top_p,
        rollout.top_k,
        stop=stops,
        stop_strings=tuple(rollout.stop),
        banned=vision_tokens(session.shapes),
    )


def _check_replay(settings: Settings) -> None:
    """Raises UserError if the experts that the sampler has chosen would not reach every pass of an update."""
    train, remedy = settings.train, ", or set align.routing_replay to false"
    if train.experts.fused_router:
        raise UserError(
            "train.experts.fused_router is true, but this kernel chooses experts by itself, and updates use those that "
            "the sampler has chosen (align.routing_replay)",
            f"set train.experts.fused_router to false{remedy}",
        )
    if settings.parallel.pipeline > 1 and "moe" in train.recompute:
        raise UserError(
            "train.recompute has moe, with which a pipeline stage chooses the experts of a row again while another row "
            "is on its way, and updates use those that the sampler has chosen (align.routing_replay)",
            f"set train.recompute to full or to modules other than moe{remedy}",
        )

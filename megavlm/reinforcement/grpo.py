"""`megavlm grpo`: reinforcement learning from groups of answers that are compared with each other."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist

from megavlm.align.preference_method import check_reference
from megavlm.align.sampling_checks import with_group_size
from megavlm.base.errors import UserError
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.layout.shapes import check_prompts
from megavlm.reinforcement.answer_queue import AnswerQueue
from megavlm.reinforcement.divergence import Divergence
from megavlm.reinforcement.engines import in_turns, make_engine
from megavlm.reinforcement.held_out import OwnRewards
from megavlm.reinforcement.policy import Policy
from megavlm.reinforcement.policy_objective import PolicyObjective
from megavlm.reinforcement.policy_step import PolicyStep
from megavlm.reinforcement.reward_models import RewardModels
from megavlm.reinforcement.rollouts import Rollouts
from megavlm.rewards.pool import RewardPool
from megavlm.rollout.answerer import stop_tokens, vision_tokens
from megavlm.rollout.engine import Sampling
from megavlm.runtime.session import Session
from megavlm.training.memory_check import longest_row
from megavlm.training.method import OneModel, Prepared
from megavlm.training.run import Run
from megavlm.training.start_weights import StartWeights
from megavlm.training.step import Step


class PolicyMethod(OneModel):
    """A training method (see ``training.method.Method``) that learns from answers that the model samples itself."""

    scores = False
    verb = "grpo"

    def __init__(self, settings: Settings):
        self._policy = Policy.of(settings, self.verb)
        loss, (advantage, _) = self._policy.options.loss, self._policy.advantage
        self.title = f"reinforcement learning · {loss}" + (f", advantage {advantage}" if advantage != loss else "")

    def bare_objective(self, session: Session) -> PolicyObjective:
        chunk_tokens = session.settings.train.logprob_chunk_tokens
        return PolicyObjective(self._policy.options, chunk_tokens, session.groups.language)

    def keeps_start(self, settings: Settings) -> bool:
        return self._policy.has_reference

    def prepare(self, session: Session, heartbeat: Callable[[str], None]) -> Prepared:
        settings = session.settings = with_group_size(session.settings, self.verb)
        groups = session.groups
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
            loader = build_loader(
                settings.data.model_copy(update={"packing": "none"}),
                Renderer.of_prompts(settings.model.hf, settings.data, settings.answer_tokens, settings.answer_setting),
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
        self._judge = partial(OwnRewards, session, renderer, models)
        policy, objective = self._policy, self.bare_objective(session)
        start = None
        if self.keeps_start(settings):
            start = StartWeights(session, offload="reference" in settings.align.offload)
        divergence = None
        if start is not None and policy.kl_in_reward and not policy.has_critic:
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
            answering = in_turns(session, engine, renderer)
            queue = AnswerQueue(session, answering, _sampling(session, stops), renderer, loader, rows, rewards)
            rollouts = Rollouts(session, queue, models, divergence, policy.advantage, policy.replacements)
            return self._step(session, step, rollouts, objective, renderer, start)

        updates = settings.align.updates * settings.align.mini_batches
        longest = (lambda: longest_row(renderer)) if renderer is not None else None
        others, idle = self._others(session), settings.align.critic.alone_steps  # 0 without a critic
        return Prepared(objective, loader, longest, loader, make_step, updates, others, idle_steps=idle)

    def held_out_judge(self, run: Run, tokenizer: Any) -> OwnRewards:
        """What answers and judges held-out questions in an evaluation; see ``evaluation.hooks``."""
        return self._judge(tokenizer)

    def _others(self, session: Session) -> dict[str, Step]:
        """What updates the weights of further models, by name; see ``Prepared``."""
        return {}

    def _step(
        self,
        session: Session,
        step: Step,
        rollouts: Rollouts,
        objective: PolicyObjective,
        renderer: Renderer | None,
        start: StartWeights | None,
    ) -> PolicyStep:
        """Makes what the loop calls; ``start`` is the reference model, if there is one."""
        in_loss = start if self._policy.options.beta else None
        return PolicyStep(session, step, rollouts, objective, renderer, in_loss)


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

"""A step of ppo: the policy and the critic learn from the same answers, each with updates of its own."""

import time
from dataclasses import replace

from torch import Tensor

from megavlm.base.heartbeat import beat
from megavlm.data.renderer import Renderer
from megavlm.model.language import LanguageModel
from megavlm.reinforcement.judged import Batch
from megavlm.reinforcement.policy_objective import Known, PolicyObjective
from megavlm.reinforcement.policy_step import PolicyStep, merged
from megavlm.reinforcement.rollouts import Rollouts
from megavlm.reinforcement.token_advantages import (
    AdvantageOptions,
    TokenAdvantages,
    fields_of,
    token_advantages,
    totals,
    whitened,
)
from megavlm.reinforcement.value_objective import KnownValues, ValueObjective
from megavlm.runtime.feed import MicroBatch, StepRows
from megavlm.runtime.kept_frames import sharing_kept
from megavlm.runtime.routing import chosen_anew
from megavlm.runtime.session import Session
from megavlm.training.start_weights import StartWeights
from megavlm.training.step import Step, StepResult


class PpoStep(PolicyStep):
    """Runs steps of ppo on all ranks.

    The critic makes all of its updates first. An update that NaN or infinity prevents in the critic is left out for the
    policy, too.

    Args:
        session, step, rollouts, objective, renderer, start: see ``PolicyStep``.
        critic: updates the weights of the critic; its objective is a ``ValueObjective``.
        options: what defines the advantages.
    """

    def __init__(
        self,
        session: Session,
        step: Step,
        rollouts: Rollouts,
        objective: PolicyObjective,
        renderer: Renderer | None,
        start: StartWeights | None,
        critic: Step,
        options: AdvantageOptions,
    ):
        super().__init__(session, step, rollouts, objective, renderer, start)
        assert isinstance(critic.objective, ValueObjective), "the critic learns values"
        self._critic, self._values, self._options = critic, critic.objective, options

    @property
    def _needs_old(self) -> bool:
        return self._options.kl > 0 or super()._needs_old

    @property
    def is_critic_alone(self) -> bool:
        """Whether in the next step the critic alone learns."""
        align = self._session.settings.align
        wanted = align.critic.alone_steps * align.updates * align.mini_batches
        return self._critic.optimizers.scheduler.num_steps < wanted

    def _learn(self, batch: Batch) -> list[StepResult]:
        is_alone = self.is_critic_alone
        parts = self._parts(batch)
        # The features of the critic's projector are others, so its passes have frames of their own.
        for_critic = [StepRows(rows.hosts, list(rows.full), encoded=[], keys=rows.keys) for rows in parts]
        began = time.perf_counter()
        known = [self._known(rows) for rows in parts]
        with self._critic.awake(), sharing_kept(self._critic.vlm, self._session.vlm), chosen_anew():
            found = [self._advantages(rows, of_rows) for rows, of_rows in zip(for_critic, known, strict=True)]
            sums = totals([row for rows in found for row in rows])
            batch.fields["seconds_values"] = time.perf_counter() - began
            began = time.perf_counter()
            of_critic = self._learn_values(for_critic, found)
        batch.fields["seconds_critic"] = time.perf_counter() - began
        batch.fields |= fields_of(sums.tolist(), has_kl=self._options.kl > 0)
        batch.fields |= _fields_of_critic(of_critic)
        advantages = [
            [whitened(row, sums) if self._options.whiten else row.advantages for row in rows] for rows in found
        ]
        results = []
        for number, critic in enumerate(of_critic):
            at = number % len(parts)
            if is_alone or critic.trouble is not None:
                results.append(self._idle(critic))
                continue
            self._objective.known = [
                replace(one, advantages=of_row)
                for one, of_row in zip(known[at] or [Known()] * len(advantages[at]), advantages[at], strict=True)
            ]
            is_last = number >= len(of_critic) - len(parts)
            results.append(self._step.update(parts[at] if is_last else parts[at].copy()))
            beat("an update of the weights")
        self._objective.known = []
        return results

    def _advantages(self, rows: StepRows, known: list[Known]) -> list[TokenAdvantages]:
        """The advantages of the rows of a mini-batch on the last pipeline stage; [] on the others."""
        found: dict[int, TokenAdvantages] = {}
        context = self._session.groups.language.cp

        def read(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
            values = self._values.outputs(chunk, hidden, micro_batch)
            of_row = known[micro_batch.number] if known else Known()
            found[micro_batch.number] = token_advantages(values, of_row, micro_batch, self._options, context)
            return values

        self._critic.vlm.train(False)
        with self._step.phases("reference"):
            self._critic.look_through(rows, read)
        self._critic.vlm.train()
        return [found[number] for number in sorted(found)]

    def _learn_values(self, parts: list[StepRows], found: list[list[TokenAdvantages]]) -> list[StepResult]:
        """Updates the critic with each mini-batch, as often as the settings say. Returns the results in order."""
        results = []
        updates = self._session.settings.align.updates
        for update in range(updates):
            for rows, of_rows in zip(parts, found, strict=True):
                self._values.known = [KnownValues(row.values, row.returns) for row in of_rows]
                results.append(self._critic.update(rows if update == updates - 1 else rows.copy()))
                beat("an update of the critic")
        self._values.known = []
        return results

    def _idle(self, critic: StepResult) -> StepResult:
        """The result of an update in which the policy learns nothing."""
        trouble = None if critic.trouble is None else f"of the critic, {critic.trouble}"
        names = (*self._objective.sum_names, *self._objective.max_names)
        return replace(
            critic,
            loss=0.0,
            lr=0.0,
            norms=dict.fromkeys(critic.norms, 0.0),
            fields=dict.fromkeys(names),
            trouble=trouble,
        )


def _fields_of_critic(results: list[StepResult]) -> dict[str, float | None]:
    """The means over the updates of the critic that were done, or over all if none was."""
    done = [result for result in results if result.trouble is None] or results
    return {
        "value_loss": sum(result.loss for result in done) / len(done),
        **merged(done, ()),
        "critic_grad_norm": sum(result.norms["grad_norm"] for result in done) / len(done),
        "critic_lr": results[0].lr,
    }

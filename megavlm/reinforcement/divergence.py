"""The divergence from the reference model as a part of the rewards, as in RLOO's paper (2402.14740)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.data.renderer import Renderer
from megavlm.model.language import LanguageModel
from megavlm.reinforcement.answer_rows import AnswerGroup
from megavlm.reinforcement.policy_objective import PolicyObjective
from megavlm.reinforcement.reward_models import of_answers
from megavlm.runtime.feed import MicroBatch
from megavlm.runtime.session import Session
from megavlm.training.start_weights import StartWeights


class Divergence:
    """Computes what the divergence adds to rewards. Create it on all ranks.

    Args:
        session: the session of the run.
        start: the reference model.
        objective: computes log-probabilities.
        renderer: packs the answers, on leaders; None elsewhere.
        weight: ``align.beta``.
    """

    def __init__(
        self,
        session: Session,
        start: StartWeights,
        objective: PolicyObjective,
        renderer: Renderer | None,
        weight: float,
    ):
        self._session, self._start, self._objective, self._renderer = session, start, objective, renderer
        self.weight = weight

    def parts(self, groups: Sequence[AnswerGroup]) -> list[float]:
        """For each answer −k1 = Σ (log π_ref − log π), with the log-probabilities of the sampler as log π.

        Returns:
            The values in order, in nats, without the weight, on leaders; elsewhere []. Call it on all ranks.
        """
        vlm, context = self._session.vlm, self._session.groups.language.cp

        def read(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
            logprobs = self._objective.logprobs(chunk, hidden, micro_batch) * (micro_batch.targets.weights > 0)
            sums = logprobs.new_zeros(micro_batch.host.num_samples)
            sums.index_add_(0, micro_batch.target_samples.flatten(), logprobs.flatten())
            if context.size() > 1:
                dist.all_reduce(sums, group=context)
            return sums

        training = vlm.language[0].training
        with self._start():
            of_reference = of_answers(vlm, groups, self._renderer, self._session.settings, read)
        vlm.train(training)
        sampled = [sum(answer.policy_logprobs) for group in groups for answer in group.answers]
        return (torch.tensor(of_reference, dtype=torch.float64) - torch.tensor(sampled, dtype=torch.float64)).tolist()

"""Reward models as rewards: the ranks of the run score the sampled answers with them."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.config.reward_section import RewardSettings
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.model.language import LanguageModel
from megavlm.model.vlm import VLM
from megavlm.reinforcement.answer_rows import AnswerGroup, answer_rows, on_all_ranks
from megavlm.runtime.feed import Feed, MicroBatch
from megavlm.runtime.forward import forward_only, to_leader
from megavlm.runtime.further_model import has_reward_head
from megavlm.runtime.parking import Parking, parked_model
from megavlm.runtime.scoring import row_rewards
from megavlm.runtime.session import Session
from megavlm.training.objective import Read


class RewardModels:
    """The reward models of a run. Create it on all ranks; the models join the session.

    Args:
        session: the session of the run; a reward model has the same shapes and layout as its main model.
        rewards: the rewards; those that are no models are left out.
        renderer: packs the answers, on leaders; None elsewhere.

    Raises:
        UserError: a folder has no reward head, or is of another model.
    """

    def __init__(self, session: Session, rewards: Sequence[RewardSettings], renderer: Renderer | None):
        self._session, self._renderer = session, renderer
        self._models: dict[str, VLM] = {}
        self._awake: dict[str, Parking] = {}
        for reward in rewards:
            if reward.model is None:
                continue
            path = find_checkpoint(reward.model)
            if not has_reward_head(path, session.shapes):
                raise UserError(
                    f"reward {reward.key}: {path} has no reward head", "give a run of megavlm rm, or a checkpoint of it"
                )
            name = f"reward/{reward.key}"
            self._models[reward.key] = session.add_model(name, path, trained=False, score_head=True).vlm
            if "reward" in session.settings.align.offload:
                self._awake[reward.key] = parked_model(self._models[reward.key], [session.vlm])

    def scores(self, groups: Sequence[AnswerGroup]) -> dict[str, list[float]]:
        """Scores the answers by each model's name, in order, on leaders; elsewhere []. Call it on all ranks."""
        found = {}
        for name, vlm in self._models.items():
            with self._awake.get(name, nullcontext)():
                found[name] = self._of(vlm, groups)
        return found

    def _of(self, vlm: VLM, groups: Sequence[AnswerGroup]) -> list[float]:
        sequence_parallel = self._session.settings.parallel.sequence_parallel

        def read(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
            return row_rewards(chunk, hidden, micro_batch, self._session.groups, sequence_parallel)

        return of_answers(vlm, groups, self._renderer, self._session.settings, read)


def of_answers(
    vlm: VLM, groups: Sequence[AnswerGroup], renderer: Renderer | None, settings: Settings, read: Read
) -> list[float]:
    """Computes a number for each answer, in order, on leaders; elsewhere []. Call it on all ranks.

    Args:
        vlm: the model.
        groups: the answers, on leaders.
        renderer: packs them, on leaders; None elsewhere.
        settings: the settings of the run.
        read: computes a number for each sample of a row, [samples].
    """
    rows = answer_rows(groups, renderer, settings.data.max_patches_per_row) if renderer is not None else []
    step_rows = on_all_ranks(rows, renderer, vlm, None)
    found = torch.zeros(sum(len(group.answers) for group in groups))
    if step_rows is None:
        return []
    for window in Feed(vlm, None).windows(step_rows, settings.parallel.pipeline):
        results = to_leader(vlm, forward_only(vlm, window, read))
        for micro_batch, values in zip(window.micro_batches, results, strict=False):  # none but on the leader
            for annotations, value in zip(micro_batch.host.annotations, values, strict=True):
                if annotations.sampled is not None:
                    found[annotations.sampled.number] = value
    return found.tolist()

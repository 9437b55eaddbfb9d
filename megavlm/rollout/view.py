"""The model as sampling sees it: without context parallelism, whose ranks are further data-parallel ranks here."""

import copy
from dataclasses import replace

from megavlm.layout.frame_balance import RankShare
from megavlm.model.tower_phase import TowerPhase
from megavlm.model.vlm import VLM


def sampling_view(vlm: VLM) -> VLM:
    """Returns a view of a model with the same weights, whose model-parallel groups are TP × PP ranks.

    Its ``groups`` are those of ``Groups.sampling``, and its tower distributes frames within them, also with
    ``vision.balance: world``, since data-parallel ranks encode at different times.
    """
    groups, sampling = vlm.groups, vlm.groups.sampling
    language = copy.copy(groups.language)
    language.cp = groups.tower.cp  # this rank alone
    view = copy.copy(vlm)
    view.parallel = vlm.parallel.model_copy(update={"context": 1})
    view.groups = replace(
        groups, language=language, model_parallel=sampling.model_parallel,
        model_parallel_host=sampling.model_parallel_host, members=sampling.members,
    )  # fmt: skip
    view.sharing = None
    view.tower = TowerPhase(
        vlm.vision, vlm.projector, sampling.model_parallel, _shares(vlm),
        recompute=False, chunk_patches=vlm.tower.chunk_patches,
    )  # fmt: skip
    return view


def _shares(vlm: VLM) -> list[RankShare]:
    """Those of the ranks with context index 0, as the whole row's."""
    ranks = range(vlm.parallel.tensor * vlm.parallel.context * vlm.parallel.pipeline)
    of_row = vlm.shares_of_a_row()
    return [
        replace(of_row[rank], context=1, context_index=0, dp_rank=0)
        for rank in ranks
        if of_row[rank].context_index == 0
    ]

"""Packs sampled answers into rows: answers to one prompt stand side by side and share its frames."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavlm.data.answers import with_answer
from megavlm.data.eval_samples import meaningless_sample
from megavlm.data.packing import best_fit
from megavlm.data.renderer import Renderer
from megavlm.data.row import Annotations, Row, Sample, SampledAnswer, padded_length
from megavlm.model.vlm import VLM
from megavlm.rollout.engine import Answer
from megavlm.runtime.feed import Feed, StepRows


@dataclass(frozen=True)
class AnswerGroup:
    """A prompt, its answers, and their advantages (0 for an answer without a reward).

    ``routing`` has the experts of the prompt's tokens. With it, the rows prescribe those of all tokens.
    """

    prompt: Sample
    answers: Sequence[Answer]
    advantages: Sequence[float]
    routing: torch.Tensor | None = None


def answer_rows(
    groups: Sequence[AnswerGroup], renderer: Renderer, max_patches: int | None, *, mask_truncated: bool = False
) -> list[Row]:
    """Packs groups of answers.

    Args:
        groups: the groups; each prompt with an answer fits in a row.
        renderer: packs the rows.
        max_patches: maximum number of patches in a row; None: no limit.
        mask_truncated: whether answers that were cut off are not learned from.
    """
    units = list(_units(groups, renderer, mask_truncated=mask_truncated))
    lengths = [sum(padded_length(len(s.input_ids), renderer.pad_multiple) for s in unit) for unit in units]
    patches = [int(unit[0].frame_grids.prod(dim=1).sum()) for unit in units]
    rows = []
    while units:
        chosen = best_fit(lengths, renderer.seq_length, patches if max_patches else None, max_patches)
        rows.append(renderer.pack([sample for place in chosen for sample in units[place]]))
        for place in reversed(chosen):
            for values in (units, lengths, patches):
                del values[place]
    return rows


def on_all_ranks(
    rows: list[Row], renderer: Renderer | None, vlm: VLM, window: int | None, *, filled: bool = False
) -> StepRows | None:
    """Sends rows to the ranks of each model-parallel group, as many on each data-parallel rank.

    Args:
        rows: the rows of this data-parallel rank, on its leader; [] elsewhere.
        renderer: makes rows without targets for a rank that has fewer than another; None if this is no leader.
        vlm: the model that will process them.
        window: ``vision.window``.
        filled: whether to make rows without targets if no rank has any row; otherwise the result is None.
    """
    count = torch.tensor([len(rows)])
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=vlm.groups.world_host)
    if not count.item() and not filled:
        return None
    # Interleaved stages need a multiple of the stages in each window.
    multiple = math.lcm(vlm.parallel.pipeline, window or 1) if vlm.parallel.virtual_pipeline else 1
    wanted = max(-(-int(count.item()) // multiple) * multiple, multiple)
    if renderer is not None and len(rows) < wanted:
        rows = rows + [renderer.pack([meaningless_sample(renderer)])] * (wanted - len(rows))
    found = Feed(vlm, iter(rows) if renderer is not None else None).rows(wanted)
    assert found is not None, "there is at least one row"
    return found


def _units(groups: Sequence[AnswerGroup], renderer: Renderer, *, mask_truncated: bool) -> Iterator[list[Sample]]:
    """The samples of each group, cut where they no longer fit in one row. The first of each part has the pixels."""
    number = 0
    for group in groups:
        unit: list[Sample] = []
        used = 0
        for answer, advantage in zip(group.answers, group.advantages, strict=True):
            length = padded_length(len(group.prompt.input_ids) + len(answer.tokens), renderer.pad_multiple)
            if unit and used + length > renderer.seq_length:
                yield unit
                unit, used = [], 0
            logprobs = torch.tensor(answer.policy_logprobs, dtype=torch.float32)
            routing = None if group.routing is None or answer.routing is None else (group.routing, answer.routing)
            sampled = SampledAnswer(advantage=advantage, logprobs=logprobs, number=number, routing=routing)
            is_target = not (mask_truncated and answer.finish == "length")
            annotations = Annotations(sampled=sampled)
            unit.append(
                with_answer(group.prompt, answer.tokens, annotations, is_target=is_target, shares_media=bool(unit))
            )
            used += length
            number += 1
        if unit:
            yield unit

"""Packs sampled answers into rows: answers to one prompt stand side by side and share its frames.

An answer in several turns that has pictures of its own, which its environment has shown, stands by itself: it shares no
frames, so those of its prompt are encoded once more for it, unless a frozen tower has kept them (``frame_keys``).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavlm.data.answers import with_answer, with_targets
from megavlm.data.eval_samples import meaningless_sample
from megavlm.data.packing import best_fit
from megavlm.data.renderer import Renderer
from megavlm.data.row import Annotations, Row, Sample, SampledAnswer, padded_length
from megavlm.model.vlm import VLM
from megavlm.rollout.engine import Answer
from megavlm.runtime.feed import Feed, StepRows
from megavlm.runtime.kept_frames import frame_keys


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
    found.keys = frame_keys(vlm, found.hosts, found.full)
    return found


def _units(groups: Sequence[AnswerGroup], renderer: Renderer, *, mask_truncated: bool) -> Iterator[list[Sample]]:
    """The samples of each group, cut where they no longer fit in one row. The first of each part has the pixels."""
    number = 0
    for group in groups:
        unit: list[Sample] = []
        used = 0
        for answer, advantage in zip(group.answers, group.advantages, strict=True):
            whole = len(group.prompt.input_ids) + len(answer.tokens)
            whole = whole if answer.continued is None else len(answer.continued.input_ids)
            length = padded_length(whole, renderer.pad_multiple)
            is_target = not (mask_truncated and answer.finish == "length")
            annotations = Annotations(sampled=_sampled(group, answer, advantage, number))
            number += 1
            if answer.continued is not None and len(answer.continued.frame_grids) > len(group.prompt.frame_grids):
                yield [with_targets(answer.continued, answer.said or [], annotations, is_target=is_target)]
                continue
            if unit and used + length > renderer.seq_length:
                yield unit
                unit, used = [], 0
            how: dict[str, bool] = {"is_target": is_target, "shares_media": bool(unit)}
            if answer.continued is None:
                unit.append(with_answer(group.prompt, answer.tokens, annotations, **how))
            else:
                unit.append(with_targets(answer.continued, answer.said or [], annotations, **how))
            used += length
        if unit:
            yield unit


def _sampled(group: AnswerGroup, answer: Answer, advantage: float, number: int) -> SampledAnswer:
    """What is known of an answer. Of several turns, the experts are those of the whole conversation."""
    said = answer.said or [True] * len(answer.tokens)
    known = [value for value, is_said in zip(answer.policy_logprobs, said, strict=True) if is_said]
    routing: tuple[torch.Tensor, ...] | None = None
    if answer.routing is not None and answer.continued is not None:
        routing = (answer.routing,)
    elif answer.routing is not None and group.routing is not None:
        routing = (group.routing, answer.routing)
    logprobs = torch.tensor(known, dtype=torch.float32)
    return SampledAnswer(advantage=advantage, logprobs=logprobs, number=number, routing=routing)

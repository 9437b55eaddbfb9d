"""Packs sampled answers into rows: answers to one prompt stand side by side and share its frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megavlm.data.answers import with_answer
from megavlm.data.packing import best_fit
from megavlm.data.renderer import Renderer
from megavlm.data.row import Annotations, Row, Sample, SampledAnswer, padded_length
from megavlm.rollout.engine import Answer


@dataclass(frozen=True)
class Group:
    """A prompt, its answers and their advantages (0 for an answer without a reward)."""

    prompt: Sample
    answers: Sequence[Answer]
    advantages: Sequence[float]


def answer_rows(
    groups: Sequence[Group], renderer: Renderer, max_patches: int | None, *, mask_truncated: bool = False
) -> list[Row]:
    """Packs groups of answers.

    Args:
        groups: the groups; each prompt with an answer fits in a row.
        renderer: packs the rows.
        max_patches: maximum number of patches in a row; None: no limit.
        mask_truncated: whether answers that were cut off are not learned from.
    """
    units = [unit for group in groups for unit in _units(group, renderer, mask_truncated=mask_truncated)]
    lengths = [sum(padded_length(len(s.input_ids), renderer.pad_multiple) for s in unit) for unit in units]
    patches = [len(unit[0].patches) for unit in units]
    rows = []
    while units:
        chosen = best_fit(lengths, renderer.seq_length, patches if max_patches else None, max_patches)
        rows.append(renderer.pack([sample for place in chosen for sample in units[place]]))
        for place in reversed(chosen):
            for values in (units, lengths, patches):
                del values[place]
    return rows


def _units(group: Group, renderer: Renderer, *, mask_truncated: bool) -> Iterator[list[Sample]]:
    """The samples of a group, cut where they no longer fit in one row. The first of each part has the pixels."""
    unit: list[Sample] = []
    used = 0
    for answer, advantage in zip(group.answers, group.advantages, strict=True):
        length = padded_length(len(group.prompt.input_ids) + len(answer.tokens), renderer.pad_multiple)
        if unit and used + length > renderer.seq_length:
            yield unit
            unit, used = [], 0
        known = SampledAnswer(advantage=advantage, logprobs=torch.tensor(answer.policy_logprobs, dtype=torch.float32))
        is_target = not (mask_truncated and answer.finish == "length")
        annotations = Annotations(sampled=known)
        unit.append(with_answer(group.prompt, answer.tokens, annotations, is_target=is_target, shares_media=bool(unit)))
        used += length
    if unit:
        yield unit

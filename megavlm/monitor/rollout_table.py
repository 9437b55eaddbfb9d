"""The table of sampled answers in Weights & Biases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from megavlm.base.errors import UserError
from megavlm.media.access import MediaAccess
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup
from megavlm.sources.previews import looks_like_video, media_of, preview

if TYPE_CHECKING:
    import wandb

PIXELS = 320  # longer side of a picture; W&B stores each table with its pictures


def rollout_table(groups: Sequence[LoggedGroup], access: MediaAccess) -> "wandb.Table":
    """A row for each answer: its prompt with the first picture, and its rewards, one column for each reward.

    A picture that cannot be read is left out.
    """
    import wandb

    rewards = list(dict.fromkeys(name for group in groups for answer in group.answers for name in answer.parts))
    named = [f"reward/{name}" for name in rewards]
    columns = ["sample", "first picture", "question", "reference", "answer", "reward", *named]
    rows = []
    for group in groups:
        picture = _first_picture(group, access)
        shown = None if picture is None else wandb.Image(picture)
        for answer in group.answers:
            parts = [_float(answer.parts.get(name)) for name in rewards]
            rows.append(
                [
                    *(
                        group.sample,
                        shown,
                        group.question,
                        group.reference,
                        _told(answer),
                        _float(answer.reward),
                        *parts,
                    ),
                    *(_float(answer.advantage), answer.tokens, answer.finish, "; ".join(answer.failures)),
                ]
            )
    return wandb.Table(columns=[*columns, "advantage", "tokens", "finish", "failures"], data=rows)


def _told(answer: LoggedAnswer) -> str:
    """The answer or, in several turns, the whole conversation."""
    parts = [
        f"[{turn.by}{f', {count} pictures' if (count := len(turn.pictures) + turn.pictures_left_out) else ''}] "
        f"{turn.text}"
        for turn in answer.turns
    ]
    return "\n".join(parts) or answer.text


def _first_picture(group: LoggedGroup, access: MediaAccess) -> Image.Image | None:
    for named in group.media[:1]:
        try:
            find = media_of(group.sample, access)
            picture = preview(named, looks_like_video(named), find, group.sample)
        except UserError:
            continue
        picture.thumbnail((PIXELS, PIXELS))
        return picture
    return None


def _float(value: Any) -> float | None:
    """A number as W&B wants it: a column is of one type."""
    return None if value is None else float(value)

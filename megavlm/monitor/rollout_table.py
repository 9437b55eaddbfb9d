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
    """A row for each answer: its prompt with its pictures, and its rewards, one column for each picture and reward.

    There are as many columns of pictures as a prompt has at most. A picture that cannot be read is left out.
    """
    import wandb

    rewards = list(dict.fromkeys(name for group in groups for answer in group.answers for name in answer.parts))
    named = [f"reward/{name}" for name in rewards]
    shown = [[picture and wandb.Image(picture) for picture in _pictures(group, access)] for group in groups]
    most = max(map(len, shown), default=0)
    of_pictures = ["picture" if number == 1 else f"picture {number}" for number in range(1, most + 1)]
    columns = ["sample", *of_pictures, "question", "reference", "answer", "reward", *named]
    rows = []
    for group, pictures in zip(groups, shown, strict=True):
        for answer in group.answers:
            parts = [_float(answer.parts.get(name)) for name in rewards]
            rows.append(
                [
                    *(
                        group.sample,
                        *pictures,
                        *[None] * (most - len(pictures)),
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


def _pictures(group: LoggedGroup, access: MediaAccess) -> list[Image.Image | None]:
    """Those of the prompt in their order, of a video the middle frame; None in the place of one that cannot be read."""
    pictures: list[Image.Image | None] = []
    for named in group.media:
        try:
            find = media_of(group.sample, access)
            picture = preview(named, looks_like_video(named), find, group.sample)
        except UserError:
            pictures.append(None)
            continue
        picture.thumbnail((PIXELS, PIXELS))
        pictures.append(picture)
    return pictures


def _float(value: Any) -> float | None:
    """A number as W&B wants it: a column is of one type."""
    return None if value is None else float(value)

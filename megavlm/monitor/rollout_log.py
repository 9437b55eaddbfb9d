"""rollouts.jsonl: answers that were sampled in reinforcement learning, for a reader; a line for each logged step.

held_out_answers.jsonl has those to held-out questions in the same form, a line for each evaluation.

    step                number of the optimizer step, from 1
    groups              up to MAX_GROUPS prompts of the step, each with:
      sample            "file:line" or "shard:number" of the record
      question          the last message that is not the assistant's, without marks of pictures
      media             up to MAX_MEDIA pictures, then videos, as the record names them; of frames, the middle
      reference         the reference answer; null if the record has none
      answers           up to MAX_ANSWERS answers, each with:
        text            the answer as sampled, special tokens included
        reward          weighted sum of its rewards; null if one failed or none applies
        parts           each reward by name; null if it failed or does not apply
        advantage       its advantage in the group; null if it was left out, and with ppo, where tokens have advantages
        tokens          its length in tokens
        finish          "stop", or "length" if it was cut off at rollout.max_new_tokens
        failures        which reward failed, and why
        turns           with an environment, what was said, in order; [] without one. Of each turn:
          by            "model" or "environment"
          text          of the model with special tokens
          pictures      up to MAX_TURN_PICTURES small copies, as data URLs
          pictures_left_out  how many are not in the line
      media_left_out, answers_left_out    how many are not in the line

The file stays small, however long the run is. From longer texts the middle is left out: questions and answers have at
most MAX_TEXT characters, references and failures MAX_SHORT_TEXT. Once the file has MAX_STEPS lines, half of them are
removed, such that the rest are spread over the whole run.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from megavlm.base.atomic_files import write_text
from megavlm.monitor.metrics import append_lines, drop_after, plain, read_lines

FILE_NAME, HELD_OUT_FILE = "rollouts.jsonl", "held_out_answers.jsonl"
# A line thus has at most some 150,000 characters, and the file some 30 million; several times as much with turns.
MAX_STEPS = 200
MAX_GROUPS = 4
MAX_ANSWERS = 16
MAX_MEDIA = 4
MAX_FAILURES = 8
MAX_TEXT = 2000
MAX_SHORT_TEXT = 500
MAX_TURNS = 8  # the first ones
MAX_TURN_TEXT = 500
MAX_TURN_PICTURES = 2
TURN_PICTURE = 64  # pixels of the longer side


@dataclass(frozen=True)
class LoggedTurn:
    """What was said in a conversation; pictures are the bytes of files, and in the file data URLs."""

    by: Literal["model", "environment"]
    text: str
    pictures: Sequence[bytes | str] = ()
    pictures_left_out: int = 0


@dataclass(frozen=True)
class LoggedAnswer:
    """An answer with its rewards; the module describes the fields. Numbers may be scalars of torch or numpy."""

    text: str
    reward: float | None
    parts: Mapping[str, float | None]
    advantage: float | None
    tokens: int
    finish: Literal["stop", "length"]
    failures: Sequence[str] = ()
    turns: Sequence[LoggedTurn] = ()


@dataclass(frozen=True)
class LoggedGroup:
    """A prompt with its answers; the module describes the fields."""

    sample: str
    question: str
    media: Sequence[Any]
    reference: str | None
    answers: Sequence[LoggedAnswer]
    media_left_out: int = 0
    answers_left_out: int = 0


@dataclass(frozen=True)
class LoggedStep:
    """The groups of a step."""

    step: int
    groups: list[LoggedGroup]


_STEP = TypeAdapter(LoggedStep)


class RolloutLog:
    """Appends to rollouts.jsonl of an output folder, or to a file of the same form.

    Args:
        output_dir: the run's folder; it must exist.
        resume_step: the step from which the run continues. Lines of later steps are removed, because these steps will
            be repeated. 0 starts with an empty file.
        enabled: False on all ranks except rank 0; then all calls do nothing.
        name: the name of the file.
        most: the number of groups of a step that are kept.
    """

    def __init__(
        self,
        output_dir: str | Path,
        resume_step: int = 0,
        enabled: bool = True,
        name: str = FILE_NAME,
        most: int = MAX_GROUPS,
    ):
        self.path, self._enabled, self._most, self._num_steps = Path(output_dir) / name, enabled, most, 0
        if enabled:
            drop_after(self.path, resume_step)
            self._num_steps = len(read_lines(self.path))

    def write(self, step: int, groups: Sequence[LoggedGroup]) -> list[LoggedGroup]:
        """Appends the first groups of a step; returns them as they are written.

        Their order should not depend on the answers. If groups come as they are finished, the first ones have the
        shortest answers.

        Raises UserError if the disk is full.
        """
        if not self._enabled:
            return []
        kept = [_shortened(group) for group in groups[: self._most]]
        if self._num_steps >= MAX_STEPS:
            lines = _thinned(read_lines(self.path), MAX_STEPS // 2)
            write_text(self.path, "".join(_json(line) for line in lines))
            self._num_steps = len(lines)
        append_lines(self.path, [_json(asdict(LoggedStep(step, kept)))])
        self._num_steps += 1
        return kept


def held_out_log(output_dir: Path, resume_step: int, most: int, *, enabled: bool) -> RolloutLog:
    """The log of answers to held-out questions; arguments as of ``RolloutLog``."""
    return RolloutLog(output_dir, resume_step, enabled, HELD_OUT_FILE, most)


def read_rollouts(folder: str | Path, name: str = FILE_NAME) -> list[LoggedStep]:
    """The steps in a file ``name`` of a folder, oldest first; none if the file is missing.

    Lines of another form are ignored. Raises UserError if the file cannot be read.
    """
    steps = []
    for line in read_lines(Path(folder) / name):
        with suppress(ValidationError):
            steps.append(_STEP.validate_python(line))
    return steps


def _thinned(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of the lines, the first and the last among them, at about equal distances in steps."""
    kept = list(lines)
    while len(kept) > count:
        # the line whose neighbours are closest to each other
        del kept[min(range(1, len(kept) - 1), key=lambda place: kept[place + 1]["step"] - kept[place - 1]["step"])]
    return kept


def _shortened(group: LoggedGroup) -> LoggedGroup:
    answers = [
        LoggedAnswer(
            text=_cut(answer.text, MAX_TEXT),
            reward=plain(answer.reward),
            parts={name: plain(value) for name, value in answer.parts.items()},
            advantage=plain(answer.advantage),
            tokens=plain(answer.tokens),
            finish=answer.finish,
            failures=[_cut(failure, MAX_SHORT_TEXT) for failure in answer.failures[:MAX_FAILURES]],
            turns=[_shortened_turn(turn) for turn in answer.turns[:MAX_TURNS]],
        )
        for answer in group.answers[:MAX_ANSWERS]
    ]
    return replace(
        group,
        question=_cut(group.question, MAX_TEXT),
        media=[_middle_frame(named) for named in group.media[:MAX_MEDIA]],
        reference=None if group.reference is None else _cut(group.reference, MAX_SHORT_TEXT),
        answers=answers,
        media_left_out=max(len(group.media) - MAX_MEDIA, 0),
        answers_left_out=max(len(group.answers) - MAX_ANSWERS, 0),
    )


def _shortened_turn(turn: LoggedTurn) -> LoggedTurn:
    shown = [url for picture in turn.pictures[:MAX_TURN_PICTURES] if (url := _small(picture)) is not None]
    return LoggedTurn(turn.by, _cut(turn.text, MAX_TURN_TEXT), shown, len(turn.pictures) - len(shown))


def _small(picture: bytes | str) -> str | None:
    """A small copy of a picture as a data URL; None if it cannot be read."""
    if isinstance(picture, str):
        return picture
    from megavlm.media.decode import upright_rgb  # here, because it imports torch, which a report does without

    try:
        with Image.open(io.BytesIO(picture)) as image:
            small = Image.fromarray(upright_rgb(image).permute(1, 2, 0).numpy())
    except Exception:  # whatever a decoder raises; that the environment failed is told elsewhere
        return None
    small.thumbnail((TURN_PICTURE, TURN_PICTURE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _middle_frame(named: Any) -> Any:
    """A video that is a list of frames with its middle frame alone; any other entry of a record's media as it is."""
    if isinstance(named, dict):
        return named | {"frames": _middle_frame(named.get("frames"))}
    return [named[len(named) // 2]] if isinstance(named, list) and named else named


def _cut(text: str, most: int) -> str:
    """A text without its middle if it is longer than `most` characters: the end often has the result.

    Halves of surrogate pairs, which no file can contain, become question marks.
    """
    if len(text) > most:
        kept = most - 80  # characters for the remark
        head, tail = text[: kept * 2 // 3], text[len(text) - kept // 3 :]
        text = f"{head}\n[… {len(text) - len(head) - len(tail):,} characters are left out here …]\n{tail}"
    return text.encode("utf-8", "replace").decode("utf-8")


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"

"""AnsweredQuestion answers of a report: what was asked, what the reference says, what each checkpoint answered."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from megavlm.base.errors import UserError
from megavlm.data.files import beside
from megavlm.data.media import Find, find_picture, find_video
from megavlm.data.records import check_record

FILE_NAME = "answers.jsonl"
ACCURACY_FILE = "accuracy.json"
MAX_SAMPLES = 24  # shown of one data file
MAX_WRONG = 8  # of those, at most so many that the newest checkpoint got wrong
MAX_PICTURES = 4  # of one sample
THUMBNAIL_PIXELS = 320  # of the longer side; shown at half of it, for sharp displays


@dataclass
class AnswerSource:
    """The answers of one checkpoint to one data file.

    Attributes:
        name: heading, the name of the folder.
        folder: holds answers.jsonl, and accuracy.json where somebody has counted better than "equal to the reference".
        eval_file: the questions; None where the folder does not say, or the file is gone.
        answers: index in the data file → answer.
        right, total: answers equal to the reference, and answers that have one.
        accuracy: share that is right, from accuracy.json, else right / total; None without any reference.
    """

    name: str
    folder: Path
    eval_file: Path | None
    answers: dict[int, str]
    right: int = 0
    total: int = 0
    accuracy: float | None = None


@dataclass
class AnsweredQuestion:
    """One question with its answers, ready for the page. `answers`: (text, is it right or None) per source."""

    index: int
    question: str = ""
    reference: str | None = None
    answers: list[tuple[str | None, bool | None]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # data URLs
    note: str = ""


@dataclass
class AnswerGroup:
    """All sources that answered the same data file, oldest checkpoint first, and the samples chosen to be shown."""

    eval_file: Path | None
    sources: list[AnswerSource]
    samples: list[AnsweredQuestion]


def read_source(folder: Path, eval_file: Path | None) -> AnswerSource | None:
    """The answers in `folder`; None where there are none (a file of that name may be of another make)."""
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    answers = {}
    try:
        for line in filter(str.strip, file.read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            answers[entry["index"]] = entry["answer"]
    except (ValueError, KeyError, TypeError):
        return None
    return AnswerSource(folder.absolute().name, folder, eval_file, answers) if answers else None


def group_answers(sources: Sequence[AnswerSource]) -> list[AnswerGroup]:
    """Counts what is right, and chooses and renders the samples to show, for each data file."""
    groups = []
    for eval_file in dict.fromkeys(source.eval_file for source in sources):
        members = [source for source in sources if source.eval_file == eval_file]
        references = {}
        for index, record in _records(eval_file):
            if (reference := reference_of(record)) is not None:
                references[index] = reference
        for source in members:
            _count(source, references)
        chosen = _choose(members[-1].answers, references)
        records = {index: record for index, record in _records(eval_file) if index in chosen}
        samples = [_sample(index, records.get(index), eval_file, members, references) for index in chosen]
        groups.append(AnswerGroup(eval_file, members, samples))
    return groups


def reference_of(record: Any) -> str | None:
    """The expected answer: the assistant messages at the end, else a field `answer`; None where there is none."""
    if not isinstance(record, dict):
        return None
    texts: list[str] = []
    for message in reversed(record.get("messages") or []):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            break
        texts.insert(0, _text(message.get("content")))
    if texts:
        return "\n".join(texts).strip()
    answer = record.get("answer")
    return str(answer) if isinstance(answer, str | int | float) else None


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer equals the reference, apart from case, white space and a full stop at the end."""
    return _normal(answer) == _normal(reference)


def thumbnail(picture: Image.Image) -> str:
    """A picture as a data URL of at most THUMBNAIL_PIXELS: PNG where it is tiny, JPEG otherwise."""
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    is_tiny = max(picture.size) <= 96
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = io.BytesIO()
    picture.save(data, "PNG" if is_tiny else "JPEG", **({} if is_tiny else {"quality": 80}))
    kind = "png" if is_tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _records(file: Path | None) -> Iterator[tuple[int, Any]]:
    """(index, parsed line) of each line that is not blank; None for one that does not parse."""
    if file is None:
        return
    index = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                yield index, json.loads(line)
            except ValueError:
                yield index, None
            index += 1


def _count(source: AnswerSource, references: dict[int, str]) -> None:
    judged = [is_right(answer, references[i]) for i, answer in source.answers.items() if i in references]
    source.right, source.total = sum(judged), len(judged)
    source.accuracy = source.right / source.total if judged else None
    counted = source.folder / ACCURACY_FILE
    if counted.is_file():
        content = json.loads(counted.read_text(encoding="utf-8"))
        source.accuracy = float(content["accuracy"] if isinstance(content, dict) else content)


def _choose(answers: dict[int, str], references: dict[int, str]) -> list[int]:
    """Indices to show, in order: some wrong ones, and the rest spread evenly over the others."""
    is_wrong = {i: i in references and not is_right(answer, references[i]) for i, answer in answers.items()}
    wrong = _spread([i for i in answers if is_wrong[i]], MAX_WRONG)
    others = [i for i in answers if not is_wrong[i]]
    return sorted(wrong + _spread(others, MAX_SAMPLES - len(wrong)))


def _spread(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _sample(
    index: int, record: Any, file: Path | None, sources: Sequence[AnswerSource], references: dict[int, str]
) -> AnsweredQuestion:
    reference = references.get(index)
    sample = AnsweredQuestion(index, reference=reference)
    for source in sources:
        answer = source.answers.get(index)
        judged = answer is not None and reference is not None
        sample.answers.append((answer, is_right(answer, reference) if judged else None))
    if record is None:
        return sample
    source = f"{file}, sample {index}"
    try:
        checked = check_record(record, "prompt" if "messages" in record else "pretrain", source)
        asked = checked.text or next(m["content"] for m in reversed(checked.messages) if m["role"] != "assistant")
        sample.question = _text(asked)
    except UserError as error:
        sample.note = str(error)
        return sample
    media = [(name, False) for name in checked.images] + [(name, True) for name in checked.videos]
    if len(media) > MAX_PICTURES:
        sample.note = f"{MAX_PICTURES} of {len(media)} pictures and videos"
    for named, is_video in media[:MAX_PICTURES]:
        try:
            sample.pictures.append(thumbnail(_picture(named, is_video, partial(beside, file), source)))
        except UserError as error:
            sample.note = str(error)
    return sample


def _picture(named: Any, is_video: bool, find: Find, source: str) -> Image.Image:
    """The picture, or the middle frame of the video."""
    if is_video:
        video = find_video(named, find, source, sampled_fps=1.0)
        middle = video.probe().total_num_frames // 2
        pixels = video.pixels(np.array([middle]))[0]
    else:
        pixels = find_picture(named, find, source).pixels()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _text(content: Any) -> str:
    """The text of a message's content; marks of pictures are left out."""
    if isinstance(content, list):
        content = " ".join(part.get("text", "") for part in content if isinstance(part, dict))
    text = content if isinstance(content, str) else ""
    return text.replace("<image>", "").replace("<video>", "").strip()


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")

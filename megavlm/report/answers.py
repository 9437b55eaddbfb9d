"""The answers in a report: the questions, the reference answers, and the answers of each checkpoint."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json, read_json
from megavlm.media.access import ANY_LOCAL_FILE, MediaAccess
from megavlm.records.questions import question_of, reference_of
from megavlm.records.records import check_record
from megavlm.sources.previews import preview

FILE_NAME = "answers.jsonl"
NOTE_FILE = "answers.json"
ACCURACY_FILE = "accuracy.json"
MAX_SAMPLES = 24  # number of samples of one data file that are shown
MAX_WRONG = 8  # how many of these may be ones that the newest checkpoint answered wrongly
MAX_PICTURES = 4  # number of pictures of one sample
THUMBNAIL_PIXELS = 320  # longer side of a thumbnail; it is displayed at half this size, for high-resolution displays


@dataclass
class AnswerSource:
    """The answers of one checkpoint to one data file.

    Attributes:
        name: the heading, which is the name of the folder.
        folder: the folder of answers.jsonl. It may also contain accuracy.json, with an accuracy from a better criterion
            than "equal to the reference".
        eval_file: the file of the questions; None if the folder does not name it or the file does not exist.
        answers: index in the data file → its answers, several with ``generate.samples`` above 1.
        weights: what the answers were made from, in words.
        is_own: whether that is a checkpoint of the run that the report is about.
        access: which pictures the data file may name.
        judged: the accuracy in accuracy.json; None if there is none.
        right: number of answers that are equal to the reference.
        total: number of answers for which there is a reference.
        accuracy: the share of right answers, from accuracy.json, otherwise right / total; None without references.
    """

    name: str
    folder: Path
    eval_file: Path | None
    answers: dict[int, list[str]]
    weights: str = ""
    is_own: bool = True
    access: MediaAccess = ANY_LOCAL_FILE
    judged: float | None = None
    right: int = 0
    total: int = 0
    accuracy: float | None = None


@dataclass
class AnsweredQuestion:
    """One question with its answers for the page.

    Attributes:
        index: index in the data file.
        question: the question; "" if unknown.
        reference: the reference answer, if any.
        answers: for each source its answers as (text, whether it is right); None if unknown, [] if there are none.
        pictures: data URLs of the pictures.
        note: a remark shown below the sample.
    """

    index: int
    question: str = ""
    reference: str | None = None
    answers: list[list[tuple[str, bool | None]]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class AnswerGroup:
    """All sources with answers to the same data file, oldest checkpoint first, and the samples that are shown."""

    eval_file: Path | None
    sources: list[AnswerSource]
    samples: list[AnsweredQuestion]

    @property
    def own(self) -> AnswerSource | None:
        """The newest answers of the run that the report is about, if their accuracy is known."""
        return next((s for s in reversed(self.sources) if s.is_own and s.accuracy is not None), None)

    @property
    def before(self) -> AnswerSource | None:
        """The oldest answers that were not given by this run, if their accuracy is known."""
        return next((s for s in self.sources if not s.is_own and s.accuracy is not None), None)


def read_note(folder: Path) -> dict[str, Any] | None:
    """What the answers in ``folder`` were made from, as `megavlm infer` recorded it; None if it did not.

    Raises UserError if the file is damaged.
    """
    file = folder / NOTE_FILE
    if not file.is_file():
        return None
    note = read_json(file, "delete the file, and run megavlm infer again")
    if not all(isinstance(note.get(part), dict) for part in ("weights", "data")):
        raise UserError(f"{file} does not say what the answers were made from", "run megavlm infer again")
    return note


def read_source(
    folder: Path,
    eval_file: Path | None,
    access: MediaAccess = ANY_LOCAL_FILE,
    *,
    weights: str = "",
    is_own: bool = True,
) -> AnswerSource | None:
    """The answers in `folder` to the questions of a file; None if there are none.

    Raises UserError if answers.jsonl or accuracy.json of the folder is damaged.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    answers = _answers(file)
    if not answers:
        return None
    return AnswerSource(folder.absolute().name, folder, eval_file, answers, weights, is_own, access, _judged(folder))


def _answers(file: Path) -> dict[int, list[str]]:
    answers: dict[int, list[str]] = {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")  # an answer may have other line ends
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", "check its permissions") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entry = parse_json(line)
                index, several = entry["index"], entry["answers"] if "answers" in entry else [entry["answer"]]
                is_one = isinstance(index, int) and isinstance(several, list)
                is_one = is_one and all(isinstance(answer, str) for answer in several)
            except (ValueError, KeyError, TypeError):
                is_one = False
            if not is_one:
                raise UserError(f"{file}:{number}: not an answer with its index", "repair the file")
            answers[index] = several
    return answers


def _judged(folder: Path) -> float | None:
    file = folder / ACCURACY_FILE
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        share = float(content["accuracy"] if isinstance(content, dict) else content)
        if not math.isfinite(share):
            raise ValueError("not a share")
        return share
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        cause = error.strerror if isinstance(error, OSError) else 'it is neither a number nor {"accuracy": number}'
        raise UserError(f"{file} cannot be read: {cause}", "repair or delete the file") from None


def group_answers(sources: Sequence[AnswerSource]) -> list[AnswerGroup]:
    """For each data file, counts the right answers, and chooses and renders the samples to show."""
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


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer equals the reference, ignoring case, white space and a full stop at the end."""
    return _normal(answer) == _normal(reference)


def thumbnail(picture: Image.Image) -> str:
    """A picture as a data URL, with at most THUMBNAIL_PIXELS per side: PNG if it is tiny, otherwise JPEG."""
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    is_tiny = max(picture.size) <= 96
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = io.BytesIO()
    picture.save(data, "PNG" if is_tiny else "JPEG", **({} if is_tiny else {"quality": 80}))
    kind = "png" if is_tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _records(file: Path | None) -> Iterator[tuple[int, Any]]:
    """(index, parsed line) for each line that is not blank; None instead of the parsed line if it is not valid JSON."""
    if file is None:
        return
    index = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                yield index, parse_json(line)
            except ValueError:
                yield index, None
            index += 1


def _count(source: AnswerSource, references: dict[int, str]) -> None:
    known = {i: answers for i, answers in source.answers.items() if i in references}
    judged = [is_right(answer, references[i]) for i, answers in known.items() for answer in answers]
    source.right, source.total = sum(judged), len(judged)
    source.accuracy = source.right / source.total if judged else None
    if source.judged is not None:
        source.accuracy = source.judged


def _choose(answers: dict[int, list[str]], references: dict[int, str]) -> list[int]:
    """The sorted indices to show: some of questions with a wrong answer, and evenly spaced others."""
    is_wrong = {
        i: i in references and not all(is_right(answer, references[i]) for answer in several)
        for i, several in answers.items()
    }
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
        texts = source.answers.get(index, [])
        sample.answers.append([(text, None if reference is None else is_right(text, reference)) for text in texts])
    if record is None or file is None:
        return sample
    name = f"{file}, sample {index}"
    try:
        checked = check_record(record, "prompt" if "messages" in record else "pretrain", name)
        sample.question = question_of(checked)
    except UserError as error:
        sample.note = str(error)
        return sample
    media = [(name, False) for name in checked.images] + [(name, True) for name in checked.videos]
    if len(media) > MAX_PICTURES:
        sample.note = f"{MAX_PICTURES} of {len(media)} pictures and videos are shown"
    find = partial(sources[-1].access.find, str(file), name)
    for named, is_video in media[:MAX_PICTURES]:
        try:
            sample.pictures.append(thumbnail(preview(named, is_video, find, name)))
        except UserError as error:
            sample.note = str(error)
    return sample


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")

"""What `megavlm score` writes to find bad data: the samples by their loss per token, with `--worst` as a page with
their pictures, with `--each` as a list of all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.base.atomic_files import write_text
from megavlm.data.answer_groups import separate_answers
from megavlm.data.draft import Draft
from megavlm.data.renderer import Renderer
from megavlm.inspection.data_page import text_of
from megavlm.inspection.sample_cards import LEVELS, Card, make_card, shots_of
from megavlm.report.page import render_page
from megavlm.sources.open_files import SampleFile

TEMPLATE = "worst.html.jinja"
_WORDS = 60  # characters of a question or an answer on the terminal


_OF_LIST = ("index", "sample", "side", "loss", "tokens")  # fields of a line of ``write_each``


def worst_of(lines: Sequence[dict[str, Any]], count: int | None = None) -> list[dict[str, Any]]:
    """The ``count`` lines, or all, of scores.jsonl with targets that have the highest loss, highest first."""
    return sorted((line for line in lines if line["tokens"]), key=lambda line: line["loss"], reverse=True)[:count]


def write_each(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes the loss of every sample with targets, highest first, from lines of scores.jsonl."""
    short = ({name: line[name] for name in _OF_LIST if name in line} for line in worst_of(lines))
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in short))


def told(line: dict[str, Any]) -> str:
    """A line of scores.jsonl on the terminal: its loss per token, its place, question and answer."""
    said = [" ".join(str(line.get(field, "")).split()) for field in ("question", "reference")]
    short = [text if len(text) <= _WORDS else f"{text[: _WORDS - 1]}…" for text in said]
    side = f", {line['side']}" if "side" in line else ""
    return f"{line['loss']:8.4f}  {line['sample']}{side} · " + " → ".join(filter(None, short))


def write_worst(
    path: Path, worst: Sequence[dict[str, Any]], total: int, file: SampleFile, renderer: Renderer, weights: str
) -> None:
    """Writes the page.

    Args:
        path: the file to write.
        worst: lines of scores.jsonl, from ``worst_of``.
        total: the number of samples among which they are the worst.
        file: the data file that was scored.
        renderer: the renderer with which it was.
        weights: what was loaded, in words.
    """
    cards = [_card(line, file, renderer) for line in worst]
    page = render_page(TEMPLATE, {"text_of": text_of}, cards=cards, total=total, levels=LEVELS, weights=weights)
    write_text(path, page)


def _card(line: dict[str, Any], file: SampleFile, renderer: Renderer) -> Card:
    details = f"loss per token {line['loss']:.4f}, {line['tokens']:,} targets"
    try:
        draft = _draft(line, file, renderer)
        card = make_card(draft, shots_of(draft, renderer), renderer, [-logprob for logprob in line["logprobs"]])
    except MemoryError:
        raise
    except Exception as error:  # the file has changed since it was scored
        return Card(line["sample"], details, [], [], note=f"it can no longer be read: {error}", title="")
    card.details, card.title = details, line.get("side", "")
    return card


def _draft(line: dict[str, Any], file: SampleFile, renderer: Renderer) -> Draft:
    record, find = file.read(line["index"])
    answers = dict(separate_answers(record, line["sample"]))
    return renderer.draft(answers[line.get("side")], find, line["sample"], kind="tune", index=line["index"])

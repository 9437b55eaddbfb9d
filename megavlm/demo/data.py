"""The pictures, questions and texts of the demo, which are all taken from installed packages.

- 1,797 handwritten digits (scikit-learn) of 8 x 8 grey levels, enlarged to 32 x 32 pixels, which is one visual token.
  They are used in questions with answers, captions, and series of pictures in documents. 360 of the digits are held
  out: they appear only in `heldout.jsonl`.
- 21 photographs with captions (scikit-image, scikit-learn) of at most 128 x 128 pixels: up to 16 visual tokens.
- English prose: scikit-learn's descriptions of its data sets.
"""

import json
import os
import random
from collections.abc import Iterable
from importlib.resources import files
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from megavlm.base.new_output import new_folder
from megavlm.demo.photographs import PHOTOGRAPHS, load_photograph

NUM_HELDOUT = 360
DIGIT_PIXELS = 32
VIEWS_PER_DIGIT = 4  # the original picture, and slightly rotated, scaled and shifted copies
PHOTOGRAPH_PIXELS = 128
# Lengths in characters. A document must fit into one row of its stage; tests/demo/test_data.py compares token counts
# with configs/demo.
PARAGRAPH_CHARS, DOCUMENT_PROSE_CHARS, LONG_DOCUMENT_PROSE_CHARS = 600, 800, 3000
NUM_DOCUMENTS, NUM_LONG_DOCUMENTS = 300, 60

# All descriptions except two that consist of code and tables.
DESCRIPTIONS = (
    "breast_cancer", "california_housing", "covtype", "diabetes", "digits", "iris", "lfw", "linnerud", "olivetti_faces",
    "rcv1", "species_distributions", "wine_data",
)  # fmt: skip
QUESTIONS = ("Which digit is this?", "What number do you see?", "Read the handwritten digit.")
CAPTIONS = ("A handwritten {digit}.", "The digit {digit}.")
# The files that `write_data` writes: the training data, and the questions that are not used for training.
TRAIN_FILES = ("digit_captions", "photograph_captions", "text", "documents", "long_documents", "questions")
HELDOUT_FILE = "heldout"


def write_data(out: str | os.PathLike, seed: int = 0, num_heldout: int = NUM_HELDOUT) -> Path:
    """Write the pictures (PNG) and the JSONL files of the demo to the new folder `out`, and return its path.

    digit_captions, photograph_captions   {"text": "<image>…", "images": [one]}
    text                                  {"text": …}
    documents, long_documents             {"text": "…<image>…<image>…", "images": [several]}
    questions, heldout                    {"messages": [user with <image>, assistant: one digit], "images": [one]}

    Picture paths are relative to the files. The same seed gives the same bytes. ``num_heldout`` of the 1,797 digits are
    in `heldout` alone.

    Raises UserError if `out` exists already.
    """
    out = Path(out)
    with new_folder(out, overwrite=False, mark=f"{HELDOUT_FILE}.jsonl") as unfinished:
        rng = random.Random(seed)
        train, heldout = _write_digits(unfinished, rng, num_heldout)
        photographs = _write_photographs(unfinished)
        prose = _prose()
        records = {
            "digit_captions": [_captioned(path, rng.choice(CAPTIONS).format(digit=digit)) for path, digit in train],
            "photograph_captions": [_captioned(path, text) for path, captions in photographs for text in captions],
            "text": [{"text": text} for text in _pieces(prose, PARAGRAPH_CHARS)],
            "documents": _documents(rng, prose, photographs, train, NUM_DOCUMENTS, DOCUMENT_PROSE_CHARS),
            "long_documents": _documents(rng, prose, photographs, train, NUM_LONG_DOCUMENTS, LONG_DOCUMENT_PROSE_CHARS),
            "questions": [_question(path, rng.choice(QUESTIONS), digit) for path, digit in train],
            HELDOUT_FILE: [_question(path, QUESTIONS[0], digit) for path, digit in heldout],
        }
        for name, lines in records.items():
            write_records(unfinished / f"{name}.jsonl", lines)
    return out


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[dict]:
    """All records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_texts(folder: str | os.PathLike) -> list[str]:
    """All training texts of a folder from `write_data` without the picture marks, as a corpus for a tokenizer."""
    texts = []
    for name in TRAIN_FILES:
        for record in read_records(Path(folder) / f"{name}.jsonl"):
            parts = [record["text"]] if "text" in record else [turn["content"] for turn in record["messages"]]
            texts += [part.replace("<image>", "") for part in parts]
    return texts


def _write_digits(
    out: Path, rng: random.Random, num_heldout: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Write the pictures; return (path, digit) of the training views and of the held-out pictures."""
    digits = load_digits()
    order = list(range(len(digits.target)))
    rng.shuffle(order)
    heldout = set(order[:num_heldout])
    (out / "digits").mkdir(parents=True)
    views: list[tuple[str, int]] = []
    questions: list[tuple[str, int]] = []
    for i, (levels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        small = Image.fromarray(np.uint8(np.round(levels * (255 / 16))))
        picture = small.resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)
        for view in range(1 if i in heldout else VIEWS_PER_DIGIT):
            path = f"digits/{i:04d}_{view}.png"
            (picture if view == 0 else _moved(picture, rng)).save(out / path)
            (questions if i in heldout else views).append((path, int(digit)))
    return views, questions


def _moved(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture rotated by up to 10 degrees, scaled by up to 10 % and shifted by up to 2 pixels, on black."""
    scale, centre = rng.uniform(0.9, 1.1), DIGIT_PIXELS / 2
    angle = np.deg2rad(rng.uniform(-10, 10))
    a, b = np.cos(angle) / scale, np.sin(angle) / scale
    dx, dy = (rng.uniform(-2, 2) for _ in range(2))
    x, y = centre + dx, centre + dy  # the new position of the centre
    coefficients = (a, b, centre - a * x - b * y, -b, a, centre + b * x - a * y)
    return picture.transform(picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def _write_photographs(out: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Write the photographs; return (path, captions) of each."""
    (out / "photographs").mkdir()
    paths = []
    for name, (_, _, captions) in PHOTOGRAPHS.items():
        path = f"photographs/{name.replace(' ', '_')}.png"
        load_photograph(name, PHOTOGRAPH_PIXELS).save(out / path)
        paths.append((path, captions))
    return paths


def _prose() -> list[str]:
    """The lines of scikit-learn's descriptions of its data sets, without lines of markup."""
    texts = [files("sklearn.datasets.descr").joinpath(f"{name}.rst").read_text("utf-8") for name in DESCRIPTIONS]
    lines = [line.rstrip() for text in texts for line in text.splitlines()]
    return [line for line in lines if not line.strip().startswith((".. ", "---", "===", "***"))]


def _pieces(lines: list[str], num_chars: int) -> list[str]:
    """Join whole lines to pieces of at most `num_chars` characters; a longer line is a piece of its own."""
    pieces = [""]
    for line in lines:
        if len(pieces[-1]) + len(line) + 1 > num_chars:
            pieces.append("")
        pieces[-1] += line + "\n"
    return [piece.strip() for piece in pieces if piece.strip()]


def _captioned(path: str, caption: str) -> dict:
    return {"text": f"<image>{caption}", "images": [path]}


def _question(path: str, question: str, digit: int) -> dict:
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": str(digit)}]
    return {"messages": turns, "images": [path]}


def _documents(
    rng: random.Random,
    prose: list[str],
    photographs: list[tuple[str, tuple[str, ...]]],
    digits: list[tuple[str, int]],
    num_documents: int,
    num_chars: int,
) -> list[dict]:
    """Documents with about `num_chars` characters, in which photographs and rows of digits follow each paragraph.

    A row of digits is a series of pictures, each followed by its digit. There are one photograph and ten digits per 200
    characters of prose.
    """
    paragraphs = _pieces(prose, 200)
    documents = []
    for number in range(num_documents):
        parts = [f"Document {number + 1}"]
        images: list[str] = []
        start = rng.randrange(len(paragraphs))
        for i in count():
            parts.append(paragraphs[(start + i) % len(paragraphs)])
            path, captions = rng.choice(photographs)
            parts.append(f"<image>{rng.choice(captions)}")
            row = rng.choices(digits, k=10)
            parts.append("".join(f"<image>{digit}" for _, digit in row))
            images += [path, *(path for path, _ in row)]
            if sum(map(len, parts)) > num_chars:
                break
        documents.append({"text": "\n\n".join(parts), "images": images})
    return documents

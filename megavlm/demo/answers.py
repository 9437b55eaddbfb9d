"""Answers to the held-out questions: reads and counts them, and has others answer the questions for comparison."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from megavlm.demo.data import read_records
from megavlm.demo.vllm_answers import vllm_python, vllm_tokens

BATCH_SIZE = 60


def expected_answers(questions: Path) -> list[str]:
    """The assistant's answer in each record of a file of conversations."""
    return [record["messages"][-1]["content"] for record in read_records(questions)]


def read_answers(answers: Path, num_questions: int) -> list[str]:
    """The answers of an answers.jsonl. Raises ValueError unless there is one for each question, in order."""
    records = read_records(answers)
    indices = [record["index"] for record in records]
    if indices != list(range(num_questions)):
        raise ValueError(
            f"{answers} has {len(indices)} answers, to questions {indices[:3]}…; expected {num_questions} in order"
        )
    return [record["answer"] for record in records]


def count_right(answers: list[str], expected: list[str]) -> int:
    """The number of answers that equal the expected answers, ignoring white space around them."""
    return sum(answer.strip() == right for answer, right in zip(answers, expected, strict=True))


def accuracy_of(folder: Path, questions: Path) -> float:
    """The share of right answers in the answers.jsonl of a folder. Raises ValueError as `read_answers`."""
    expected = expected_answers(questions)
    return count_right(read_answers(folder / "answers.jsonl", len(expected)), expected) / len(expected)


def transformers_answers(folder: Path, questions: Path, max_new_tokens: int) -> list[str]:
    """Greedy answers of `Qwen3VLForConditionalGeneration` from a Hugging Face folder, in fp32.

    The records of `questions` end with an assistant turn, which is not shown to the model.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, answers = _prompts(processor, questions), []
    for start in range(0, len(prompts), BATCH_SIZE):
        some = prompts[start : start + BATCH_SIZE]
        pictures = [[Image.open(path) for path in prompt["images"]] for prompt in some]
        batch = processor(text=[prompt["text"] for prompt in some], images=pictures, padding=True, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        tokens = tokens[:, batch["input_ids"].shape[1] :]
        answers += processor.batch_decode(tokens, skip_special_tokens=True)
    return answers


def vllm_answers(folder: Path, questions: Path, max_new_tokens: int) -> list[str] | None:
    """As `transformers_answers`, with the vLLM that `make vllm` installs; None if it is not installed."""
    if (python := vllm_python()) is None:
        return None
    processor = AutoProcessor.from_pretrained(folder)
    tokens = vllm_tokens(python, folder, _prompts(processor, questions), max_new_tokens)
    return [processor.decode(answer, skip_special_tokens=True) for answer in tokens]


def _prompts(processor: Any, questions: Path) -> list[dict[str, Any]]:
    """The `text` of each question as the model reads it, and the paths of its `images`."""
    prompts = []
    for record in read_records(questions):
        turns = [{"role": turn["role"], "content": _parts(turn["content"])} for turn in record["messages"][:-1]]
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append({"text": text, "images": [str(questions.parent / path) for path in record["images"]]})
    return prompts


def _parts(content: str) -> list[dict[str, str]]:
    """Text with `<image>` marks as a list of parts for the chat template."""
    first, *rest = content.split("<image>")
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return parts

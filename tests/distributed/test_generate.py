"""`megavlm infer` answers what transformers' own generation answers, in any layout."""

import functools
import json

import pytest
import torch
from parity import mostly_slow
from test_layouts import LAYOUTS, VARIANTS
from toy import picture, reference_inputs, reference_model, write_records

NEW_TOKENS = 12
BANNED = ("image_pad", "video_pad", "vision_start", "vision_end")


def run_infer(settings: dict):
    from megavlm.commands import infer
    from megavlm.config.settings import Settings

    return infer.main(Settings(**settings))


def questions_of(records: list[dict]) -> list[dict]:
    """The records without their last answer."""
    return [{**record, "messages": record["messages"][:-1]} for record in records]


def mixed_questions(root) -> list[dict]:
    """Fifty questions of different lengths: no picture, one, several, a video."""
    names = ("chelsea", "coffee", "rocket", "astronaut", "page")
    words = ("What", "is", "this", "thing", "here", "and", "why", "do", "you", "ask")
    questions = []
    for number in range(50):
        text = " ".join(words[(number * 3 + k) % 10] for k in range(1 + number % 7)) + "?"
        sizes = [(32 * (1 + (number + k) % 3), 32 * (1 + (number + 2 * k) % 2)) for k in range(4)]
        stills = [picture(root, names[(number + k) % 5], size) for k, size in enumerate(sizes)]
        clip = [picture(root, names[(number + k // 2) % 5], (64, 32)) for k in range(4)]
        kind = number % 4
        content = ["", "<image>", "<image>" * (2 + number % 3), "<video>"][kind] + text
        question = {"messages": [{"role": "user", "content": content}]}
        if kind in (1, 2):
            question["images"] = stills[: content.count("<image>")]
        if kind == 3:
            question["videos"] = [{"frames": clip, "fps": 2.0}]
        questions.append(question)
    return questions


@functools.cache
def loaded_reference(folder):
    from transformers import AutoProcessor

    return reference_model(folder), AutoProcessor.from_pretrained(folder)


def reference_answers(folder, questions, root, new_tokens=NEW_TOKENS) -> list[str]:
    """transformers' greedy answers, all in one batch: the prompts are padded on the left."""
    model, processor = loaded_reference(folder)
    inputs = [reference_inputs(processor, question, root, add_generation_prompt=True) for question in questions]
    longest = max(one["input_ids"].shape[1] for one in inputs)
    pad = lambda name, value: torch.cat(
        [torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0), value=value) for one in inputs]
    )
    batch = {"input_ids": pad("input_ids", 0)} | {n: pad(n, 0) for n in ("attention_mask", "mm_token_type_ids")}
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        if parts := [one[name] for one in inputs if name in one]:
            batch[name] = torch.cat(parts)
    # a vision token in an answer has no picture behind it: neither side may emit one
    banned = [[processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>")] for name in BANNED]
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, bad_words_ids=banned)
    return processor.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)


@pytest.fixture(scope="session")
def questions(toys):
    records = questions_of(toys.records)
    return records, write_records(toys.root / "questions.jsonl", records)


def lines_of(toys, world, kind, data, out, parallel, **generate) -> list[dict]:
    settings = {
        "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind))},
        "data": {"eval": str(data), "workers": 0},
        "parallel": parallel,
        "train": {"precision": "fp32"},
        "generate": {"max_new_tokens": NEW_TOKENS, "batch_size": 3, **generate},
        "output": str(out),
    }
    assert world.run(run_infer, settings) == [0] * world.world_size
    assert not list(out.glob("*.partial*"))
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def answers_of(toys, world, kind, data, out, parallel, indices=range(8), **generate) -> list[str]:
    lines = lines_of(toys, world, kind, data, out, parallel, **generate)
    assert [line["index"] for line in lines] == list(indices)
    return [line["answer"] for line in lines]


# Every layout of the table of docs/parity.md.
CASES = LAYOUTS | {
    **{name: variant[:3] for name, variant in VARIANTS.items() if not variant[3]},
    "YaRN, TP2": (2, "yarn", {"tensor": 2}),
    "MoE EP2 × CP2 × PP2": (4, "moe", {"context": 2, "expert": 2, "pipeline": 2}),
}
QUICK = {
    *("one process", "TP2", "DP2", "PP2", "PP2 × VPP2", "CP2", "YaRN, TP2"),
    *("MoE EP2", "MoE EP2 × CP2 × PP2", "MoE EP2 × TP2 × PP2"),
}


@functools.cache
def mixed_answers(toys, kind) -> tuple[str, ...]:
    """The reference of all layouts, computed once."""
    return tuple(reference_answers(toys.folder(kind), mixed_questions(toys.root), toys.root, 6))


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK.__contains__))
def test_greedy_answers_are_those_of_transformers(case, toys, tmp_path, request):
    """Fifty prompts; six tokens of each are enough to go through prefill, decoding and an early end."""
    size, kind, parallel = CASES[case]
    records = mixed_questions(toys.root)
    data = write_records(toys.root / "mixed.jsonl", records)
    world = request.getfixturevalue(f"world{size}")
    answers = answers_of(toys, world, kind, data, tmp_path, parallel, range(50), max_new_tokens=6, batch_size=20)
    assert answers == list(mixed_answers(toys, kind))
    assert len(set(answers)) > 25  # the questions matter

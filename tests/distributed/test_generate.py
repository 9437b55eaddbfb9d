"""`megavlm infer` answers what transformers' own generation answers, in any layout."""

import functools
import json
from collections import Counter
from unittest import mock

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


def run_infer_for_tokens(settings: dict, stop: tuple[int, ...]):
    """The same, but an answer is its tokens and its text as JSON, since a text leaves out special tokens.

    ``stop``: the tokens that end an answer.
    """
    from megavlm.rollout import answerer

    both = lambda tokenizer, tokens, stops: json.dumps([tokens, text_of(tokenizer, tokens, stops)])
    text_of = answerer.text_of
    with mock.patch.multiple(answerer, text_of=both, stop_tokens=lambda hf, tokenizer: stop):
        return run_infer(settings)


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
    """The texts of transformers' greedy answers."""
    decode = loaded_reference(folder)[1].tokenizer.decode
    answers = reference_tokens(folder, questions, root, new_tokens)
    return [decode(tokens, skip_special_tokens=True) for tokens in answers]


def reference_tokens(folder, questions, root, new_tokens, stop: tuple[int, ...] = ()) -> list[list[int]]:
    """transformers' greedy answers, all in one batch: the prompts are padded on the left.

    Each has the token that ends it, one of ``stop`` or the tokenizer's, unless it is cut off.
    """
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
        ends = list(stop or (processor.tokenizer.eos_token_id,))
        options = {"eos_token_id": ends, "pad_token_id": ends[0], "bad_words_ids": banned}
        out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)
    answers = []
    for tokens in out[:, longest:].tolist():  # those that have ended are filled up
        ended = next((number for number, token in enumerate(tokens, start=1) if token in ends), None)
        answers.append(tokens[:ended])
    return answers


@pytest.fixture(scope="session")
def questions(toys):
    records = questions_of(toys.records)
    return records, write_records(toys.root / "questions.jsonl", records)


def lines_of(toys, world, kind, data, out, parallel, *, stop=(), vision=None, **generate) -> list[dict]:
    settings = {
        "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind))},
        "data": {"eval": str(data), "workers": 0},
        "parallel": parallel,
        "vision": vision or {},
        "train": {"precision": "fp32"},
        "generate": {"max_new_tokens": NEW_TOKENS, "batch_size": 3, **generate},
        "output": str(out),
    }
    run = (run_infer_for_tokens, settings, stop) if stop else (run_infer, settings)
    assert world.run(*run) == [0] * world.world_size
    assert not list(out.glob("*.partial*"))
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def answers_of(toys, world, kind, data, out, parallel, indices=range(8), **generate) -> list[str]:
    lines = lines_of(toys, world, kind, data, out, parallel, **generate)
    assert [line["index"] for line in lines] == list(indices)
    return [line["answer"] for line in lines]


# The layouts that encode the frames in another way have their section vision, too.
WITH_FRAMES = {
    name: (*variant[:3], variant[3]["vision"]) for name, variant in VARIANTS.items() if "vision" in variant[3]
}
# Every layout of the table of docs/parity.md.
CASES = LAYOUTS | {
    **{name: variant[:3] for name, variant in VARIANTS.items() if not variant[3]},
    **WITH_FRAMES,
    "YaRN, TP2": (2, "yarn", {"tensor": 2}),
    "MoE EP2 × CP2 × PP2": (4, "moe", {"context": 2, "expert": 2, "pipeline": 2}),
}
QUICK = {
    *("one process", "TP2", "DP2", "PP2", "PP2 × VPP2", "CP2", "YaRN, TP2"),
    *("MoE EP2", "MoE EP2 × CP2 × PP2", "MoE EP2 × TP2 × PP2", "DP2, frames over the world", "PP2, windows of 2"),
}


@functools.cache
def mixed_answers(toys, kind) -> tuple[tuple[int, ...], list[list]]:
    """The reference of all layouts, computed once: tokens that end answers, and the tokens and text of each answer.

    The toys never end an answer by themselves; a token that they often say inside of one does it here.
    """
    folder, records = toys.folder(kind), mixed_questions(toys.root)
    tokenizer = loaded_reference(folder)[1].tokenizer
    whole = reference_tokens(folder, records, toys.root, 6)
    assert len(set(map(tuple, whole))) > 25  # the questions matter
    inside = Counter(token for tokens in whole for token in set(tokens[1:5]))
    often = [token for token, count in sorted(inside.items()) if count <= 20]
    stop = (tokenizer.eos_token_id, max(often, key=inside.__getitem__))
    answers = reference_tokens(folder, records, toys.root, 6, stop)
    return stop, [[tokens, tokenizer.decode(tokens, skip_special_tokens=True)] for tokens in answers]


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK.__contains__))
def test_greedy_answers_are_those_of_transformers(case, toys, tmp_path, request):
    """Fifty prompts; six tokens of each are enough to go through prefill, decoding and an early end."""
    size, kind, parallel, *vision = CASES[case]
    records = mixed_questions(toys.root)
    data = write_records(toys.root / "mixed.jsonl", records)
    world = request.getfixturevalue(f"world{size}")
    stop, expected = mixed_answers(toys, kind)
    options = {"stop": stop, "vision": vision[0] if vision else {}, "max_new_tokens": 6, "batch_size": 20}
    answers = answers_of(toys, world, kind, data, tmp_path, parallel, range(50), **options)
    assert [json.loads(answer) for answer in answers] == expected
    assert 0 < sum(tokens[-1] == stop[1] for tokens, _ in expected) < 50  # some end, and some are cut off

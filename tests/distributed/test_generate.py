"""`megavlm infer` answers what transformers' own generation answers: batched, with pictures and video."""

import json

import pytest
import torch
from toy import reference_inputs, reference_model, write_records

NEW_TOKENS = 12


def run_infer(settings: dict):
    from megavlm.commands import infer
    from megavlm.config.settings import Settings

    return infer.main(Settings(**settings))


def questions_of(records: list[dict]) -> list[dict]:
    """The records without their last answer."""
    return [{**record, "messages": record["messages"][:-1]} for record in records]


def reference_answers(folder, questions, root) -> list[str]:
    from transformers import AutoProcessor

    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    # a vision token in an answer has no picture behind it: neither side may emit one
    banned = [[processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>")] for name in
              ("image_pad", "video_pad", "vision_start", "vision_end")]  # fmt: skip
    answers = []
    for question in questions:
        inputs = reference_inputs(processor, question, root, add_generation_prompt=True)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, bad_words_ids=banned)
        new = out[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    return answers


@pytest.fixture(scope="session")
def questions(toys):
    records = questions_of(toys.records)
    return records, write_records(toys.root / "questions.jsonl", records)


def answers_of(toys, world, kind, data, out, parallel, indices=range(8), **generate) -> list[str]:
    settings = {
        "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind))},
        "data": {"eval": str(data)},
        "parallel": parallel,
        "train": {"precision": "fp32"},
        "generate": {"max_new_tokens": NEW_TOKENS, "batch_size": 3, **generate},
        "output": str(out),
    }
    assert world.run(run_infer, settings) == [0] * world.world_size
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(indices)
    return [line["answer"] for line in lines]


CASES = {
    "dense": (1, "dense", {}),
    "dense, TP2": (2, "dense", {"tensor": 2}),
    "dense, DP2": (2, "dense", {}),
    "MoE, EP2": (2, "moe", {"expert": 2}),
    "YaRN, TP2": (2, "yarn", {"tensor": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_those_of_transformers(case, toys, questions, tmp_path, request):
    size, kind, parallel = CASES[case]
    records, data = questions
    answers = answers_of(toys, request.getfixturevalue(f"world{size}"), kind, data, tmp_path, parallel)
    assert answers == reference_answers(toys.folder(kind), records, toys.root)
    assert len(set(answers)) > 4  # the questions matter


def test_sampling_narrowed_to_one_token_is_greedy(toys, questions, tmp_path, world2):
    _, data = questions
    greedy = answers_of(toys, world2, "dense", data, tmp_path / "greedy", {"tensor": 2})
    narrow = answers_of(toys, world2, "dense", data, tmp_path / "k", {"tensor": 2}, temperature=0.7, top_k=1)
    assert narrow == greedy
    narrow = answers_of(toys, world2, "dense", data, tmp_path / "p", {"tensor": 2}, temperature=0.7, top_p=1e-6)
    assert narrow == greedy
    wide = answers_of(toys, world2, "dense", data, tmp_path / "wide", {"tensor": 2}, temperature=1.0)
    assert wide != greedy


def test_sampled_tokens_follow_the_distribution():
    from megavlm.model.generate import Sampling, choose

    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().repeat(20000, 1)
    generator = torch.Generator().manual_seed(1)

    def shares(**options):
        tokens = choose(logits, Sampling(max_new_tokens=1, **options), generator)
        return torch.bincount(tokens, minlength=4) / len(tokens)

    # 20,000 draws: a share of one half has a standard deviation of 0.0035
    assert torch.allclose(shares(temperature=1.0), torch.tensor([0.5, 0.25, 0.15, 0.1]), atol=0.015)
    assert torch.allclose(shares(temperature=1.0, top_p=0.7), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.015)
    assert torch.allclose(shares(temperature=1.0, top_k=3), torch.tensor([5, 2.5, 1.5, 0]) / 9, atol=0.015)
    assert torch.allclose(shares(temperature=1.0, banned=[0]), torch.tensor([0, 0.5, 0.3, 0.2]), atol=0.015)

"""Prompts with sampled answers: the same tokens, positions and targets as a conversation that was written down."""

from dataclasses import fields

import pytest
import torch
from toy import toy_records

from megavlm.data.answers import first_sample, with_answer
from megavlm.data.row import IGNORE, NO_ANNOTATIONS
from megavlm.media.files import in_folder

PLAIN = [0, 1, 2, 3, 5, 6, 7]  # the toy records with a single answer


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    return root, toy_records(root)


@pytest.mark.parametrize("number", PLAIN)
def test_a_prompt_with_its_answer_is_the_conversation(number, records, renderer):
    """Pictures of several sizes, a video, and text. The line break after a turn is the template's, not the answer's."""
    root, listed = records
    whole = renderer.encode(listed[number], in_folder(root), "a record", kind="tune")
    prompt = renderer.encode(listed[number], in_folder(root), "a record", kind="prompt")
    tokens = renderer.tokenizer(listed[number]["messages"][-1]["content"] + "<|im_end|>")["input_ids"]
    made, length = with_answer(prompt, tokens, NO_ANNOTATIONS), len(prompt.input_ids) + len(tokens)
    for name in ("input_ids", "labels", "loss_weights", "position_ids"):
        wanted = getattr(whole, name)[..., :length]
        if name in ("labels", "loss_weights"):
            wanted = wanted.clone()
            wanted[-1] = IGNORE if name == "labels" else 0.0
        assert torch.equal(getattr(made, name), wanted), name
    assert torch.equal(made.visual_positions, whole.visual_positions)
    assert torch.equal(made.pixels, whole.pixels)


def test_an_answer_that_spells_a_picture_has_none(records, renderer):
    root, listed = records
    prompt = renderer.encode(listed[0], in_folder(root), "a record", kind="prompt")
    tokens = renderer.tokenizer("<image> and <|vision_start|>")["input_ids"]
    made = with_answer(prompt, tokens, NO_ANNOTATIONS, shares_media=True)
    assert torch.equal(made.visual_positions, prompt.visual_positions)
    assert len(made.pixels) == 0
    assert made.labels[len(prompt.input_ids) - 1 : -1].tolist() == tokens
    unlearned = with_answer(prompt, tokens, NO_ANNOTATIONS, is_target=False)
    assert (unlearned.labels == IGNORE).all()
    assert not unlearned.loss_weights.any()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_row_of_one_sample_gives_the_sample_back(number, records, renderer):
    root, listed = records
    sample = renderer.encode(listed[number], in_folder(root), "a record", kind="tune", index=number)
    found = first_sample(renderer.pack([sample], 1024))
    for field in fields(sample):
        one, other = getattr(sample, field.name), getattr(found, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name

"""Messages of an environment that continue a conversation are what transformers makes of the whole conversation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from megavlm.base.errors import UserError
from megavlm.data.answers import continued, followed_by
from megavlm.environments.messages import Messages
from megavlm.media.files import in_folder


def picture(name: str, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(getattr(photographs, name)()).convert("RGB").resize(size)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


FIRST, SECOND, THIRD = picture("chelsea", (96, 64)), picture("coffee", (160, 128)), picture("rocket", (64, 200))


def part(thing):
    return {"type": "text", "text": thing} if isinstance(thing, str) else {"type": "image"}


def reference(renderer, messages, pictures):
    """Ids, positions and pixels of transformers for a conversation, and whose token each is."""
    from transformers import AutoConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    processor = renderer.processor
    told = [{"role": role, "content": [part(thing) for thing in content]} for role, content in messages]
    text = processor.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=pictures, return_tensors="pt")
    with torch.device("meta"):
        model = Qwen3VLModel(AutoConfig.from_pretrained(renderer.folder))
    positions, _ = model.get_rope_index(
        input_ids=inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    return inputs, positions[:, 0]


@pytest.fixture(scope="module")
def asked(renderer, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    FIRST.save(folder / "first.png")
    renderer.folder = model_folder
    record = {"messages": [{"role": "user", "content": "<image>What is this?"}], "images": ["first.png"]}
    return renderer.encode(record, in_folder(folder), "asked:1", kind="prompt")


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize(
    ("text", "pictures", "content"),
    [
        ("Look closer.", [SECOND], [SECOND, "Look closer."]),
        ("Here <image> and <image>?", [SECOND, THIRD], ["Here ", SECOND, " and ", THIRD, "?"]),
        ("No picture: <image> is a word, ça va?\n", [], ["No picture: <image> is a word, ça va?\n"]),
        ("", [THIRD], [THIRD]),
    ],
)
def test_a_second_message_is_that_of_the_whole_conversation(renderer, asked, role, text, pictures, content):
    messages, end = Messages(renderer, role), renderer.tokenizer.eos_token_id
    said = ["Show me more, please.", "A cup — or a rocket."]
    conversation, is_said = asked, []
    for answer in said:
        tokens = [*renderer.tokenizer(answer)["input_ids"], end]
        piece = messages.after_answer(end, text, [png(image) for image in pictures], "asked:1")
        conversation = followed_by(continued(conversation, tokens), piece)
        is_said += [True] * len(tokens) + [False] * len(piece.input_ids)
    turns = [("user", [FIRST, "What is this?"])]
    for answer in said:
        turns += [("assistant", [answer]), (role, content)]
    inputs, positions = reference(renderer, turns, [FIRST, *pictures, *pictures])
    assert conversation.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(conversation.position_ids, positions)
    image = renderer.processor.image_token_id
    assert torch.equal(conversation.visual_positions, (conversation.input_ids == image).nonzero().flatten())
    grids = inputs["image_grid_thw"].tolist()
    assert conversation.frame_grids.tolist() == [[h, w] for _, h, w in grids]
    # the processor repeats each picture for the two images of a step, and normalises
    mean, scale = conversation.pixel_scale
    width = conversation.pixels.shape[1] // 3
    ours = (conversation.pixels.float() - mean.repeat_interleave(width)) / scale.repeat_interleave(width)
    theirs = inputs["pixel_values"].unflatten(1, (3, 2, width))
    assert torch.equal(theirs[:, :, 0].flatten(1), ours)
    assert torch.equal(theirs[:, :, 1].flatten(1), ours)
    assert conversation.num_images == 1 + 2 * len(pictures)
    # said by the model: the words and end tokens of its two answers, by the text of the whole
    whole = renderer.tokenizer.decode(conversation.input_ids[-len(is_said) :][torch.tensor(is_said)])
    assert whole == "".join(f"{answer}<|im_end|>" for answer in said)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_first_message_takes_the_place_of_the_opening(renderer, asked, role):
    messages = Messages(renderer, role)
    conversation = messages.after_prompt(asked, "Then this.", [png(SECOND)], "asked:1")
    turns = [("user", [FIRST, "What is this?"]), (role, [SECOND, "Then this."])]
    inputs, positions = reference(renderer, turns, [FIRST, SECOND])
    assert conversation.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert torch.equal(conversation.position_ids, positions)


def test_an_answer_without_the_end_token_gets_one(renderer):
    messages = Messages(renderer, "user")
    piece = messages.after_answer(5, "Go on.", [], "asked:1")
    text = renderer.tokenizer.decode(piece.input_ids)
    assert text == "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("text", "pictures", "told"),
    [
        ("<image><image>", [png(SECOND)], "2 places for 1 pictures"),
        ("a <|image_pad|>", [], "0 places for 0 pictures"),
        ("a <|vision_start|><|image_pad|><|vision_end|>", [], "1 places for 0 pictures"),
        ("", [b"no picture"], "picture 1 of its environment cannot be read: it is neither a picture"),
        ("", [png(SECOND), b""], "picture 2 of its environment cannot be read: it is empty"),
        ("", [png(SECOND)[:2000]], "picture 1 of its environment cannot be read"),
        ("", [png(Image.fromarray(np.zeros((2, 600, 3), np.uint8)))], "aspect ratio"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told(renderer, text, pictures, told):
    with pytest.raises(UserError, match=told) as caught:
        Messages(renderer, "user").after_answer(renderer.tokenizer.eos_token_id, text, pictures, "asked:1")
    assert "asked:1" in str(caught.value)


def test_a_prompt_that_is_no_conversation_gets_no_message(renderer):
    prompt = renderer.encode({"text": "Once upon"}, in_folder("."), "asked:1", kind="prompt")
    with pytest.raises(UserError, match="let reset return None"):
        Messages(renderer, "user").after_prompt(prompt, "Then?", [], "asked:1")

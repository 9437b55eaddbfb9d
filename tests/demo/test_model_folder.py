"""The tiny folder loads as a released one does, and its tokenizer and chat template behave like Qwen3-VL's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration

from megavlm.base.errors import UserError
from megavlm.demo.model_folder import MARKUP_TOKENS, SPECIAL_TOKENS, make_model_folder


@pytest.fixture(scope="module")
def processor(demo_model) -> Qwen3VLProcessor:
    return AutoProcessor.from_pretrained(demo_model)


@pytest.mark.parametrize(("moe", "tied"), [(False, True), (False, False), (True, True), (True, False)])
def test_folder_loads_and_answers(tmp_path, moe, tied):
    folder = make_model_folder(tmp_path / "model", moe=moe, tied=tied)
    processor = AutoProcessor.from_pretrained(folder)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(processor) is Qwen3VLProcessor
    assert type(model) is (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)
    assert not any(report.values()), report
    assert (model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) is tied

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(text=prompt, images=[Image.new("RGB", (32, 32))], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]  # a digit is one visual token
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 1
    answer = model.generate(**batch, max_new_tokens=3)
    assert answer.shape[1] > batch["input_ids"].shape[1]


def test_config_names_the_tokenizer_s_ids(processor, demo_model):
    model = AutoModelForImageTextToText.from_pretrained(demo_model)
    config, tokenizer = model.config, processor.tokenizer
    for name, token in {"image": "<|image_pad|>", "video": "<|video_pad|>"}.items():
        assert getattr(config, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(token)
        assert getattr(processor, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(token)
    assert config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config.vision_end_token_id == tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert config.text_config.vocab_size % 128 == 0
    assert config.text_config.vocab_size >= len(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    # Two in a row, as in Qwen3: special tokens, then markup that decoding keeps.
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *MARKUP_TOKENS])
    assert ids == list(range(ids[0], ids[0] + 26))
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(MARKUP_TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        "Which digit is this?",
        "naïve café, Ärger",
        "数字 7 と 三",
        "🎉👩‍🚀",
        "שלום",
        "a\tb\r\n\n  c ",
        "<tool_call>{}</tool_call>",
    ],
)
def test_tokenizer_gives_text_back(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_tokenizer_knows_the_demo_s_words(processor):
    assert processor.tokenizer.tokenize("Which digit is this?") == ["Which", "Ġdigit", "Ġis", "Ġthis", "?"]


def test_same_arguments_same_bytes(tmp_path):
    first, second, other = (make_model_folder(tmp_path / f"{i}", seed=max(i - 1, 0)) for i in range(3))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_norm_noise_reaches_norms_and_biases_only(tmp_path):
    plain = AutoModelForImageTextToText.from_pretrained(make_model_folder(tmp_path / "plain"))
    noisy = AutoModelForImageTextToText.from_pretrained(make_model_folder(tmp_path / "noisy", norm_noise=0.1))
    for (name, weight), other in zip(plain.named_parameters(), noisy.parameters(), strict=True):
        assert torch.equal(weight, other) is (weight.ndim > 1), name


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists already"):
        make_model_folder(tmp_path / "model")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def render(processor, messages, **options) -> str:
    return processor.apply_chat_template(messages, tokenize=False, **options)


def test_chat_template_turns_and_generation_prompt(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert render(processor, messages) == expected
    assert render(processor, messages, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"
    # No system turn is made up, as Qwen2-VL did.
    assert render(processor, messages[1:2]) == "<|im_start|>user\nHello<|im_end|>\n"


def test_chat_template_vision_parts(processor):
    image, video = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"image": "b.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": [{"type": "text", "text": "This: "}, {"type": "video"}, {"type": "image"}]},
    ]
    rendered = "<|im_start|>system\nLook.<|im_end|>\n<|im_start|>user\n{}{}and{}{}<|im_end|>\n"
    rendered += "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThis: {}{}{}{}<|im_end|>\n"
    assert render(processor, messages) == rendered.format("", image, "", image, "", video, "", image)
    assert render(processor, messages, add_vision_id=True) == rendered.format(
        "Picture 1: ", image, "Picture 2: ", image, "Video 1: ", video, "Picture 3: ", image
    )


def test_chat_template_tools(processor):
    messages = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}},
                {"name": "time", "arguments": "{}"},
            ],
        },
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "noon"},
    ]
    rendered = render(processor, messages, tools=[{"type": "function", "function": {"name": "weather"}}])
    assert rendered == (
        "<|im_start|>system\nUse tools.\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
        "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "weather"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
    )


def test_processor_sizes_of_pictures_and_video(processor):
    small = processor.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")
    assert small["image_grid_thw"].tolist() == [[1, 2, 2]]
    large = processor.image_processor([Image.new("RGB", (2000, 1000))], return_tensors="pt")
    t, h, w = large["image_grid_thw"][0].tolist()
    assert t == 1
    assert h * w * 16 * 16 <= 256 * 256
    video = processor.video_processor([np.zeros((8, 40, 72, 3), np.uint8)], return_tensors="pt", do_sample_frames=False)
    assert video["video_grid_thw"][0, 0] == 4  # two frames are one temporal patch

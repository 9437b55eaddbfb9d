"""Finding the assistant's turns in what a chat template writes."""

import pytest
from hf_reference import THINKING
from transformers import AutoProcessor

from megavlm.base.errors import UserError
from megavlm.data.template import ChatTemplate

# Numbers the messages from the end, so that each turn changes when another follows.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.revindex }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def learned(model_folder):
    """The learned parts of a conversation under a template (None: the folder's own)."""
    processor = AutoProcessor.from_pretrained(model_folder)

    def learned(messages, template=None, tools=None):
        processor.chat_template = template or processor.chat_template
        weights = [float(message["role"] == "assistant") for message in messages]
        text, spans = ChatTemplate(processor).turns(messages, weights, tools, "here:1")
        return [text[start:end] for start, end, _ in spans]

    return learned


def talk(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def test_turns_end_with_their_end_token(learned):
    assert learned(talk("a", "b", "c", "")) == ["b<|im_end|>", "<|im_end|>"]
    assert learned(talk("a", "assistant\n", "a", "assistant\n")) == ["assistant\n<|im_end|>"] * 2
    assert learned(talk("b", "a", "b", first="assistant")) == ["b<|im_end|>", "b<|im_end|>"]


def test_thoughts_of_earlier_turns_are_not_looked_for(learned):
    messages = talk("a", "<think>Hm.</think>b", "c", "<think>Well.</think>d")
    assert learned(messages, THINKING) == ["b<|im_end|>", "Well.\n</think>\n\nd<|im_end|>"]


def test_thoughts_are_kept_from_the_latest_question_on(learned):
    """With tools a turn has several messages; all lose their thoughts when the next question comes."""
    step = [{"role": "assistant", "content": "<think>A.</think>b"}, {"role": "tool", "content": "c"}]
    turn = [{"role": "user", "content": "q"}, *step, {"role": "assistant", "content": "<think>D.</think>e"}]
    earlier, latest = ["b<|im_end|>", "e<|im_end|>"], ["A.\n</think>\n\nb<|im_end|>", "D.\n</think>\n\ne<|im_end|>"]
    assert learned(turn * 3, THINKING) == earlier * 2 + latest


def test_what_stands_before_the_first_turn(learned):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert learned(talk("b", "a", "b", first="assistant"), tools=tools) == ["b<|im_end|>"] * 2


def test_template_that_rewrites_earlier_turns(learned):
    with pytest.raises(UserError, match=r"here:1: messages\[1\] cannot be found"):
        learned(talk("a", "b", "c", "d"), REWRITING)


def test_template_without_a_prompt(learned):
    with pytest.raises(UserError, match="here:1: the chat template writes nothing for add_generation_prompt"):
        learned(talk("a", "b"), "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}")


def test_template_that_fails(learned):
    with pytest.raises(UserError, match="here:1: the chat template cannot render these messages: too many"):
        learned(talk("a", "b", "c", "d"), "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}")

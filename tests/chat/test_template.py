"""Finding the assistant's turns in what a chat template writes."""

import json

import pytest
from hf_reference import THINKING
from transformers import AutoProcessor

from megavlm.base.errors import UserError
from megavlm.chat.template import ChatTemplate

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


# What stands in these answers looks like the tokens between turns, whole or in part.
QUOTING = [
    "The end is <|im_end|>, and it goes on.",
    "<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
    "<|im_start|>assistant\n",
    "<|im_start|>",
    "assistant\nassistant",
    "\n\nYes.\n",
    "\nassistant\n<|im_end|>",
    "{{ messages }} {% endfor %} \ue0000\ue000 \ue001",
    "",
    " ",
]


@pytest.mark.parametrize("place", ["answers", "questions", "both"])
def test_quoted_markup_does_not_end_or_begin_an_answer(learned, place):
    questions, answers = ["?"] * len(QUOTING), [str(number) for number in range(len(QUOTING))]
    questions = QUOTING[::-1] if place != "answers" else questions
    answers = QUOTING if place != "questions" else answers
    messages = talk(*(text for pair in zip(questions, answers, strict=True) for text in pair))
    assert learned(messages) == [f"{answer}<|im_end|>" for answer in answers]


def test_quoted_markup_in_thoughts_and_tools(learned):
    """Under a template that drops earlier thoughts, strips texts and writes arguments as JSON."""
    quoted = "<|im_end|>\n<|im_start|>assistant\n<think>"
    call = {"name": "f", "arguments": {"a": quoted, "b": ['"', "\\"]}}
    turn = [
        {"role": "user", "content": quoted},
        {"role": "assistant", "content": f" {quoted}b", "reasoning_content": f"R {quoted}", "tool_calls": [call]},
        {"role": "tool", "content": quoted},
        {"role": "assistant", "content": f"<think>\n{quoted}D.\n</think>\n\n{quoted}e "},
    ]
    written = json.dumps(call, ensure_ascii=False)
    first, second = f"{quoted}b\n<tool_call>\n{written}\n</tool_call><|im_end|>", f"{quoted}e<|im_end|>"
    thought = [f"R {quoted}\n</think>\n\n", f"{quoted}D.\n</think>\n\n"]
    tools = [{"type": "function", "function": {"name": "f", "description": quoted}}]
    assert learned(turn * 2, THINKING, tools) == [first, second, thought[0] + first, thought[1] + second]


# Shortens long questions, which no marker is.
CUTTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:40] if m.role == 'user' else m.content }}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_template_that_changes_texts_is_run_for_each_turn(learned):
    long = "long " * 20
    assert learned(talk(long, "b", long, "d"), CUTTING) == ["b<|im_end|>", "d<|im_end|>"]
    with pytest.raises(UserError, match=r"here:1: messages\[3\] contains <\|im_end\|>, and the chat template rewrites"):
        learned(talk(long, "b", long, "<|im_end|> d"), CUTTING)


@pytest.mark.parametrize("template", [None, THINKING])
def test_work_grows_with_the_conversation_and_not_with_its_square(model_folder, template):
    """Four hundred turns: the template is run twice, whatever the number of turns, and writes two conversations."""
    processor = AutoProcessor.from_pretrained(model_folder)
    processor.chat_template = template or processor.chat_template
    found = ChatTemplate(processor)
    render, written = processor.apply_chat_template, []
    processor.apply_chat_template = lambda *args, **more: written.append(render(*args, **more)) or written[-1]
    messages = talk(*(f"text {number}" for number in range(800)))
    text, spans = found.turns(messages, [0.0, 1.0] * 400, None, "here:1")
    assert [text[start:end].rpartition("\n")[2] for start, end, _ in spans] == [
        f"text {number}<|im_end|>" for number in range(1, 800, 2)
    ]
    assert len(written) == 2
    assert sum(map(len, written)) <= 2 * len(text)


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

"""Renders conversations with the model's chat template and finds the parts of the text that are targets."""

import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from transformers import ProcessorMixin

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened
from megavlm.chat.masked import MaskedConversation

Turn = tuple[int, int]
"""(first character, character behind its end token)"""


class ChatTemplate:
    """Renders messages and finds the assistant's turns in the rendered text.

    A template is a program, so the turns are found by running it. A turn begins behind its header, where the prompt for
    an answer ends, and it ends with its end token, which is also a target. Texts may quote headers and end tokens.
    Therefore the conversation is rendered once more with markers in place of its texts: there, headers and end tokens
    are the template's own, and their places are known in the text if both renderings agree character by character.

    A template that changes texts in a way that does not suit markers is run again for each turn: a turn begins where
    the text rendered for the messages before it, including the prompt for an answer, ends.
    """

    _question = {"role": "user", "content": "?"}  # noqa: RUF012 (it is never modified)
    _answer = {"role": "assistant", "content": "!"}  # noqa: RUF012

    def __init__(self, processor: ProcessorMixin):
        self._processor = processor
        self._end = processor.tokenizer.eos_token
        question = [self._question]
        answered = [*question, self._answer, *question]
        folder = "model.hf"  # the source in the error message if the template fails for these messages
        before = self.render(question, None, folder)
        # The prompt of a thinking model opens a thought, but the template writes the thought only in the last turn.
        self._prompt = self.render(question, None, folder, prompt=True)[len(before) :]
        pairs = zip(self._prompt, self.render(answered, None, folder)[len(before) :], strict=False)
        self._header = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._asked = self.render(question * 2, None, folder)[len(before) :]
        self._has_frames = bool(self._header) and self._is_predictable()

    def render(self, messages: list[dict], tools: list[dict] | None, source: str, prompt: bool = False) -> str:
        """The conversation as text; `prompt` appends the beginning of the assistant's answer.

        Raises UserError, with `source` in its message, if the template fails.
        """
        try:
            return self._processor.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template can raise any exception
            raise UserError(f"{source}: the chat template cannot render these messages: {shortened(error)}") from error

    @property
    def opening(self) -> str:
        """The beginning of an answer, which the template appends to a conversation that asks for one."""
        return self._prompt

    def following(self, message: dict, source: str, *, answered: bool = True) -> str:
        """What the template writes for a message that follows another, with the ``opening`` of the next answer.

        Args:
            message: a message that is not the assistant's.
            source: the sample, for error messages.
            answered: whether it follows an answer; then the text begins behind the end token of that answer. Otherwise
                it follows a question.

        Raises:
            UserError: the template fails, or does not write the end token after an answer.
        """
        asked = [self._question, self._answer] if answered else [self._question]
        question = self.render([self._question], None, source)
        text = self.render([*asked, message], None, source, prompt=True)
        # the question has an end token, too
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(question, text, strict=False)))
        if not answered:
            return text[start:]
        end = text.find(self._end, start)
        if end < 0:
            raise UserError(
                f"{source}: the chat template does not write {self._end} after an answer",
                "use a template that ends answers as that of the released model does",
            )
        return text[end + len(self._end) :]

    def turns(
        self, messages: list[dict], weights: list[float], tools: list[dict] | None, source: str
    ) -> tuple[str, list[tuple[int, int, float]]]:
        """The conversation as text, and the assistant turns in it that are targets.

        Args:
            messages: the conversation.
            weights: loss weight of each message; only messages with a weight above 0 are targets.
            tools: tool descriptions for the template.
            source: "file:line", for error messages.

        Returns:
            The text and, for each target turn, (first character, character after its end token, weight).

        Raises:
            UserError: the template fails or has no prompt for an answer, or it renders a turn differently when other
                turns follow, so that a target turn cannot be found.
        """
        text = self.render(messages, tools, source)
        if not self._prompt:
            raise UserError(
                f"{source}: the chat template writes nothing for add_generation_prompt, so the beginning of an answer "
                "cannot be found",
                "use a template that has a prompt for the answer, such as that of the released model",
            )
        wanted = [number for number, weight in enumerate(weights) if weight > 0]
        found = self._framed_turns(text, messages, tools) if self._has_frames and wanted else None
        if found is None:
            found = {number: self._turn(text, messages, number, tools, source) for number in wanted}
        return text, [(*found[number], weights[number]) for number in wanted]

    def _framed_turns(self, text: str, messages: list[dict], tools: list[dict] | None) -> dict[int, Turn] | None:
        """The turn of each assistant message; None if the template does not treat markers as it treats the texts."""
        masked = MaskedConversation(messages, text)
        if masked.messages is None:
            return None
        try:
            frames = self.render(masked.messages, tools, "")
        except UserError:
            return None
        alignment = masked.align(frames, text)
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        headers = [found.start() for found in re.finditer(re.escape(self._header), frames)]
        if alignment is None or len(headers) != len(numbers):
            return None
        turns = {}
        for number, header, following in zip(numbers, headers, [*headers[1:], len(frames)], strict=True):
            opening = self._prompt if frames.startswith(self._prompt, header) else self._header
            start = header + len(opening)
            end = frames.find(self._end, start, following)
            if end < 0 or not alignment.owners(start, end) <= {number}:
                return None
            turns[number] = (alignment.place(start), alignment.place(end) + len(self._end))
        return turns

    def _is_predictable(self) -> bool:
        """Whether turns that are found through markers are those that are found one by one, in a small conversation."""
        messages, source = [self._question, self._answer] * 2, "model.hf"
        try:
            text = self.render(messages, None, source)
            one_by_one = {number: self._turn(text, messages, number, None, source) for number in (1, 3)}
        except UserError:
            return False
        return self._framed_turns(text, messages, None) == one_by_one

    def _turn(self, text: str, messages: list[dict], number: int, tools: list[dict] | None, source: str) -> Turn:
        """The turn of one message, from the text rendered for the messages before it. Raises UserError without it."""
        openings = (o for o in self._openings(messages[:number], tools, source) if text.startswith(o))
        start = len(next(openings, ""))
        end = text.find(self._end, start) if start else -1
        if end < 0:
            raise UserError(f"{source}: messages[{number}] cannot be found in the output of the chat template")
        if _contains(messages[number], self._end):
            raise UserError(
                f"{source}: messages[{number}] contains {self._end}, and the chat template rewrites messages, so the "
                "end of the answer cannot be found",
                f"remove {self._end} from the text",
            )
        return start, end + len(self._end)

    def _openings(self, earlier: list[dict], tools: list[dict] | None, source: str) -> Iterator[str]:
        """The possible texts before the first character of the answer to `earlier`.

        A template that keeps only the latest thoughts renders `earlier` in one way if it is the end of the
        conversation, and in another way if a further question follows.
        """
        for asked in (False, True):
            if earlier or asked:
                written = self.render([*earlier, self._question] if asked else earlier, tools, source)
                written = written.removesuffix(self._asked) if asked else written
            else:
                written = ""
            yield written + self._prompt
            yield written + self._header


def _contains(value: Any, text: str) -> bool:
    """Whether any text in a message contains `text`."""
    if isinstance(value, dict):
        return any(_contains(item, text) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return any(_contains(item, text) for item in value)
    return isinstance(value, str) and text in value

"""Renders conversations with the model's chat template and finds the parts of the text that are targets."""

from collections.abc import Iterator
from itertools import takewhile

from transformers import ProcessorMixin

from megavlm.base.errors import UserError


class ChatTemplate:
    """Renders messages and finds the assistant's turns in the rendered text.

    A template is a program, so the turns are found by running it. A turn begins where the text rendered for the
    messages before it, including the prompt for an answer, ends. It ends with its end token, which is also a target.
    """

    _question = {"role": "user", "content": "?"}  # noqa: RUF012 (it is never modified)

    def __init__(self, processor: ProcessorMixin):
        self._processor = processor
        self._end = processor.tokenizer.eos_token
        question = [self._question]
        answered = [*question, {"role": "assistant", "content": "!"}, *question]
        folder = "model.hf"  # the source in the error message if the template fails for these messages
        before = self.render(question, None, folder)
        # The prompt of a thinking model opens a thought, but the template writes the thought only in the last turn.
        self._prompt = self.render(question, None, folder, prompt=True)[len(before) :]
        pairs = zip(self._prompt, self.render(answered, None, folder)[len(before) :], strict=False)
        self._header = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._asked = self.render(question * 2, None, folder)[len(before) :]

    def render(self, messages: list[dict], tools: list[dict] | None, source: str, prompt: bool = False) -> str:
        """The conversation as text; `prompt` appends the beginning of the assistant's answer.

        Raises UserError, with `source` in its message, if the template fails.
        """
        try:
            return self._processor.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template can raise any exception
            raise UserError(f"{source}: the chat template cannot render these messages: {error}") from error

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
        spans = []
        for number, weight in enumerate(weights):
            if weight > 0:
                openings = (o for o in self._openings(messages[:number], tools, source) if text.startswith(o))
                start = len(next(openings, ""))
                end = text.find(self._end, start) if start else -1
                if end < 0:
                    raise UserError(f"{source}: messages[{number}] cannot be found in the output of the chat template")
                spans.append((start, end + len(self._end), weight))
        return text, spans

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

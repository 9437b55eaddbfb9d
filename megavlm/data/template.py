"""Conversations as text, by the model's own chat template, and the parts of that text which are learned."""

from collections.abc import Iterator
from itertools import takewhile

from transformers import ProcessorMixin

from megavlm.base.errors import UserError


class ChatTemplate:
    """Renders messages and finds the assistant's turns in the rendered text.

    A template is a program, so the turns are found by running it: what it writes for the messages before a turn, with
    its prompt for an answer, is where the turn begins. The turn reaches to its end token, which is learned with it.
    """

    _question = {"role": "user", "content": "?"}  # noqa: RUF012 (nobody changes it)

    def __init__(self, processor: ProcessorMixin):
        self._processor = processor
        self._end = processor.tokenizer.eos_token
        question = [self._question]
        answered = [*question, {"role": "assistant", "content": "!"}, *question]
        folder = "model.hf"  # named where even this cannot be rendered
        before = self.render(question, None, folder)
        # The prompt of a thinking model opens the thought, which its template writes only into the latest turn.
        self._prompt = self.render(question, None, folder, prompt=True)[len(before) :]
        pairs = zip(self._prompt, self.render(answered, None, folder)[len(before) :], strict=False)
        self._header = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._asked = self.render(question * 2, None, folder)[len(before) :]

    def render(self, messages: list[dict], tools: list[dict] | None, source: str, prompt: bool = False) -> str:
        """The conversation as text; `prompt` adds the beginning of the assistant's answer.

        Raises UserError, naming `source`, if the template fails.
        """
        try:
            return self._processor.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template raises what it likes
            raise UserError(f"{source}: the chat template cannot render these messages: {error}") from error

    def turns(
        self, messages: list[dict], weights: list[float], tools: list[dict] | None, source: str
    ) -> tuple[str, list[tuple[int, int, float]]]:
        """The conversation as text, and the assistant turns in it.

        Args:
            messages: the conversation.
            weights: loss weight of each message; only those above 0 are looked for.
            tools: tool descriptions for the template.
            source: "file:line", for messages.

        Returns:
            The text and, for each learned turn, (first character, character behind its end token, weight).

        Raises:
            UserError: the template fails, has no prompt for an answer, or writes earlier turns differently once others
                follow, so that a learned one cannot be found.
        """
        text = self.render(messages, tools, source)
        if not self._prompt:
            raise UserError(
                f"{source}: the chat template writes nothing for add_generation_prompt: an answer has no beginning",
                "use a template that has a prompt for the answer, as the released one",
            )
        spans = []
        for number, weight in enumerate(weights):
            if weight > 0:
                openings = (o for o in self._openings(messages[:number], tools, source) if text.startswith(o))
                start = len(next(openings, ""))
                end = text.find(self._end, start) if start else -1
                if end < 0:
                    raise UserError(f"{source}: messages[{number}] is not found in what the chat template writes")
                spans.append((start, end + len(self._end), weight))
        return text, spans

    def _openings(self, earlier: list[dict], tools: list[dict] | None, source: str) -> Iterator[str]:
        """What the template may write up to the first character of the answer to `earlier`.

        A template that keeps only the latest thoughts writes `earlier` in one way while nothing follows, and in
        another once a further question has been asked.
        """
        for asked in (False, True):
            if earlier or asked:
                written = self.render([*earlier, self._question] if asked else earlier, tools, source)
                written = written.removesuffix(self._asked) if asked else written
            else:
                written = ""
            yield written + self._prompt
            yield written + self._header

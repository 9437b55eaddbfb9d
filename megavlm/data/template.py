"""Conversations as text, by the model's own chat template, and the parts of that text which are learned."""

from itertools import takewhile

from transformers import ProcessorMixin

from megavlm.config.errors import UserError


class ChatTemplate:
    """Renders messages and finds the assistant's turns in the rendered text.

    A template is a program, so the turns are found by running it: what it writes for the messages before a turn, with
    its prompt for an answer, is where the turn begins. The turn reaches to its end token, which is learned with it.
    """

    def __init__(self, processor: ProcessorMixin):
        self._processor = processor
        self._end = processor.tokenizer.eos_token
        question = [{"role": "user", "content": "?"}]
        answered = [*question, {"role": "assistant", "content": "!"}, *question]
        folder = "model.hf"  # named where even this cannot be rendered
        before = self.render(question, None, folder)
        # The prompt of a thinking model opens the thought, which its template writes only into the latest turn.
        self._prompt = self.render(question, None, folder, prompt=True)[len(before) :]
        pairs = zip(self._prompt, self.render(answered, None, folder)[len(before) :], strict=False)
        self._header = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

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
            UserError: the template fails, or writes earlier turns differently once others follow, so that a learned
                one cannot be found.
        """
        text = self.render(messages, tools, source)
        spans = []
        for number, weight in enumerate(weights):
            if weight > 0:
                earlier = self.render(messages[:number], tools, source) if number else ""
                opening = next((o for o in (self._prompt, self._header) if text.startswith(earlier + o)), None)
                end = -1 if opening is None else text.find(self._end, len(earlier + opening))
                if end < 0:
                    raise UserError(f"{source}: messages[{number}] is not found in what the chat template writes")
                spans.append((len(earlier + opening), end + len(self._end), weight))
        return text, spans

"""Messages of an environment: rendered by themselves, as the continuation of a conversation.

What the model has said is never tokenised again, and neither is anything else that is there already: a message is the
text that the chat template writes from behind the end of an answer to the beginning of the next one. It begins with
text and ends with a special token and text, so that its tokens are those of the whole conversation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from megavlm.base.errors import UserError
from megavlm.data.answers import followed_by, without_end
from megavlm.data.renderer import Renderer
from megavlm.data.row import Sample
from megavlm.media.files import HeldFile

_MARK = "<image>"


class Messages:
    """Renders messages for conversations.

    Args:
        renderer: the renderer of the prompts.
        role: the role of the messages.

    Raises:
        UserError: the folder has no chat template.
    """

    def __init__(self, renderer: Renderer, role: Literal["user", "tool"]):
        if renderer.template is None:
            raise UserError(
                "an environment requires a chat template, but the processor in model.hf has none",
                "add the model's chat_template.jinja to the folder",
            )
        self._renderer, self._template, self._role = renderer, renderer.template, role
        processor, self.tokenizer = renderer.processor, renderer.tokenizer
        self._picture = processor.vision_start_token + processor.image_token + processor.vision_end_token
        self._opening = self.tokenizer(self._template.opening)["input_ids"]

    def after_answer(self, last: int, text: str, pictures: Sequence[bytes], source: str) -> Sample:
        """A message that follows an answer: from behind its end token up to the beginning of the next answer.

        Args:
            last: the last token of the answer. If it is not the end token of the template, as after a stop string, the
                message begins with that.
            text: the text. Pictures stand where it has marks (``<image>``), and before it if it has none.
            pictures: the bytes of picture files.
            source: the sample, for error messages.

        Returns:
            A sample of the message alone, without targets; its positions begin with 0.

        Raises:
            UserError: a picture cannot be read, or is too large or too narrow; the text has another number of marks
                than there are pictures, or contains placeholders of pictures.
        """
        end = "" if last == self.tokenizer.eos_token_id else self.tokenizer.eos_token
        return self._rendered(end + self._template.following(self._message(text, pictures), source), pictures, source)

    def after_prompt(self, prompt: Sample, text: str, pictures: Sequence[bytes], source: str) -> Sample:
        """A prompt with a further message, which takes the place of the beginning of an answer at its end.

        Arguments and errors are those of ``after_answer``; it also raises UserError for a prompt that does not end with
        the beginning of an answer.
        """
        count = len(self._opening)
        if not count or prompt.input_ids[-count:].tolist() != self._opening:
            raise UserError(
                f"{source}: its prompt does not end as the chat template begins an answer, so no message can be added",
                "give the prompt as messages, or let reset return None",
            )
        written = self._template.following(self._message(text, pictures), source, answered=False)
        return followed_by(without_end(prompt, count), self._rendered(written, pictures, source))

    @property
    def opening_tokens(self) -> int:
        """The number of tokens of the beginning of an answer."""
        return len(self._opening)

    def _message(self, text: str, pictures: Sequence[bytes]) -> dict:
        """The message as the template takes it, with an empty part for each picture."""
        if pictures and _MARK not in text:
            text = _MARK * len(pictures) + text
        content: list[dict] = []
        for number, piece in enumerate(text.split(_MARK) if pictures else [text]):
            content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
        return {"role": self._role, "content": content}

    def _rendered(self, text: str, pictures: Sequence[bytes], source: str) -> Sample:
        pieces = text.split(self._picture)
        tokens = (self._renderer.processor.image_token, self._renderer.processor.video_token)
        if len(pieces) - 1 != len(pictures) or any(token in piece for piece in pieces for token in tokens):
            raise UserError(
                f"{source}: the message of the environment has {len(pieces) - 1} places for {len(pictures)} pictures",
                "mark as many places with <image> as there are pictures, or none, and write no placeholders of the "
                "model into the text",
            )
        parts: list[dict] = []
        for number, piece in enumerate(pieces):
            parts += [{"type": "image", "image": str(number - 1)}] * (number > 0)
            parts += [{"type": "text", "text": piece}] * bool(piece)
        find = partial(_held, pictures)
        return self._renderer.encode({"text": parts}, find, source, kind="prompt")


def _held(pictures: Sequence[bytes], name: str) -> HeldFile:
    return HeldFile(f"{int(name) + 1} of its environment", data=pictures[int(name)])

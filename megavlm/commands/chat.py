"""`megavlm chat`: a conversation on the terminal, with pictures and videos."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.renderer import Renderer
from megavlm.data.row import Sample
from megavlm.media.files import File
from megavlm.records.questions import marked
from megavlm.rollout.answerer import Answerer, without_fp8
from megavlm.runtime.session import start
from megavlm.runtime.weights import choose, tell

HELP = """\
/image PATH   add a picture to the next question
/video PATH   add a video to the next question
/reset        begin a new conversation
/help         show this text
/quit         leave, as Ctrl-D and Ctrl-C do
Anything else is a question. What was said before is part of it, until /reset."""

EXAMPLES = {"/image": "cat.png", "/video": "clip.mp4"}


def main(settings: Settings, image: Sequence[Path] = (), video: Sequence[Path] = (), ema: bool = False) -> int:
    """Reads questions from standard input and prints the answers.

    Args:
        settings: the settings; ``generate`` says how answers are chosen and how long they become at most.
        image: pictures of the first question.
        video: videos of the first question.
        ema: use the moving average of the weights (``train.ema``).

    Raises:
        UserError: the settings do not fit; a mistake in the conversation is told, and the conversation goes on.
    """
    if settings.generate.samples > 1:
        raise UserError(
            f"generate.samples is {settings.generate.samples}, but a conversation goes on from one answer",
            "set generate.samples to 1, or use megavlm infer",
        )
    settings, weights = choose(settings, ema=ema)
    session = start(without_fp8(settings), training=False, ema=ema)
    tell(weights, session, sys.stderr)
    renderer = Renderer(settings.model.hf, settings.data)
    answerer, talk = Answerer(session, renderer), Conversation(renderer)
    with _leaving(session.is_first) as leaving:
        if session.is_first:
            _prepare_terminal()
            talk.add("image", *image)
            talk.add("video", *video)
        while (answers := answerer.answer(lambda: None if leaving.asked else _next(talk, leaving))) is not None:
            for answer in answers:  # one on rank 0, none elsewhere
                talk.answered(answer)
                print(answer, flush=True)
    return 0


class Conversation:
    """What was said so far, and the files of the next question."""

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._messages: list[dict[str, str]] = []
        self._files: dict[str, list[str]] = {"image": [], "video": []}  # of all questions so far
        self._waiting: dict[str, list[str]] = {"image": [], "video": []}

    def add(self, kind: str, *paths: Path) -> None:
        """Adds pictures ("image") or videos to the next question. Raises UserError if one does not exist."""
        for path in paths:
            if not _is_file(path):
                raise UserError(f"file {path} does not exist", f"relative paths start from {Path.cwd()}")
            self._waiting[kind].append(str(path))

    def ask(self, text: str) -> Sample:
        """Returns the conversation up to this question as a prompt.

        Raises UserError if it cannot be rendered; the question and its files are forgotten then.
        """
        waiting, self._waiting = self._waiting, {"image": [], "video": []}
        question = {"role": "user", "content": marked(text, len(waiting["image"]), len(waiting["video"]))}
        files = {kind: [*self._files[kind], *waiting[kind]] for kind in waiting}
        messages = [*self._messages, question]
        record: dict[str, Any] = {"messages": messages, "images": files["image"], "videos": files["video"]}
        prompt = self._renderer.encode(record, File, "the question", kind="prompt")
        self._messages, self._files = messages, files
        return prompt

    def answered(self, text: str) -> None:
        """Keeps the answer as part of the conversation."""
        self._messages.append({"role": "assistant", "content": marked(text, 0, 0)})


class _Leaving:
    """Whether a signal has asked to leave, and whether the terminal is read, which a signal interrupts."""

    asked = reading = False

    def __call__(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, True
        if self.reading or again:
            raise KeyboardInterrupt


@contextmanager
def _leaving(is_first: bool) -> Iterator[_Leaving]:
    """Within the block, SIGINT and SIGTERM ask rank 0 to leave after the answer; the other ranks leave with it."""
    leaving = _Leaving()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, leaving if is_first else signal.SIG_IGN) for number in numbers}
    try:
        yield leaving
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _next(talk: Conversation, leaving: _Leaving) -> Sample | None:
    """Reads lines until one is a question that can be rendered; None at the end of the conversation."""
    while True:
        try:
            leaving.reading = True
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()
            return None
        finally:
            leaving.reading = False
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                return None
            if word in ("/image", "/video"):
                if not rest:
                    raise UserError(f"{word} needs a path", f"for example {word} {EXAMPLES[word]}")
                talk.add(word[1:], Path(_unquoted(rest)).expanduser())
            elif word == "/reset":
                talk.reset()
            elif word == "/help":
                print(HELP, flush=True)
            elif word.startswith("/") and word[1:].isalpha():
                raise UserError(f"unknown command {word}", "/help lists them")
            elif line:
                return talk.ask(line)
        except MemoryError:
            raise
        except Exception as error:  # whatever a file contains, the conversation goes on
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            print(text, file=sys.stderr, flush=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long, or a folder above it may not be read
        return False


def _unquoted(path: str) -> str:
    """A path without the quotation marks that a shell would need; terminals add them to files that are dropped."""
    path = path.strip()
    return path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path


def _prepare_terminal() -> None:
    import readline  # noqa: F401 (with it, input() has line editing and a history)

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        print("Ask a question. /help lists the commands, /quit or Ctrl-D leaves.", flush=True)

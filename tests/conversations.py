"""Two hundred varied conversations about real pictures and videos, drawn from seeds: ten themes of twenty.

Pictures are crops of the photographs in installed packages, texts are pieces of their documentation and of a list of
rarities. A conversation is a function of its theme and number; files are written as it is drawn.
"""

import importlib.resources
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from conversation_media import Files

PER_THEME = 20
THEMES = (
    "texts", "pictures", "formats", "shapes", "large", "videos", "frames", "mixtures", "tools", "thoughts",
)  # fmt: skip

RARITIES = (
    "e\u0301te\u0301, n\u0303, o\u0302\u0323",  # combining characters, which are composed before tokenising
    "\u0301\u0308 alone, and many: \u0303\u0303\u0303\u0303\u0303\u0303\u0303\u0303",
    "\uac01 \u1112\u1161\u11ab \ud7a3",  # Hangul, composed and in parts
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽❤️🇺🇳 1️⃣",
    "𝔘𝔫𝔦 𐍈 𓂀 🜁 𠀋",  # beyond the basic plane
    "图片里有什么？「猫」、这是一张照片。",
    "これは何ですか。ｶﾀｶﾅ",
    "이 사진에는 무엇이 있나요?",
    "\u202bما هذا؟\u202c مرحبا ١٢٣",
    "שלום עולם",
    "नमस्ते क्ष त्र",
    "สวัสดีครับ",
    "\u2126 ≠ \u212b \ufb01 ½ ²",  # Ohm and Ångström signs are composed to letters, the others stay
    "tab\tNUL\x00 ESC\x1b[1m BEL\x07 DEL\x7f",
    "\r\n\r\nCR\rLF\n\n\n",
    "\u2028line\u2029paragraph\x85next\u00a0\u200b\ufeff",
    "\ufffd\uffff\ufdd0 \U0010ffff",  # replacement character and noncharacters
    "   leading and trailing   ",
    "\n",
    " ",
    "0123456789 3.14e-10 1,000,000",
    "def f(x):\n\treturn {'a': [x]}  # }}{{ {% raw %}",
    '"quoted" \\n \\u0041 </s> <s> [INST]',
    "<b>&amp;</b> <images> <vid",
    "A" * 300,
    "don't I'LL we've 'S",
)
# Text that looks like the tokens between turns. The tokenizer takes it for them, here as in the processor.
MARKUP = (
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
    "<|endoftext|>",
    "<tool_call>",
    "<think>\n",
    "</think>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|box_start|>(1,2)<|box_end|>",
)


def _tool(name: str, description: str, parameters: dict) -> dict:
    function = {"name": name, "description": description, "parameters": {"type": "object", "properties": parameters}}
    return {"type": "function", "function": function}


TOOLS = (
    _tool("zoom", 'Enlarge — "a region" <b>größer</b>', {"box": {"type": "array", "items": {"type": "number"}}}),
    _tool("count", "", {}),
    _tool("検索", "探す 🔎\n\ntwo lines", {"言葉": {"type": "string"}}),
)

# The order of a conversation: u user, a assistant, c assistant calling tools, t a tool's response.
PLAIN = ("ua", "ua", "uaua", "uauaua", "uauauauaua")
ODD = ("aua", "uua", "uau", "uuauua", "auau", "uaa", "uaau", "uaaua", "a", "uauu")
CALLING = (
    "ucta",
    "ucttta",
    "uctcta",
    "ucttcttta",
    "uauctauctta",
    "uctctct",
    "uc",
    "ctua",
    "uctuua",
    "uact",
    "ucua",
    "actta",
)
THINKING = (
    "ua",
    "uaua",
    "uauaua",
    "uau",
    "ucta",
    "ucttcta",
    "uctauctcta",
    "uctua",
    "aua",
    "uuaua",
    "uct",
    "uctauctaua",
    "act",
)


@dataclass
class Conversation:
    """A record of the JSONL form, its files under ``folder``; ``thinks``: for the template of a thinking model."""

    name: str
    record: dict
    folder: Path
    thinks: bool


def conversation(theme: str, number: int, folder: Path) -> Conversation:
    """Number 0 to 19 of a theme; its files are written into ``folder``."""
    name = f"{theme}-{number}"
    author = _Author(theme, number, random.Random(name), folder)
    return Conversation(name, author.record(), folder, thinks=theme == "thoughts")


class _Author:
    def __init__(self, theme: str, number: int, draw: random.Random, folder: Path):
        self.theme, self.number, self.draw, self.folder = theme, number, draw, folder
        self.files = Files(draw, folder, f"{theme}-{number}")
        self.images: list[str] = []
        self.videos: list = []

    def record(self) -> dict:
        orders = {"tools": CALLING, "thoughts": THINKING}.get(self.theme)
        if orders is None:
            orders = ODD if self.number % 4 == 3 else PLAIN
        order = orders[self.number % len(orders)] if orders is not PLAIN else self.draw.choice(orders)
        messages = [self._message(kind, place, order) for place, kind in enumerate(order)]
        system = self.draw.choice((None, None, "", "text"))
        if system is not None:
            messages.insert(0, {"role": "system", "content": system and self.text()})
        self._weigh([message for message in messages if message["role"] == "assistant"])
        record = {"messages": messages}
        if self.images or self.draw.random() < 0.1:
            record["images"] = self.images
        if self.videos:
            record["videos"] = self.videos
        if self.theme == "tools" or (self.theme == "thoughts" and "c" in order):
            record["tools"] = self.draw.sample(TOOLS, self.draw.randint(1, 3))
        return record

    def _message(self, kind: str, place: int, order: str) -> dict:
        if kind == "u":
            return {"role": "user", "content": self._question(order)}
        if kind == "t":
            content = self.text()
            if self.draw.random() < 0.2:
                content += f"<image>{self.text()}"
                self.images.append(self.files.picture())
            return {"role": "tool", "content": content} | self.draw.choice(({}, {"tool_call_id": "1", "name": "zoom"}))
        message = {"role": "assistant", "content": self.text(plain=True) if self.draw.random() < 0.85 else ""}
        if kind == "c":
            message["tool_calls"] = [self._call() for _ in range(self.draw.choice((1, 1, 2, 3)))]
            message["content"] = self.draw.choice((message["content"], "", None))
        if self.theme == "thoughts":
            self._think(message, place, order)
        elif message["content"] is not None and self.draw.random() < 0.1:
            message["content"] = [{"type": "text", "text": message["content"]}, {"type": "text", "text": "."}]
        elif message["content"] and self.draw.random() < 0.1:  # a thought that a plain template takes for text
            message["content"] = f"<think>\n{self.text(plain=True)}\n</think>\n\n{message['content']}"
        return message

    def _think(self, message: dict, place: int, order: str) -> None:
        thought = self.draw.choice(("", "\n\n", self.text(plain=True), self.text(plain=True)))
        if self.draw.random() < 0.5:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content'] or ''}"
        elif thought:
            message["reasoning_content"] = thought

    def _call(self) -> dict:
        arguments = {"box": [self.draw.randint(0, 999) for _ in range(4)], "言葉": self.text(plain=True)}
        function = {"name": self.draw.choice(("zoom", "count", "検索")), "arguments": arguments}
        if self.draw.random() < 0.3 and self.theme == "tools":
            function["arguments"] = '{"box": [1, 2], "note": "as a string ü"}'
        return self.draw.choice(({"type": "function", "id": "1", "function": function}, function))

    def _question(self, order: str) -> str | list[dict]:
        marks = self._media(order)
        self.draw.shuffle(marks)
        texts = [self.text() if self.draw.random() < 0.7 else "" for _ in range(len(marks) + 1)]
        if self.draw.random() < 0.2:  # as the list of parts, in which <image> is text
            parts = []
            for text, mark in zip(texts, [*marks, None], strict=True):
                parts += [{"type": "text", "text": f"{text} <image>"}] if text else []
                parts += [{"type": mark[1:-1]}] if mark else []
            return parts or [{"type": "text", "text": ""}]
        return "".join(text + mark for text, mark in zip(texts, [*marks, ""], strict=True))

    def _media(self, order: str) -> list[str]:
        """Marks of the media of one question, which are added to the lists in the order of the text."""
        theme, draw = self.theme, self.draw
        pictures = {"texts": 0, "large": 1, "videos": 0, "frames": 0}.get(theme, draw.randint(0, 2))
        if theme in ("pictures", "formats", "shapes"):
            pictures = draw.choice((1, 1, 2, 3, 6)) if len(order) < 4 else draw.randint(0, 3)
        if theme == "large" and self.images:
            pictures = 0
        videos = {"videos": 1, "frames": 1, "mixtures": draw.randint(0, 2)}.get(theme, 0)
        if len(self.videos) > 2:
            videos = 0
        for _ in range(pictures):
            if theme in ("formats", "large"):
                self.images.append(getattr(self.files, theme.removesuffix("s"))(self.number))
            else:
                self.images.append(self.files.shape() if theme == "shapes" else self.files.picture())
        for _ in range(videos):
            as_frames = theme == "frames" or (theme == "mixtures" and draw.random() < 0.5)
            self.videos.append(self.files.frames() if as_frames else self.files.video())
        return ["<image>"] * pictures + ["<video>"] * videos

    def text(self, plain: bool = False) -> str:
        """A piece of prose with something rare in it, more often than not; `plain` has no token of the template.

        An answer that contains the end token's text cannot be told from two turns, so answers are plain.
        """
        prose, draw = _prose(), self.draw
        start = draw.randrange(len(prose))
        pieces = [prose[start : start + draw.choice((0, 5, 20, 80, 300))]]
        pieces += draw.sample(RARITIES, draw.choice((0, 1, 1, 2)))
        if not plain and draw.random() < (0.4 if self.theme == "texts" else 0.1):
            pieces.append(draw.choice(MARKUP))
        draw.shuffle(pieces)
        return draw.choice(("", " ", "\n")).join(pieces)

    def _weigh(self, answers: list[dict]) -> None:
        """Switch off or weigh some of the answers, never the last to be learned."""
        for answer in answers:
            if self.draw.random() < 0.2:
                answer["loss"] = self.draw.choice((True, False))
            if self.draw.random() < 0.2:
                answer["weight"] = self.draw.choice((0, 0.25, 0.1, 1, 3.5))
        if not any(answer.get("loss", True) and answer.get("weight", 1) for answer in answers):
            answers[-1].pop("loss", None)
            answers[-1].pop("weight", None)


@cache
def _prose() -> str:
    """Documentation of the data sets of scikit-learn."""
    folder = importlib.resources.files("sklearn.datasets.descr")
    return "\n".join(
        file.read_text(encoding="utf-8") for file in sorted(folder.iterdir(), key=str) if file.name.endswith(".rst")
    )


def corpus() -> list[str]:
    """What a tokenizer for these conversations learns its merges from."""
    return [_prose(), *RARITIES, *(role + "\n" for role in ("system", "user", "assistant"))] * 2

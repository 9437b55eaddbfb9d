"""What the tests of `megavlm data inspect` share: its page read as a browser reads it, and records.

In documents of digits every digit is a token, so that lengths are known without the tokenizer.
"""

import json
from html.parser import HTMLParser

import pytest

from megavlm.base.errors import UserError
from megavlm.commands.data_inspect import main
from megavlm.config.settings import Settings

VOID = {"meta", "img", "br", "rect", "path"}  # the last two close themselves in SVG


class Page(HTMLParser):
    """The tags of a page; fails where they are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.articles = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "article":
            self.articles.append([])
        if tag == "span" and self.in_tokens() and self.open[-1][0] == "div":
            self.articles[-1].append([attrs.get("class", ""), attrs.get("title", ""), ""])
        if tag not in VOID:
            self.open.append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.in_tokens() and self.open[-1][0] == "span":
            self.articles[-1][-1][2] += data

    def in_tokens(self):
        return any(tag == "article" for tag, _ in self.open) and ("div", {"class": "tokens"}) in self.open


@pytest.fixture
def inspect(tmp_path, model_folder):
    """Runs the job on files of records; gives summary and page. ``refused``: a pattern of the error at the end."""

    def run(data, samples=200, refused=None, **settings):
        data = {"train": [], "seq_length": 512, "packing_buffer": 8, **data}
        out = tmp_path / "out"
        made = Settings(model={"hf": model_folder}, data=data, **settings)
        if refused is None:
            assert main(made, out, samples) == 0
        else:
            with pytest.raises(UserError, match=refused):
                main(made, out, samples)
        assert sorted(path.name for path in out.iterdir()) == ["index.html", "summary.json"]
        return json.loads((out / "summary.json").read_text()), Page((out / "index.html").read_text())

    return run


def digits(count):
    """A text of this many tokens, the last of which is its end."""
    return {"text": ("1234567890" * (count // 10 + 1))[: count - 1], "images": []}


def talk(question, answer, **answered):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **answered}]

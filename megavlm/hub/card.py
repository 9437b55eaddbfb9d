"""The model card: README.md of an exported folder, which says what its weights are, and how to load them."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from megavlm.base.atomic_files import write_text
from megavlm.base.number_format import counted, number, percent
from megavlm.hub.facts import RunFacts, versions
from megavlm.report.loss_plot import FILE_NAME as LOSS_PLOT
from megavlm.report.loss_plot import save_loss_plot
from megavlm.report.run import RecordedRun

FILE_NAME = "README.md"
# Fields of metrics.jsonl that are told if the run has them: (field, words, is it a share)
_RESULTS = (
    ("loss", "loss", False),
    ("nll", "loss of the targets alone", False),
    ("accuracy", "pairs or answers that are told right", True),
    ("margin", "margin", False),
    ("reward", "reward of an answer", False),
    ("answer_tokens", "tokens of an answer", False),
    ("kl", "divergence from the reference, nats per token", False),
)
_LOAD = """\
```python
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{base}")
model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto")
{adapter}content = [{{"type": "image", "url": "picture.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
tokens = model.generate(**inputs.to(model.device), max_new_tokens=128)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


@dataclass(frozen=True)
class Card:
    """What a model card is made of.

    Attributes:
        name: the name of the folder.
        model_type: of config.json.
        facts: the run that trained the weights; None if none did.
        base: the model that the run started from, by its name on the hub; None: not known.
        license: of that model; None: not known.
        adapter: whether the folder has an adapter alone.
        has_head: whether it has the head of a reward model.
        limits: the limits of pictures and videos with which the weights were trained, by setting.
    """

    name: str
    model_type: str
    facts: RunFacts | None
    base: str | None = None
    license: str | None = None
    adapter: bool = False
    has_head: bool = False
    limits: str = ""

    def write(self, folder: Path) -> None:
        """Writes README.md and, if something was trained, loss.png into a folder."""
        facts = self.facts
        has_plot = facts is not None and len(facts.run.lines) > 1
        if facts is not None and has_plot:
            save_loss_plot(facts.run.lines, folder / LOSS_PLOT, self.name)
        write_text(folder / FILE_NAME, self.text(has_plot))

    def text(self, has_plot: bool = False) -> str:
        """The card in Markdown. ``has_plot``: whether loss.png is beside it."""
        parts = [self._front(), f"# {self.name}", self._summary(), "## How to load it", self._loading()]
        if self.facts is not None:
            parts += ["## What it was trained on", *self._data(self.facts)]
            parts += ["## How it was trained", *self._training(self.facts)]
            parts += self._result(self.facts, has_plot)
        told = ", ".join(f"{package} {found}" for package, found in versions().items())
        parts += ["## Versions", f"Exported with {told}."]
        return "\n\n".join(parts) + "\n"

    def _front(self) -> str:
        tags = ["megavlm", self.model_type, *([self.facts.verb] if self.facts is not None else [])]
        found = {
            "base_model": self.base,
            "library_name": "peft" if self.adapter else "transformers",
            "license": self.license,
            "pipeline_tag": None if self.has_head else "image-text-to-text",
            "tags": tags,
        }
        known = {key: value for key, value in found.items() if value is not None}
        return f"---\n{yaml.safe_dump(known, sort_keys=False)}---"

    def _summary(self) -> str:
        what = "An adapter for a Qwen3-VL model" if self.adapter else "A Qwen3-VL model"
        if self.facts is None:
            return f"{what}, converted by megavlm from a checkpoint that is not part of a run."
        text = f"{what} after step {self.facts.step:,} of {self.facts.method} (`megavlm {self.facts.verb}`)."
        if self.base:
            text += f" Its base model is [{self.base}](https://huggingface.co/{self.base})."
        if self.facts.before:
            text += f" Before it came {' → '.join(f'`{verb}`' for verb in self.facts.before)}."
        if self.facts.left_out:
            text += " What came before is not known in full: the files of an earlier run could not be read."
        return text

    def _loading(self) -> str:
        base = (self.base or "THE_BASE_MODEL") if self.adapter else self.name
        imports = "from peft import PeftModel\n" if self.adapter else ""
        adapter = f'model = PeftModel.from_pretrained(model, "{self.name}")\n' if self.adapter else ""
        text = _LOAD.format(base=base, imports=imports, adapter=adapter)
        if not self.adapter:
            text += f"\n\n`vllm serve {self.name}` serves it with vLLM."
        if self.has_head:
            text += (
                "\n\nIt is a reward model. `reward_head.safetensors` has the head, `weight` of shape [1, hidden]: the "
                "score of an answer is its product with the last hidden state, after the final norm, of the last token "
                "that the assistant says. `megavlm score --reward` computes it."
            )
        if self.limits:
            where = (
                "has no processor files; use it with" if self.adapter else "was trained with, and its processor has,"
            )
            text += f"\n\nIt {where} these limits of pictures and videos: {self.limits}."
        return text

    def _data(self, facts: RunFacts) -> list[str]:
        run, about = facts.run, "" if facts.is_exact else "about "
        rows = [
            f"| {source.name} | {about}{source.samples:,.0f} | {about}{source.target_tokens:,.0f} | "
            f"{number(source.passes, 3)} |"
            for source in facts.sources
        ]
        table = ["| source | samples | target tokens | passes over it |", "|---|---|---|---|", *rows]
        nouns = {"tokens": "token", "target_tokens": "target token", "images": "picture", "videos": "video"}
        told = ", ".join(about + counted(round(run.total(field)), noun) for field, noun in nouns.items())
        return ["\n".join(table)] * bool(rows) + [f"In all: {told}. Padding is not counted."]

    def _training(self, facts: RunFacts) -> list[str]:
        steps = facts.run.setting("train.steps")
        text = f"{counted(facts.step, 'step')} of {facts.method}"
        if isinstance(steps, int) and steps != facts.step:
            text += f"; the run was set up for {steps:,}"
        frozen = facts.run.setting("model.freeze")
        text += f". Parts that did not learn: {', '.join(frozen)}." if frozen else "."
        if not facts.settings:
            return [text]
        rows = [f"| `{key}` | `{value}` |" for key, value in facts.settings.items()]
        table = "\n".join(["| setting | value |", "|---|---|", *rows])
        return [text, "Settings of megavlm that differ from its defaults:", table]

    def _result(self, facts: RunFacts, has_plot: bool) -> list[str]:
        rows = []
        for field, words, is_share in _RESULTS:
            first, last = facts.run.first_and_last(field)
            if last is not None:
                shown = percent if is_share else number
                rows.append(f"| {words} | {shown(first)} | {shown(last)} |")
        if not rows:
            return []
        table = "\n".join(["| on the training data | first step | at the end |", "|---|---|---|", *rows])
        picture = [f"![The loss over the steps of training]({LOSS_PLOT})"] * has_plot
        return ["## Result", table, "The last column is a moving average.", *_held_out(facts.run), *picture]


def _held_out(run: RecordedRun) -> list[str]:
    """A table of the evaluations while training; [] if there were none."""
    names = sorted({name for line in run.lines for name in line if name.startswith("eval/")})
    found = {name: [value for value in run.column(name) if value is not None] for name in names}
    rows = [
        f"| {name.removeprefix('eval/')} | {number(known[0])} | {number(known[-1])} |"
        for name, known in found.items()
        if known
    ]
    return ["\n".join(["| on held-out data | first | last |", "|---|---|---|", *rows])] if rows else []


def model_type_of(folder: Path) -> str:
    """``model_type`` of the config.json in a Hugging Face folder."""
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "qwen3_vl"))

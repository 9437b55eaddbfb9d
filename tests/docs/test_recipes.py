"""docs/recipes.md: its configurations load, its commands are understood, and a slow test runs them with a toy."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import forked_command
import pytest
from toy import picture, toy_folder, toy_records, write_records

from megavlm.cli.main import _parser, _split
from megavlm.cli.verbs import VERBS
from megavlm.config.load import load_settings
from megavlm.records.forms import form_of
from megavlm.records.records import check_record

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
# What a toy needs instead of a released model, and a test instead of a night.
SMALL = {
    "data.seq_length": "512", "data.workers": "1", "train.precision": "fp32", "train.global_batch_size": "2",
    "train.memory_check": "false", "log.wandb.mode": "off",
}  # fmt: skip
SAMPLED = {
    "rollout.prompts": "2",
    "rollout.group_size": "2",
    "rollout.max_new_tokens": "8",
    "rollout.cache_gib": "0.05",
}
STEPS = {"1000": "2", "2000": "4"}
# What lines to add need beside a toy: devices that are there, a row for a conversation, ramps that end in three steps.
MORE = {
    "… sample with vLLM?": ["rollout.vllm.servers=1", "rollout.vllm.devices=[]"],
    "… let the model use a tool, or speak with an environment?": ["data.train=doors.jsonl", "data.seq_length=4096"],
    "… begin with smaller batches or shorter rows?": [
        "data.seq_length=8192",
        "train.global_batch_size=34",
        "train.steps=3",
    ],
}


@dataclass(frozen=True)
class Block:
    """A fenced block, and the question that it answers."""

    question: str
    language: str
    text: str


def blocks() -> list[Block]:
    found, question = [], "the files"
    for part in re.split(r"^### ", PAGE, flags=re.MULTILINE):
        question = part.partition("\n")[0] if found else question
        found += [Block(question, *match) for match in FENCE.findall(part)]
    return found


BLOCKS = blocks()
FILES = {b.text.partition("\n")[0].removeprefix("# "): b.text for b in BLOCKS if re.match(r"# \w+\.yaml\n", b.text)}
FRAGMENTS = [b for b in BLOCKS if b.text.startswith("# in ")]
COMMANDS = [
    (b.question, line) for b in BLOCKS if b.language == "bash" for line in b.text.replace("\\\n", " ").splitlines()
]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The folder of a reader: the page's files, and configs/ of the checkout."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """(environment variables, words) of a command line."""
    words = shlex.split(line, comments=True)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    return variables, [word for word in words if not re.match(r"[A-Z_]+=", word)]


def test_the_page_has_the_form_that_is_tested_here() -> None:
    assert set(FILES) == {"sft.yaml", "dpo.yaml", "grpo.yaml"}
    assert len(FRAGMENTS) > 10
    assert len(COMMANDS) > 30
    questions = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    assert all(text.startswith("… ") and text.endswith("?") for text in questions)
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("block", FRAGMENTS, ids=lambda block: block.question)
def test_lines_to_add_give_settings(block: Block, files: Path) -> None:
    name = re.match(r"# in (\S+)\n", block.text)[1]
    (files / "added.yaml").write_text(f"base: {name}\n{block.text}")
    settings = load_settings(files / "added.yaml")
    assert settings != load_settings(files / name)


@pytest.mark.parametrize(("question", "line"), COMMANDS, ids=lambda value: value[:60])
def test_commands_are_understood(question: str, line: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, words = words_of(line)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words[0] == "sbatch":
        assert (ROOT / words[-1]).is_file()
        return
    if words[0] == "python":
        assert words[1] == "-m"
        assert (ROOT / Path(*words[2].split("."))).with_suffix(".py").is_file()
        return
    assert words[0] == "megavlm"
    name, rest = _split(words[1:])
    options = vars(_parser(name, VERBS[name]).parse_intermixed_args(rest))
    if VERBS[name].sections:
        load_settings(options["config"], options["overrides"])


def test_samples_are_read(files: Path) -> None:
    samples = [block.text for block in BLOCKS if block.language == "json"]
    assert len(samples) > 5
    for text in samples:
        sample = json.loads(text)
        form = form_of(sample)
        if form not in ("pair", "judged"):
            check_record(sample, "prompt" if "answer" in sample else "tune", "the page")


@pytest.mark.slow
def test_commands_run(files: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the page, in its order, and then the lines to add, on a toy. What needs a cluster is not run.

    The commands that name a released model need no more than its config.json, which configs/models has.
    """
    make_data(files, tmp_path_factory.mktemp("toy"))
    done, failed = [], []
    for _, line in COMMANDS:
        variables, words = words_of(line)
        if words[0] != "megavlm" or words[1:] == ["watch", "runs"]:  # a page has no end
            continue
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        name, _ = _split(words[1:])
        run = forked_command.run(words[1:] if variables else with_small(name, words[1:]))
        done.append(line)
        if run.returncode:
            failed.append(f"{line}\n{run.stdout[-500:]}\n{run.stderr[-1500:]}")
    for number, block in enumerate(FRAGMENTS):
        name = re.match(r"# in (\S+)\n", block.text)[1]
        text = re.sub(r"(_ramp: )\{\d+: (\d+)(?:, \d+: (\d+))?\}", shorter_ramp, block.text)
        (files / "added.yaml").write_text(f"base: {name}\n{text}")
        words = ["grpo" if name == "grpo.yaml" else "sft", "added.yaml", f"output=runs/added{number}"]
        words += ["train.unfreeze_after={vision: 1}"] * ("unfreeze_after" in block.text)  # of two steps
        words += ["--nproc", "4"] * ("pipeline" in block.text)
        run = forked_command.run([*with_small(words[0], words), *MORE.get(block.question, [])])
        if run.returncode:
            failed.append(f"{block.question}\n{run.stdout[-500:]}\n{run.stderr[-1500:]}")
    assert not failed, "\n\n".join(failed)
    assert len(done) > 25
    card = (files / "exported" / "README.md").read_text()
    assert card.startswith("---\nbase_model: Qwen/Qwen3-VL-8B-Instruct\n")


def shorter_ramp(found: re.Match) -> str:
    """A ramp that ends within three steps."""
    return f"{found[1]}{{1: {found[2]}" + (f", 2: {found[3]}}}" if found[3] else "}")


def with_small(name: str, words: list[str]) -> list[str]:
    """A command of the page for a toy: the same with few steps of small batches."""
    if not VERBS[name].sections:
        return words
    small = dict(SMALL)
    if "grpo.yaml" in words or "grpo" in words:
        del small["train.global_batch_size"]
        small |= SAMPLED
    elif "--world-size" in words:
        small["train.global_batch_size"] = "8"
    if name in ("score", "infer", "export", "data inspect"):
        small.pop("train.memory_check")
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word}
    if "train.epochs" not in given:
        small["train.steps"] = STEPS[given.get("train.steps", "1000")]
    if "align.overlong_cache" in given:
        small["align.overlong_cache"] = "4"
    words = [word for word in words if word.partition("=")[0] not in small]
    return [*words, *(f"{key}={value}" for key, value in small.items())]


def make_data(files: Path, root: Path) -> None:
    """The toy as models/8b, and the data files that the page names."""
    (files / "models").mkdir()
    shutil.copytree(toy_folder(root), files / "models" / "8b")
    records = toy_records(files)
    cat = {"images": [picture(files, "chelsea", (96, 64))]}
    (files / "pictures").mkdir()
    for name in ("cat.png", "pictures/cat.png"):
        shutil.copy(files / cat["images"][0], files / name)
    ask = "<image>What is this?"
    for name, found in {
        "train": records,
        "earlier": records[:4],
        "questions": records,
        "pairs": [{"prompt": ask, "chosen": "A cat.", "rejected": "A dog.", **cat}] * 4,
        "judged": [{"prompt": ask, "completion": f"A {x}.", "label": x == "cat", **cat} for x in ("cat", "dog")] * 2,
        "prompts": [{"prompt": "<image>How many?", "answer": "1", **cat}] * 4,
        "renamed": [{"turns": records[0]["messages"], "picture": ["cat.png"]}] * 4,
        "doors": [{"prompt": "Which digit is behind the door?", "behind": "cat.png", "answer": "1"}] * 4,
        "captions": [{"text": "<image> A cat.", **cat}] * 4,
    }.items():
        write_records(files / f"{name}.jsonl", found)
    talk = [{"from": "human", "value": ask}, {"from": "gpt", "value": "A cat."}]
    (files / "llava.json").write_text(json.dumps([{"id": "1", "image": cat["images"][0], "conversations": talk}] * 4))

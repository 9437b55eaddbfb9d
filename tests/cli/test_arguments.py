"""What a newcomer reads after a wrong command line: what is missing or wrong, and what to write instead."""

import re

import pytest
from rich.console import Console

from megavlm.base.errors import UserError
from megavlm.cli import help as cli_help
from megavlm.cli.main import main
from megavlm.cli.verbs import VERBS
from megavlm.config import describe
from megavlm.config.load import load_settings

CONFIG = "model: {hf: hf}\ndata: {train: train.jsonl}\ntrain: {steps: 1, global_batch_size: 1, lr: 1e-3}\noutput: run\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        ("sft", "megavlm sft needs a configuration file", "megavlm sft CONFIG.yaml [section.key=value …]; "),
        ("data inspect", "megavlm data inspect needs a configuration file", "megavlm data inspect CONFIG.yaml"),
        ("export run.yaml", "megavlm export needs --out DIR", "example: megavlm export"),
        ("export run.yaml --out", "--out needs a value", "write --out DIR"),
        ("infer run.yaml --prompt", "--prompt needs a value", "write --prompt TEXT"),
        ("sft run.yaml --nproc", "--nproc needs a value", "write --nproc N"),
        ("sft run.yaml --nproc two", "--nproc: 'two' is not a whole number of at least 1", "--help lists"),
        ("validate run.yaml --world-size 0", "'0' is not a whole number of at least 1", "--help lists"),
        ("sft run.yaml --train.lr=1", "does not take --train.lr=1", "without dashes: train.lr=1"),
        ("sft run.yaml --global-batch-size 8", "does not take", "without dashes: train.global_batch_size=8"),
        ("sft run.yaml --nprocs 2", "does not take --nprocs 2", "did you mean --nproc N?"),
        ("sft run.yaml --frobnicate", "does not take --frobnicate", "megavlm sft --help lists everything"),
        ("data prepare shards other", "does not take other", "megavlm data prepare --help lists everything"),
        ("sft train.lr=1", "cannot read configuration file train.lr=1", "the configuration file comes first"),
        ("sft other.yaml", "cannot read configuration file other.yaml", "relative paths start from"),
        ("sft run.yaml other.yaml", "override 'other.yaml' is not", "with the line base: other.yaml"),
        ("sft run.yaml train.lr 1", "override 'train.lr' is not", "without spaces: train.lr=VALUE"),
        ("sft run.yaml model.freeze=vision", "model.freeze is 'vision'", "write a list, also of one value"),
        ("train run.yaml", "unknown verb 'train'", "verbs: pretrain, sft,"),
        (
            "score run.yaml data.train=[] model.load=null output=null",
            "score needs these settings:\n  output (",
            "set them in the file or on the command line: output=… ",
        ),
    ],
)
def test_wrong_command_line(arguments, message, remedy, place, capsys):
    assert main(arguments.split()) == 2
    said, _, told = capsys.readouterr().err.partition("  → ")
    assert message in said
    assert remedy in told
    assert "required: CONFIG.yaml" not in said  # settings on the command line are optional


def test_what_is_listed_as_required_is_required(place, capsys):
    """Of each verb: without arguments, nothing that its usage shows in brackets is asked for."""
    for name, verb in VERBS.items():
        if not verb.sections:
            continue
        assert main(name.split()) == 2
        needs = capsys.readouterr().err.partition("  → ")[0]
        assert needs.endswith((" needs a configuration file\n", " needs --out DIR\n", " needs --gpus N\n"))


def test_a_similar_setting_is_suggested_in_a_few_words(place):
    with pytest.raises(UserError) as caught:
        load_settings(place / "run.yaml", ["wandb.mode=off"])
    assert "did you mean log.wandb.mode (whether the run is logged" in caught.value.remedy
    assert len(caught.value.remedy) < 160


@pytest.mark.parametrize("width", [50, 80, 109, 110, 120])
@pytest.mark.parametrize("name", ["dpo", "export", "data prepare"])
def test_help_is_whole_at_any_width(name, width, monkeypatch, capsys):
    """Every word of every setting's meaning, default and allowed values is shown, and no line is too long."""
    monkeypatch.setattr(cli_help, "_console", lambda: Console(highlight=False, width=width))
    cli_help.show_verb(name, VERBS[name])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    words = re.findall(r"\S+", text)
    for entry in describe.entries():
        if entry.section in VERBS[name].sections:
            assert entry.key in words
            assert not [word for word in entry.meaning.split() if word not in words and len(word) < 30], entry.key

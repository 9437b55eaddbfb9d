"""`megavlm validate` and `data inspect` where samples cannot be used: for which verb, how many, why, what to do."""

import json

import pytest

from megavlm.base.errors import UserError
from megavlm.cli.main import main
from megavlm.commands import validate
from megavlm.commands.found_run import found_in
from megavlm.commands.usable_data import intended
from megavlm.config.settings import Settings
from megavlm.output.folder import prepare_output
from megavlm.sources.blend import Source
from megavlm.sources.jsonl import JsonlFile

TALK = {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two."}]}
PAIR = {"prompt": "Two?", "chosen": "Two.", "rejected": "Three."}
JUDGED = {"prompt": "Two?", "completion": "Two.", "label": True}
SHAREGPT = {"id": "7", "conversations": [{"from": "human", "value": "Two?"}]}
LONG = {"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "Two."}]}


@pytest.fixture
def run(tmp_path, model_folder, capsys):
    """run(verb, records, *arguments): the status, and what was printed on both streams, with single spaces."""

    def run(verb, records, *arguments):
        lines = [json.dumps(record) if isinstance(record, dict) else record for record in records]
        (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "my.yaml").write_text(json.dumps({"model": {"hf": str(model_folder)}, "data": {"seq_length": 256}}))
        out = ["--out", str(tmp_path / "out")] if verb == "data inspect" else []
        data = f"data.train={tmp_path / 'data.jsonl'}"
        capsys.readouterr()
        status = main([*verb.split(), str(tmp_path / "my.yaml"), data, *arguments, *out])
        printed = capsys.readouterr()
        return status, " ".join(printed.out.split()), " ".join(printed.err.split())

    return run


@pytest.mark.parametrize("verb", ["validate", "data inspect"])
def test_sft_data_under_a_dpo_config_are_not_ready(run, verb, tmp_path):
    """One line for sixty samples; the page is written all the same."""
    status, out, error = run(verb, [TALK] * 60, "align.label_smoothing=0.1")
    assert status == 2
    assert "ready" not in out
    assert "data for dpo, guessed from align.label_smoothing (--for VERB names it)" in out
    assert "data source data: dpo can use none of 60 inspected samples" in error
    assert error.count("60 × broken: chosen and rejected are missing; the record is a conversation, which sft") == 1
    assert 'write {"prompt": "<image>…", "chosen": "…", "rejected": "…", "images": […]}' in error
    assert error.count("data.jsonl:") == 1
    assert (tmp_path / "out" / "index.html").exists() == (verb == "data inspect")


@pytest.mark.parametrize(
    ("records", "verb", "words"),
    [
        ([PAIR], "sft", "this one has neither; the record is a pair of answers, which dpo and rm read"),
        ([PAIR], "kto", "completion is missing; the record is a pair of answers, which dpo and rm read"),
        ([JUDGED], "rm", "chosen and rejected are missing; the record is a labelled answer, which kto reads"),
        ([SHAREGPT], "sft", "8 × no target"),
        ([{"dialogue": "Two?"}], "sft", "the record has no form that megavlm knows (fields: dialogue)"),
        (["{"], "sft", "not valid JSON"),
        ([LONG], "sft", "8 × too long"),
        ([TALK | {"messages": TALK["messages"][:1]}], "sft", "8 × no target"),
    ],
)
def test_data_of_which_nothing_can_be_used_are_not_ready(tmp_path, model_folder, capsys, records, verb, words):
    lines = [json.dumps(record) if isinstance(record, dict) else record for record in records * 8]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = {"train": [{"path": tmp_path / "data.jsonl"}], "seq_length": 256}
    with pytest.raises(UserError) as refused:
        validate.main(Settings(model={"hf": model_folder}, data=data), verb=verb)
    assert f"data for {verb}\n" in capsys.readouterr().out
    assert f"data source data: {verb} can use none of 8 inspected samples" in refused.value.message
    assert words in refused.value.message


@pytest.mark.parametrize("verb", ["validate", "data inspect"])
def test_some_samples_that_cannot_be_used_are_counted_and_named(run, verb, tmp_path):
    """A tenth of 200, of which five are among the first eight: those all over the source decide."""
    records = [TALK] * 200
    records[1:6], records[50:200:10] = ["{"] * 5, ["{"] * 15
    status, out, error = run(verb, records)
    assert (status, error) == (0, "")
    assert "not valid JSON" in out
    assert "data.jsonl:2" in out
    if verb == "validate":
        assert "ready" in out
        assert "8 inspected: 5 cannot be used" in out


@pytest.mark.parametrize("verb", ["validate", "data inspect"])
@pytest.mark.parametrize(
    ("bad", "setting"), [("{", "data.max_bad_fraction"), (LONG, "data.max_dropped_fraction")], ids=["broken", "long"]
)
def test_more_than_is_allowed_are_not_ready_until_it_is_allowed(run, verb, bad, setting, tmp_path):
    records = ([TALK] * 3 + [bad]) * 10
    status, _, error = run(verb, records)
    assert status == 2
    assert "data source data: of 40 inspected samples, 10 are" in error
    assert f"(25.0 %): more than {setting} = 0.2 10 × " in error
    assert f"raise {setting}" in error
    (tmp_path / "out").exists() and (tmp_path / "out").rename(tmp_path / "before")
    assert run(verb, records, f"{setting}=0.25")[0] == 0


@pytest.mark.parametrize(
    ("settings", "records", "verb", "because"),
    [
        ({"stage": 1}, [PAIR], "pretrain", "stage"),
        ({"align": {"loss": "ipo"}}, [JUDGED], "dpo", "align.loss"),
        ({"align": {"beta": 1.0}}, [TALK], "dpo", "align.beta"),
        ({"align": {"beta": 1.0}}, [JUDGED], "kto", "align.beta and the data"),
        ({"align": {"undesirable_weight": 2.0}}, [TALK], "kto", "align.undesirable_weight"),
        ({"align": {"centering": 0.0}}, [TALK], "rm", "align.centering"),
        ({}, [PAIR], "dpo", "the data"),
        ({}, [JUDGED], "kto", "the data"),
        ({}, [TALK], "sft", "the data"),
        ({}, ["{"], "sft", "the data"),
    ],
)
def test_the_verb_is_guessed_from_what_is_set_and_else_from_the_data(tmp_path, settings, records, verb, because):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(record) if isinstance(record, dict) else record for record in records))
    found = intended(Settings(model={"hf": "x"}, **settings), [Source("data", JsonlFile(file), 1.0)], None)
    assert (found.verb, found.because) == (verb, because)


def test_a_verb_that_is_named_refuses_what_it_would_ignore(run, model_folder):
    status, _, error = run("validate", [PAIR], "--for", "dpo", "--dry-run", "rm")
    assert status == 2
    assert "--dry-run rm and --for dpo are two verbs" in error
    status, _, error = run("validate", [TALK], "--for", "sft")
    assert status == 2
    assert "sft needs these settings: model.load (" in error
    with pytest.raises(UserError, match=r"align\.loss is not used by kto"):
        validate.main(Settings(model={"hf": model_folder}, align={"loss": "ipo"}), verb="kto")


def test_validate_says_what_a_run_would_do_with_its_output(tmp_path, model_folder):
    settings = lambda **train: Settings(model={"hf": model_folder}, output=tmp_path / "run", train=train)
    assert found_in(settings()).words == "new"
    prepare_output(settings(steps=50))
    assert found_in(settings(steps=50)).words == "begins again, because there is no checkpoint yet"
    (tmp_path / "run" / "checkpoints" / "step_00000020").mkdir(parents=True)
    assert found_in(settings(steps=50)).words == "continues after step 20"
    changed = found_in(settings(lr=0.5, steps=100), ["train.lr"])
    assert changed.words == "continues after step 20, with changed settings:\n  train.lr: null there, 0.5 now"
    assert changed.settings.train.schedule_steps == 50  # that of the run, of which the curve is drawn
    with pytest.raises(UserError, match="no output is set"):
        found_in(Settings(model={"hf": model_folder}), ["train.lr"])
    refused = found_in(settings(lr=0.5, steps=50)).words
    assert "to continue it with the new values: --change train.lr" in refused
    assert refused.startswith(f"a run would be refused: output {tmp_path / 'run'} holds a run at step 20 with other")

"""From a trained run to answers, scores, a conversation and an export, with nothing but the recipe that trained it."""

import json
import shutil

import pytest
import torch
import yaml
from parity import Toys
from safetensors.torch import load_file
from test_generate import NEW_TOKENS, questions_of, reference_answers
from test_train_verbs import megavlm, sft_config
from toy import write_records

from megavlm.cli.main import main
from megavlm.commands import export
from megavlm.convert import mcore_to_hf
from megavlm.output.held_run import holds_run
from megavlm.report.run_report import write_report

ASKED = f"generate.max_new_tokens={NEW_TOKENS}"


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def tuned(toys, tmp_path_factory):
    """(recipe, output folder, what it trained as a Hugging Face folder) of one step that changes the answers."""
    folder = tmp_path_factory.mktemp("tuned")
    config = sft_config(toys, folder, lr=1.0)
    megavlm("sft", config)
    step = folder / "run" / "checkpoints" / "step_00000001"
    mcore_to_hf(step, toys.folder("dense"), folder / "hf", progress=False)
    return config, folder / "run", folder / "hf"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_recipe_that_trained_answers_from_what_it_trained(toys, tuned):
    """Whatever cannot be read among the questions costs only itself."""
    config, run, hf = tuned
    records = questions_of(toys.records)
    theirs = reference_answers(hf, records, toys.root)
    assert theirs != reference_answers(toys.folder("dense"), records, toys.root)
    records[3]["answer"] = "Four."
    questions = toys.root / "asked.jsonl"
    lost = {"messages": [{"role": "user", "content": "<image>?"}], "images": ["lost.png"]}
    write_records(questions, [*records[:2], lost, *records[2:]])
    questions.write_text("no JSON\n" + questions.read_text())

    done = megavlm("infer", config, f"data.eval={questions}", "data.workers=2", ASKED)
    assert f"weights · step 1 of {run} ({run / 'checkpoints' / 'step_00000001'})" in done.stdout
    assert "broken sample skipped: " in done.stdout
    assert f"8 answers · 2 samples skipped: 2 broken, listed in {run / 'answers_errors.jsonl'} · " in done.stdout
    lines = lines_of(run / "answers.jsonl")
    assert [line["answer"] for line in lines] == theirs
    assert [line["index"] for line in lines] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [line["sample"] for line in lines][::7] == [f"{questions}:2", f"{questions}:10"]
    assert lines[1]["question"] == "Compare  with  and ."
    assert lines[1]["media"] == records[1]["images"]
    assert lines[2]["media"] == records[2]["videos"]
    assert [line.get("reference") for line in lines] == [None] * 3 + ["Four."] + [None] * 4
    bad = lines_of(run / "answers_errors.jsonl")
    assert [(line["index"], line["sample"], line["kind"]) for line in bad] == [
        (0, f"{questions}:1", "broken"), (3, f"{questions}:4", "broken"),
    ]  # fmt: skip
    assert "lost.png does not exist" in bad[1]["cause"]
    note = json.loads((run / "answers.json").read_text())
    assert note["weights"]["run"] == str(run)
    assert note["weights"]["step"] == 1
    assert note["sampling"] == {
        "max_new_tokens": NEW_TOKENS,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "samples": 1,
        "stop": [],
        "batch_invariant": False,
        "seed": 1234,
    }
    assert not list(run.glob("*.partial"))
    page = write_report(run).read_text()
    assert f"step 1 of {run.name}<" in page
    done = megavlm("infer", config, ASKED, "--prompt", "Two and two?")
    assert (done.stdout, f"weights · step 1 of {run}" in done.stderr) == (f"{theirs[3]}\n", True)
    assert "Answers to asked.jsonl" in page  # the run has no data.eval of its own


def test_the_recipe_that_trained_exports_and_scores_what_it_trained(toys, tuned, tmp_path, capsys):
    config, run, hf = tuned
    assert main(["export", str(config), "--out", str(tmp_path / "exported")]) == 0
    told = capsys.readouterr().out
    assert f"weights · step 1 of {run}" in told
    assert told.splitlines()[-1] == f"the model is exported to {tmp_path / 'exported'}, with a model card (README.md)"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", hf))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "Yes."}]}
    data = write_records(tmp_path / "scored.jsonl", [toys.records[3], long, questions_of(toys.records)[5]])
    done = megavlm("score", config, f"data.eval={data}")
    assert "2 samples skipped: " in done.stdout
    assert [line["kind"] for line in lines_of(run / "scores_errors.jsonl")] == ["too long", "no target"]
    (line,) = lines_of(run / "scores.jsonl")
    assert (line["question"], line["reference"], line["media"]) == ("Two and two?", "Four.", [])
    assert line["tokens"] == len(line["logprobs"])
    assert json.loads((run / "scores.json").read_text())["weights"]["step"] == 1


def test_a_damaged_file_of_a_run_is_noticed_before_the_weights_are_written(tuned, tmp_path, capsys, monkeypatch):
    """Of an earlier run, the model card alone does without it."""
    config, run, _ = tuned
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/config.yaml").write_text("{")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["load"] = str(tmp_path / "earlier")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
    load = ("export", config, f"model.load={tmp_path / 'run'}", f"output={tmp_path / 'other'}", "--out")
    assert main([*map(str, load), str(tmp_path / "exported")]) == 0
    assert f"does not tell of an earlier run: {tmp_path / 'earlier/config.yaml'}" in capsys.readouterr().out
    assert "What came before is not known in full" in (tmp_path / "exported/README.md").read_text()

    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").mkdir()
    monkeypatch.setattr(export, "mcore_to_hf", None)  # weights are not written
    assert main([*map(str, load), str(tmp_path / "again")]) == 2
    assert "metrics.jsonl cannot be read" in " ".join(capsys.readouterr().err.split())


def test_another_model_does_not_answer_into_the_folder_of_a_run(toys, tuned, tmp_path, capsys):
    config, _, _ = tuned
    other = f"model.load={toys.checkpoint('dense-untied')}"
    data = f"data.eval={write_records(tmp_path / 'one.jsonl', toys.records[:1])}"
    for verb, *more in (
        ("infer", data),
        ("infer", "--prompt", "?"),
        ("score", data),
        ("chat",),
        ("export", "--out", str(tmp_path / "out")),
    ):
        assert main([verb, str(config), other, "overwrite=true", *more]) == 2
        assert "is neither a checkpoint nor the start of" in " ".join(capsys.readouterr().err.split())


def test_nothing_usable_ends_with_status_2_and_leaves_nothing(toys, tuned, tmp_path):
    config, _, _ = tuned
    (tmp_path / "bad.jsonl").write_text("[]\nno JSON\n")
    out = tmp_path / "out"
    done = megavlm("infer", config, f"data.eval={tmp_path / 'bad.jsonl'}", f"output={out}", status=2)
    assert f"can be used (2 samples skipped: 2 broken, listed in {out / 'answers_errors.jsonl'}); the" in done.stderr
    assert done.stderr.count("error:") == 1
    assert sorted(path.name for path in out.iterdir()) == ["answers_errors.jsonl", "config.yaml"]
    assert not holds_run(out)  # so that it can be tried again


def test_a_conversation_is_that_of_transformers(toys, tuned, tmp_path):
    """Two questions with a picture and a clip's frames between them; mistakes are told, and it goes on."""
    config, run, hf = tuned
    first, second = toys.records[0], "And now?"
    say = lambda role, content: {"role": role, "content": content}
    asked = {"messages": [say("user", "<image>What is this?")], "images": first["images"]}
    (one,) = reference_answers(hf, [asked], toys.root)
    asked["messages"] += [say("assistant", one), say("user", second)]
    (two,) = reference_answers(hf, [asked], toys.root)
    (fresh,) = reference_answers(hf, [{"messages": [say("user", second)]}], toys.root)
    assert len({one, two, fresh}) == 3
    typed = f"""\
/image {toys.root / "nowhere.png"}
/picture x
/image
/image '{toys.root / first["images"][0]}'
What is this?

/video {toys.root / "clip.mp4"}
What happens?
{second}
/reset
{second}
/help
"""
    (toys.root / "clip.mp4").touch()
    for layout in ((), ("parallel.tensor=2", "--nproc", 2)):
        done = megavlm("chat", config, ASKED, *layout, stdin=typed)
        assert done.stdout.split("/image PATH")[0] == f"{one}\n{two}\n{fresh}\n"
        assert "nowhere.png does not exist" in done.stderr
        assert "unknown command /picture" in done.stderr
        assert "/image needs a path" in done.stderr
        assert "clip.mp4 cannot be read" in done.stderr
        assert f"weights · step 1 of {run}" in done.stderr
        assert "Traceback" not in done.stderr

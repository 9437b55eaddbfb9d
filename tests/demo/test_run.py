"""The demo's runner without its training: what it refuses, what it prints, and how it counts and compares answers."""

import json

import pytest

from megavlm.demo import answers, commands, run
from megavlm.demo.commands import minutes
from megavlm.demo.data import HELDOUT_FILE

pytestmark = pytest.mark.usefixtures("own_environment")


def write_answers(path, given):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"index": i, "answer": answer}) + "\n" for i, answer in enumerate(given))
    path.write_text("".join(lines))


def test_existing_folder_is_refused(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert run.main(["--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_overwrite_removes_the_demo_s_own_parts_alone(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for name in ("mine", "data", "stage1", "exported"):
        (out / name).mkdir(parents=True)
    monkeypatch.setattr(
        "megavlm.demo.data.write_data", lambda path: (_ for _ in ()).throw(commands.CommandFailed("here"))
    )
    assert run.main(["--out", str(out), "--overwrite"]) == 1
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_commands_are_those_that_are_printed_and_a_failing_one_ends_the_demo(tmp_path, started, capsys):
    started.failing = "export"
    demo = run.Demo(tmp_path / "out")
    with pytest.raises(commands.CommandFailed, match=r"export .* ended with status 3"):
        demo.train()
    printed = [line[2:].split() for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    verbs = ["infer", "pretrain", "pretrain", "pretrain", "pretrain", "sft", "export"]
    assert len(printed) == len(verbs)
    for line, command, verb in zip(printed, started.commands, verbs, strict=True):
        assert verb in " ".join(line)
        assert command[-len(line) + 1 :] == line[1:]  # all but "megavlm" or "python"


def test_check_compares_with_transformers_and_vllm(tmp_path, demo_data, demo_model, monkeypatch, capsys):
    """An untrained model: its answers agree, but are not right. tests/commands/test_export.py asks vLLM itself."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "data").symlink_to(demo_data)
    (out / "exported").symlink_to(demo_model)
    demo = run.Demo(out)
    questions = demo.sft.data.eval[0].path
    assert questions == out / "data" / f"{HELDOUT_FILE}.jsonl"
    theirs = answers.transformers_answers(demo_model, questions, demo.sft.generate.max_new_tokens)
    expected = answers.expected_answers(questions)
    assert len(theirs) == len(expected) == 360

    write_answers(out / "before" / "answers.jsonl", theirs)
    write_answers(out / "after" / "answers.jsonl", expected)
    monkeypatch.setattr(answers, "vllm_answers", lambda *_: None)
    assert not demo.check()  # all right, but transformers says something else
    monkeypatch.setattr(answers, "transformers_answers", lambda *_: expected)
    capsys.readouterr()
    assert demo.check()
    printed = capsys.readouterr().out
    assert "360 right, 100.0%" in printed
    assert "vLLM is not installed" in printed
    monkeypatch.setattr(answers, "vllm_answers", lambda *_: [*expected[:-1], "x"])
    assert not demo.check()  # vLLM says something else
    printed = capsys.readouterr().out
    assert "359 of 360 answers of vLLM agree" in printed
    assert f"question 359: megavlm '{expected[-1]}', vLLM 'x'" in printed
    monkeypatch.setattr(answers, "vllm_answers", lambda *_: None)
    monkeypatch.setattr(answers, "transformers_answers", lambda *_: theirs)
    write_answers(out / "after" / "answers.jsonl", theirs)
    assert not demo.check()  # the same answers, but wrong
    assert "360 of 360 answers of transformers agree" in capsys.readouterr().out


def test_transformers_answers_are_those_of_one_question_at_a_time(tmp_path, demo_data, demo_model):
    """Batches are padded on the left: questions of different length do not disturb each other."""
    lines = (demo_data / "questions.jsonl").read_text().splitlines()[:6]
    assert len({json.loads(line)["messages"][0]["content"] for line in lines}) > 1
    batch = tmp_path / "batch.jsonl"
    text = "\n".join(lines).replace("digits/", f"{demo_data}/digits/")
    batch.write_text(text)
    together = answers.transformers_answers(demo_model, batch, 4)
    one = tmp_path / "one.jsonl"
    for i, line in enumerate(text.splitlines()):
        one.write_text(line)
        assert answers.transformers_answers(demo_model, one, 4) == [together[i]]


def test_answers_of_other_questions_are_refused(tmp_path):
    write_answers(tmp_path / "answers.jsonl", ["1", "2"])
    assert answers.read_answers(tmp_path / "answers.jsonl", 2) == ["1", "2"]
    with pytest.raises(ValueError, match="expected 3"):
        answers.read_answers(tmp_path / "answers.jsonl", 3)


def test_only_the_digit_alone_is_right():
    assert answers.count_right(["7", " 7\n", "17", "a 7", ""], ["7"] * 5) == 2


def test_a_duration_has_less_than_sixty_seconds():
    assert [minutes(seconds) for seconds in (3.4, 59.6, 179.6, 256)] == ["3 s", "1 min 0 s", "3 min 0 s", "4 min 16 s"]

"""report.html: stages found by their checkpoints, answers with pictures, one file that needs no other."""

import base64
import io
import json
import re
import shutil

import pytest
import yaml
from PIL import Image

from megavlm.monitor.metrics import REQUIRED, MetricsWriter
from megavlm.report import run_report
from megavlm.report.answers import MAX_SAMPLES, MAX_WRONG, group_answers, is_right, read_source, reference_of
from megavlm.report.run_data import changes_of
from megavlm.report.run_report import follow, write_report


def write_run(folder, load=None, stage=None, steps=5, **sections):
    """An output folder with metrics, a checkpoint and settings."""
    (folder / f"checkpoints/step_{steps:08d}").mkdir(parents=True)
    config = {"stage": stage, "model": {"hf": "hf", "load": load and str(load), "freeze": []}, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            writer.write({**dict.fromkeys(REQUIRED, 1.0), "step": step, "loss": 3.0 / step, "mfu": None})
    return folder / f"checkpoints/step_{steps:08d}"


def write_questions(folder, count):
    """Questions with one picture each, whose answer is their number; returns the file."""
    folder.mkdir()
    lines = []
    for index in range(count):
        Image.new("RGB", (64, 32), (index % 256, 80, 80)).save(folder / f"{index}.png")
        content = [{"role": "user", "content": f"<image>Number {index}?"}, {"role": "assistant", "content": f"{index}"}]
        lines.append(json.dumps({"messages": content, "images": [f"{index}.png"]}))
    (folder / "eval.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "eval.jsonl"


def write_answers(folder, answers, load=None, questions=None, weights=None):
    """Answers with the settings of their folder, or with a note of the weights that they were made from."""
    folder.mkdir(exist_ok=True)
    if weights is not None:
        note = {"weights": weights, "data": {"eval": questions and str(questions)}}
        (folder / "answers.json").write_text(json.dumps(note))
    if load is not None:
        config = {"model": {"load": str(load)}, "data": {"eval": questions and str(questions)}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.dumps({"index": index, "answer": answer}) for index, answer in enumerate(answers)]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def runs(tmp_path):
    """Two stages, a tuning run, and answers from before and after it."""
    questions = write_questions(tmp_path / "data", 40)
    first = write_run(tmp_path / "runs/stage0", load=tmp_path / "start", stage=0)
    second = write_run(tmp_path / "runs/stage1", load=first, stage=1, steps=7)
    tuned = write_run(tmp_path / "runs/sft", load=second, data={"eval": str(questions)})
    wrong = ["?"] * 30
    write_answers(tmp_path / "runs/before", wrong + [str(i) for i in range(30, 40)], second, questions)
    write_answers(tmp_path / "runs/after", [str(i) for i in range(20)] + ["?"] * 20, tuned, questions)
    return tmp_path / "runs"


def test_chain_is_followed_to_its_start(runs):
    assert [run.name for run in follow(runs / "sft", [])] == ["stage 0", "stage 1", "sft"]
    assert [run.name for run in follow(runs / "stage1", [])] == ["stage 0", "stage 1"]


def test_chain_of_moved_folders(runs, tmp_path):
    shutil.move(runs, tmp_path / "elsewhere")
    assert [run.name for run in follow(tmp_path / "elsewhere/sft", [])] == ["stage 0", "stage 1", "sft"]


def test_chain_by_paths_relative_to_where_it_was_started(tmp_path, monkeypatch):
    write_run(tmp_path / "work/runs/a")
    write_run(tmp_path / "work/runs/b", load="runs/a")  # a run folder stands for its newest checkpoint
    monkeypatch.chdir("/")
    assert [run.name for run in follow(tmp_path / "work/runs/b", [])] == ["a", "b"]


def test_chain_that_bites_its_tail(tmp_path):
    write_run(tmp_path / "a", load=tmp_path / "b/checkpoints/step_00000005")
    write_run(tmp_path / "b", load=tmp_path / "a/checkpoints/step_00000005")
    assert [run.name for run in follow(tmp_path / "a", [])] == ["b", "a"]


def test_page_has_everything_and_needs_nothing(runs):
    page = write_report(runs / "sft").read_text()
    assert page.count('class="charts"') == 3
    for text in ("stage 0", "stage 1", "Answers to eval.jsonl", "Number 39?", "model.load", "Tokens per second"):
        assert text in page
    assert "50.0 %</b> <span" in page  # after: 20 of 40
    assert "25.0 %</b> <span" in page  # before: 10 of 40
    assert page.index(">before<") < page.index(">after<")
    assert not re.search(r"https?://|<link|@import|url\(", page)
    assert set(re.findall(r'src="(.{11})', page)) == {"data:image/"}
    assert "None" not in page
    assert "Undefined" not in page


def test_passes_over_sources_and_changed_settings_are_shown(tmp_path):
    write_run(tmp_path / "run", steps=1)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        for step, passes in ((2, {"charts": 0.5, "gone": 1.25}), (3, {"charts": 1.0 / 3, "talks": 2.0})):
            line = {**dict.fromkeys(REQUIRED, 1.0), "step": step} | {f"epoch/{k}": v for k, v in passes.items()}
            file.write(json.dumps(line) + "\n")
    change = {"step": 2, "time": "2026-01-02 03:04:05", "setting": "train.lr", "old": 1e-5, "new": None}
    (tmp_path / "run/changes.jsonl").write_text(json.dumps(change) + "\n[]\n{\n")
    words = " ".join(re.sub(r"<[^>]*>", "", write_report(tmp_path / "run").read_text()).split())
    assert "passes over its data: charts 0.333 · gone 1.25 · talks 2" in words
    assert words.count("continued after step") == 1
    assert "continued after step 2 (2026-01-02 03:04:05) with train.lr null instead of 1.0e-05" in words


def test_pictures_are_thumbnails_of_the_right_ones(runs):
    page = write_report(runs / "sft").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    asked = [int(number) for number in re.findall(r"Number (\d+)\?", page)]
    assert len(pictures) == len(asked) == MAX_SAMPLES
    for data, number in zip(pictures, asked, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.getpixel((0, 0)) == (number, 80, 80)


def test_report_again_replaces_the_first(runs):
    write_report(runs / "sft")
    (runs / "after/accuracy.json").write_text('{"accuracy": 0.975}')  # counted by somebody else
    page = write_report(runs / "sft").read_text()
    assert "97.5 %</b><span>right answers, 25.0\N{NO-BREAK SPACE}% before" in page
    assert not [path for path in (runs / "sft").iterdir() if path.name.startswith(".")]


def test_answers_from_the_very_start_come_first(runs):
    start = runs.parent / "start"
    start.mkdir()
    write_answers(runs / "untrained", ["?"] * 40, start, runs.parent / "data/eval.jsonl")
    write_answers(runs / "of another model", ["?"] * 40, runs.parent / "data", runs.parent / "data/eval.jsonl")
    page = write_report(runs / "sft").read_text()
    assert page.index(">untrained<") < page.index(">before<") < page.index(">after<")
    assert "of another model" not in page


def right_ones(count):
    return [str(index) if index < count else "?" for index in range(40)]


def test_answers_of_a_start_are_not_shown_as_those_of_the_run(runs):
    """They may be in its folder, because they were made before it was trained there."""
    questions, start = runs.parent / "data/eval.jsonl", runs.parent / "start"
    start.mkdir()
    for folder in ("before", "after"):
        shutil.rmtree(runs / folder)
    write_answers(runs / "sft", right_ones(15), weights={"load": str(start)}, questions=questions)
    page = write_report(runs / "sft").read_text()
    assert "right answers" not in page  # no headline
    assert "made from start" in page
    tuned = {"run": str(runs / "sft"), "step": 5, "load": str(runs / "sft/checkpoints/step_00000005")}
    write_answers(runs / "tuned", right_ones(36), weights=tuned, questions=questions)
    page = write_report(runs / "sft").read_text()
    assert "90.0 %</b><span>right answers, 37.5\N{NO-BREAK SPACE}% before" in page
    assert "step 5 of sft" in page
    (runs / "sft/answers.json").unlink()  # from before this was recorded: nobody knows
    page = write_report(runs / "sft").read_text()
    assert "90.0 %</b><span>right answers</span>" in page


def test_answers_of_an_adapter_are_those_of_its_run(runs):
    """Not those of the base that they were made on."""
    questions, base = runs.parent / "data/eval.jsonl", runs / "sft/checkpoints/step_00000005"
    adapter = write_run(runs / "lora", load=base)
    for name, config in {"noted": None, "older": {"model": {"load": str(base), "adapter": str(runs / "lora")}}}.items():
        weights = {"run": str(runs / "lora"), "step": 5, "load": str(base), "adapter": str(adapter)}
        write_answers(runs / name, right_ones(10), weights=None if config else weights, questions=questions)
        if config:
            (runs / name / "config.yaml").write_text(yaml.safe_dump({**config, "data": {"eval": str(questions)}}))
        assert (
            "25.0 %</b><span>right answers, 25.0\N{NO-BREAK SPACE}% before" in write_report(runs / "lora").read_text()
        )
        shutil.rmtree(runs / name)


def test_report_of_answers_alone(runs):
    page = write_report(runs / "after").read_text()
    assert page.count('class="charts"') == 3
    assert "Number 39?" in page


def test_choice_has_some_wrong_and_spreads_over_the_rest(runs):
    source = read_source(runs / "after", runs.parent / "data/eval.jsonl")
    (group,) = group_answers([source])
    wrong = [sample.index for sample in group.samples if sample.answers[0][0][1] is False]
    assert len(wrong) == MAX_WRONG
    assert (wrong[0], wrong[-1]) == (20, 39)
    assert len(group.samples) == MAX_SAMPLES
    assert (source.right, source.total) == (20, 40)


def test_text_is_escaped(tmp_path):
    write_run(tmp_path / "run", data={"eval": str(tmp_path / "eval.jsonl")})
    question = {"messages": [{"role": "user", "content": "<script>alert(1)</script>"}], "answer": "<b>"}
    (tmp_path / "eval.jsonl").write_text(json.dumps(question))
    own = {"run": str(tmp_path / "run"), "load": str(tmp_path / "run/checkpoints/step_00000005"), "step": 5}
    write_answers(tmp_path / "run", ["<img src=x>\n\n\n"], weights=own, questions=tmp_path / "eval.jsonl")
    page = write_report(tmp_path / "run").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "✗ &lt;img src=x&gt;</dd>" in page  # without the empty lines at its end
    assert "<img src=x>" not in page


def test_what_is_missing_or_broken_is_left_out_or_named(tmp_path):
    write_run(tmp_path / "run", load=tmp_path / "gone/checkpoints/step_1", data={"eval": str(tmp_path / "eval.jsonl")})
    lines = [
        {"messages": [{"role": "user", "content": "<image>lost picture?"}], "images": ["lost.png"]},
        {"messages": [{"role": "user", "content": "<image>too few?"}]},
        {"text": "plain text"},
    ]
    (tmp_path / "eval.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\nnot json\n")
    own = {"run": str(tmp_path / "run"), "load": str(tmp_path / "run/checkpoints/step_00000005"), "step": 5}
    answers = ["a", "b", "c", "d", "beyond the file"]
    write_answers(tmp_path / "run", answers, weights=own, questions=tmp_path / "eval.jsonl")
    with (tmp_path / "run/metrics.jsonl").open("a") as torn:
        torn.write('{"step": 6, "lo')
    page = write_report(tmp_path / "run").read_text()
    for text in (
        "lost.png does not exist",
        "the text contains 1 &lt;image&gt;, but images has 0 entries",
        "plain text",
        "sample 4",
    ):
        assert text in page
    assert "5 of 5 questions" in page


def test_the_lowest_held_out_loss_is_told(tmp_path):
    write_run(tmp_path / "run", steps=1)
    assert "held-out" not in write_report(tmp_path / "run").read_text()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        for step, loss in ((2, 1.5), (3, None), (4, 0.25), (5, 0.5)):
            file.write(json.dumps({**dict.fromkeys(REQUIRED, 1.0), "step": step, "eval/loss": loss}) + "\n")
    assert "<b>0.2500</b><span>lowest held-out loss, at step 4</span>" in write_report(tmp_path / "run").read_text()


def test_run_without_settings(tmp_path):
    """Beside a folder with a file that is named as answers are."""
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "answers.jsonl").write_text('{"index": 0, "text": "not of infer"}\n')
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    with MetricsWriter(tmp_path) as writer:
        writer.write({**dict.fromkeys(REQUIRED, None), "step": 1, "loss": float("nan"), "seconds": 1.0})
    page = write_report(tmp_path).read_text()
    assert "has no config.yaml" in page


def test_changed_settings_are_marked(runs):
    page = write_report(runs / "stage1").read_text()
    changed = re.findall(r'class="changed"><td><code>([^<]*)', page)
    assert changed == ["model.load", "stage"]


def test_references():
    assert (
        reference_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]}) == "b"
    )
    assert reference_of({"messages": [{"role": "user", "content": "a"}]}) is None
    assert reference_of({"problem": "1 + 1", "answer": 2}) == "2"
    assert reference_of({"text": "a"}) is None
    assert is_right(" Seven.", "seven")
    assert not is_right("17", "7")


def test_command(runs, tmp_path, capsys):
    assert run_report.main([str(runs / "sft"), str(runs / "stage0")]) == 0
    assert (runs / "stage0/report.html").is_file()
    (tmp_path / "empty").mkdir()
    assert run_report.main([str(tmp_path / "empty")]) == 2
    assert "nothing to report" in capsys.readouterr().err


def test_line_ends_inside_an_answer_do_not_end_its_line(tmp_path):
    """U+2028, U+2029 and U+0085, which JSON may contain as they are; infer writes them so."""
    write_run(tmp_path / "run", steps=1)
    odd = "one\u2028two\u2029three\x85four"
    answer = {"index": 0, "answers": [odd]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_source(tmp_path, None).answers == {0: [odd]}
    change = {"step": 1, "time": "now", "setting": "output", "old": odd, "new": None}
    (tmp_path / "run/changes.jsonl").write_text(json.dumps(change, ensure_ascii=False) + "\n", encoding="utf-8")
    assert changes_of(tmp_path / "run") == [change]


def test_all_of_several_answers_are_shown_and_counted(tmp_path):
    questions, folder = write_questions(tmp_path / "data", 3), tmp_path / "runs"
    folder.mkdir()
    lines = [{"index": 0, "answers": ["0", "5"]}, {"index": 1, "answers": ["1", "1."]}, {"index": 2, "answer": "7"}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = read_source(folder, questions)
    (group,) = group_answers([source])
    assert (source.right, source.total) == (3, 5)
    assert [sample.answers for sample in group.samples] == [
        [[("0", True), ("5", False)]],
        [[("1", True), ("1.", True)]],
        [[("7", False)]],
    ]

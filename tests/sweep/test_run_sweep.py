"""Every file of a run, spoiled in every way: what shows runs shows the rest, or says in words which file is damaged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from spoiling import FAULTS, run_here, spoiled

from megavlm.base.errors import UserError
from megavlm.monitor.metrics import REQUIRED, MetricsWriter
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup, RolloutLog
from megavlm.report.run_report import write_report
from megavlm.watch.follow import find_runs
from megavlm.watch.server import PageServer

FILES = (
    *("config.yaml", "metrics.jsonl", "changes.jsonl", "rollouts.jsonl", "held_out_answers.jsonl"),
    *("expert_load.json", "plan.json", "answers.jsonl", "answers.json", "accuracy.json"),
)
LINES = ("metrics.jsonl", "changes.jsonl", "rollouts.jsonl", "held_out_answers.jsonl")
REFUSED = {
    *(("config.yaml", fault) for fault in ("nested too deeply", "binary", "a list", "not permitted")),
    *((name, fault) for name in LINES for fault in ("a folder", "not permitted")),
}
# A line without its end may be that of a run that was killed; a folder or a dangling link is no file of answers.
LEFT_OUT = {
    *((name, "binary") for name in LINES),
    *(
        (name, fault)
        for name in ("accuracy.json", "expert_load.json")
        for fault in FAULTS
        if fault != "a dangling link"
    ),
    *(("answers.json", fault) for fault in FAULTS if fault not in ("a folder", "a dangling link")),
    *(("answers.jsonl", fault) for fault in FAULTS if fault not in ("emptied", "a folder", "a dangling link")),
}
WRONG = {  # names as they should be, with values of other types
    "metrics.jsonl": '{"step": 1, "loss": "x", "lr": [1], "grad_norm": {"a": 1}, "seconds": true}\n',
    "changes.jsonl": '{"step": "x", "time": 1, "setting": [], "old": {}, "new": null}\n',
    "rollouts.jsonl": '{"step": 4, "groups": 5}\n',
    "held_out_answers.jsonl": '{"step": 4, "groups": [{"answers": 3}]}\n',
    "expert_load.json": '{"tokens": [[1, 2]]}',
    "plan.json": json.dumps({"device": None, "gpu": 1, "stages": [], "time": 2}),
    "config.yaml": "model: {load: 5}",
    "answers.jsonl": '{"index": 0, "answer": 5}\n',
    "answers.json": '{"weights": {"run": 5, "load": 7}, "data": {"eval": 5, "media_roots": 3}}',
    "accuracy.json": '{"accuracy": "x"}',
}
PLAN = {
    "device": None, "gpu": {"name": "H100"}, "world_size": 1, "mix": "full rows", "caveats": "", "mfu": 0.4,
    "stages": [{"total": 2**30}], "time": {"seconds": 2.0}, "tokens_per_second": 1000.0,
}  # fmt: skip

ANSWER = {"text": "0", "reward": 1.0, "parts": {}, "advantage": None, "tokens": 1, "finish": "stop"}
GROUP = {"sample": "a.jsonl:1", "question": "Q of this group?", "media": [], "reference": None, "answers": [ANSWER]}
ODD_ANSWERS = [
    *({"text": 5}, {"reward": "x"}, {"reward": 10**400}, {"parts": 5}, {"parts": {"a": "x"}}, {"tokens": "x"}),
    *({"finish": []}, {"failures": 5}, {"turns": 5}, {"turns": [{}]}, {"turns": [{"by": "model", "text": 5}]}),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The output folder of a run that has all files, beside one of answers alone and the questions."""
    folder = tmp_path_factory.mktemp("runs")
    Image.new("RGB", (64, 32)).save(folder / "0.png")
    talk = [{"role": "user", "content": "<image>Number 0?"}, {"role": "assistant", "content": "0"}]
    (folder / "eval.jsonl").write_text(json.dumps({"messages": talk, "images": ["0.png"]}) + "\n")
    run, other = folder / "run", folder / "other"
    checkpoint = run / "checkpoints/step_00000004"
    checkpoint.mkdir(parents=True)
    data = {"eval": "eval.jsonl"}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": "hf"}, "train": {"steps": 4}, "data": data}))
    with MetricsWriter(run) as writer:
        for step in range(1, 5):
            writer.write({**dict.fromkeys(REQUIRED, 1.0), "step": step, "loss": 3.0 / step, "mfu": None})
    change = {"step": 1, "time": "now", "setting": "train.lr", "old": 1, "new": 2}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    (run / "expert_load.json").write_text(json.dumps({"step": 4, "layers": [0], "tokens": [[3, 1]]}))
    (run / "plan.json").write_text(json.dumps(PLAN))
    answer = LoggedAnswer("0", 1.0, {}, 0.0, 1, "stop")
    for name in ("rollouts.jsonl", "held_out_answers.jsonl"):
        RolloutLog(run, name=name).write(4, [LoggedGroup("train.jsonl:1", "Q?", [], "0", [answer])])
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    for place in (run, other):
        (place / "answers.jsonl").write_text('{"index": 0, "answer": "0"}\n')
        note = {"weights": {"run": str(run), "load": str(checkpoint), "step": 4}, "data": data}
        (place / "answers.json").write_text(json.dumps(note))
        (place / "accuracy.json").write_text('{"accuracy": 1.0}')
    return folder


def shown(run) -> str:
    return write_report(run).read_text()


def left_out(page: str) -> list[Path]:
    """The files that are named as left out."""
    _, _, told = page.partition("Left out of this report")
    return [Path(re.split(r"[:\s]", item)[0]) for item in re.findall(r"<li>(.*?)</li>", told.partition("</ul>")[0])]


def test_nothing_is_spoiled(runs, capfd):
    page = shown(runs / "run")
    for word in ("100.0", "train.lr", "Predicted", "Q?", "Load of each expert"):
        assert word in page
    assert left_out(page) == []
    assert run_here(capfd, "watch", "--text", "--once", str(runs / "run")) == (0, "")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_the_report(runs, name, fault):
    """It needs its settings, and logs that can be opened; what else is damaged is left out and named."""
    with spoiled(runs / "run" / name, fault):
        if (name, fault) in REFUSED:
            with pytest.raises(UserError, match=name):
                shown(runs / "run")
        else:
            page = shown(runs / "run")
            assert ("plan.json is damaged" in page) == (name == "plan.json" and fault != "a dangling link")
            assert left_out(page) == [runs / "run" / name] * ((name, fault) in LEFT_OUT)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["config.yaml", "answers.jsonl", "answers.json", "accuracy.json"])
def test_the_report_of_a_folder_beside_it(runs, name, fault):
    """Only its answers are missing then."""
    with spoiled(runs / "other" / name, fault):
        page = shown(runs / "run")
    assert left_out(page) == [runs / "other" / name] * ((name, fault) in LEFT_OUT | REFUSED)


@pytest.mark.parametrize("who", ["run", "other"])
@pytest.mark.parametrize("name", WRONG)
def test_values_of_another_type(runs, capfd, name, who):
    if (runs / who / name).exists():
        with spoiled(runs / who / name, "emptied"):
            (runs / who / name).write_text(WRONG[name])
            if (who, name) == ("run", "config.yaml"):
                with pytest.raises(UserError, match=r"config\.yaml: model\.load is 5 instead of a path"):
                    shown(runs / "run")
                return
            page = shown(runs / "run")
            assert run_here(capfd, "watch", "--text", "--once", str(runs / "run")) == (0, "")
        named = name != "plan.json"
        assert left_out(page) == ([runs / who] if name == "answers.json" else [runs / who / name] * named)
        assert ("plan.json is damaged" in page) == (name == "plan.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("accuracy.json", text) for text in ("1" * 400, "1e999", "NaN", '{"accuracy": [1]}')),
        *(
            ("answers.jsonl", f'{{"index": 0, "answers": {several}}}\n')
            for several in ('"abc"', '{"a": 1}', "[1]", "5")
        ),
    ],
)
def test_no_answers_and_no_accuracy_in_a_folder_beside_it(runs, name, text):
    with spoiled(runs / "other" / name, "emptied"):
        (runs / "other" / name).write_text(text)
        assert left_out(shown(runs / "run")) == [runs / "other" / name]


SETTINGS = (  # that no run has written
    *("model: hf", "model: {load: 5}", "model: {load: [a]}", "model: {freeze: 5}", "model: {freeze: [{}]}"),
    *("model: {adapter: {}}", "train: 5", "train: {unfreeze_after: 5}", "data: 5", "data: {media_roots: 3}"),
    *("data: {media_roots: [3]}", "data: {media_protocols: file}", "5", "[1, 2]"),
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_of_another_type_in_the_own_folder(runs, settings):
    with spoiled(runs / "run/config.yaml", "emptied"):
        (runs / "run/config.yaml").write_text(settings)
        with pytest.raises(UserError, match=r"config\.yaml(: .* is | holds a )"):
            shown(runs / "run")


@pytest.fixture
def later(runs):
    """A run that started from the other one."""
    load = runs / "run/checkpoints/step_00000004"
    (runs / "later").mkdir()
    (runs / "later/config.yaml").write_text(yaml.safe_dump({"model": {"hf": "hf", "load": str(load)}}))
    shutil.copy(runs / "run/metrics.jsonl", runs / "later")
    yield runs / "later"
    shutil.rmtree(runs / "later")


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_of_another_type_in_the_folder_of_a_predecessor(runs, later, settings):
    assert left_out(shown(later)) == []
    with spoiled(runs / "run/config.yaml", "emptied"):
        (runs / "run/config.yaml").write_text(settings)
        assert left_out(shown(later)) == [runs / "run/config.yaml"]


@pytest.mark.parametrize("load", ["x" * 5000, "a\0b/checkpoints/step_1", "x" * 300 + "/checkpoints/step_1", ""])
def test_a_predecessor_whose_path_no_folder_can_have(runs, later, load):
    (later / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": "hf", "load": load}}))
    assert left_out(shown(later)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        *({"time": {"seconds": seconds}} for seconds in ("x", None, [1], float("nan"), 10**400, True)),
        *({"world_size": size} for size in (0, -1, "x", None, float("inf"))),
        *(
            {"mfu": "x"},
            {"tokens_per_second": {}},
            {"stages": [{"total": "x"}]},
            {"stages": {"a": 1}},
            {"stages": [5]},
            {"stages": [{"moments": [5]}]},
        ),
        *({"device": 5}, {"gpu": {"name": None}}, {"mix": ["a"]}, {"caveats": 5}, {"error": 5}, {"error": ""}),
    ],
    ids=str,
)
def test_a_plan_with_wrong_values(runs, wrong):
    with spoiled(runs / "run/plan.json", "emptied"):
        (runs / "run/plan.json").write_text(json.dumps(PLAN | wrong))
        page = shown(runs / "run")
        assert "plan.json is damaged, or of another version" in page
        assert left_out(page) == []


ODD_GROUPS = [
    *(5, [5], [{}], [GROUP | {"answers": [5]}], [GROUP | {"media": 5}], [GROUP | {"sample": 5}]),
    *([GROUP | {"answers": [ANSWER | wrong]}] for wrong in ODD_ANSWERS),
]


@pytest.mark.parametrize("name", ["rollouts.jsonl", "held_out_answers.jsonl"])
def test_answers_of_another_form_are_counted(runs, name):
    """The others are shown."""
    with spoiled(runs / "run" / name, "emptied"):
        lines = [{"step": 1 + number, "groups": groups} for number, groups in enumerate([*ODD_GROUPS, [GROUP]])]
        (runs / "run" / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = shown(runs / "run")
        assert f"{name}: {len(ODD_GROUPS)} lines, with fields of another form" in page
        assert left_out(page) == [runs / "run" / name]
        assert "Q of this group?" in page


def test_values_that_are_no_numbers_are_counted(runs):
    good = json.loads((runs / "run/metrics.jsonl").read_text().split("\n")[0])
    odd = ["x", [1], {}, float("nan"), float("-inf"), 10**400, 1e300]
    steps = [-1, 10**400, 2**62, True, None, 1.5]
    lines = [good, *(good | {"loss": value, "seconds": value} for value in odd), *({"step": step} for step in steps)]
    with spoiled(runs / "run/metrics.jsonl", "emptied"):
        (runs / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = shown(runs / "run")
        told = f"{len(steps)} lines, damaged or without a step; {2 * len(odd)} values, no number that a report can show"
        assert f"metrics.jsonl: {told}" in page
        assert left_out(page) == [runs / "run/metrics.jsonl"]


def test_changes_without_their_fields_are_counted(runs):
    with spoiled(runs / "run/changes.jsonl", "emptied"):
        (runs / "run/changes.jsonl").write_text('{"step": 1}\n{"step": 2, "setting": "a"}\n')
        assert "changes.jsonl: 2 lines, with fields of another form" in shown(runs / "run")


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("answers.jsonl", "[]\n", "answers.jsonl:1: not an answer with its index"),
        ("accuracy.json", "[]", "accuracy.json cannot be read: it is neither a number nor"),
        ("answers.jsonl", "", "answers.jsonl has no answers of this run"),
        ("metrics.jsonl", "[]\n{}\n", "metrics.jsonl: 2 lines, damaged or without a step"),
        ("metrics.jsonl", '{"step": 1', "metrics.jsonl has no complete line of a step"),
        ("metrics.jsonl", '{"step": 0}\n', "metrics.jsonl has no complete line of a step"),
    ],
)
def test_a_folder_that_has_nothing_else(tmp_path, name, text, cause):
    """The message has the cause."""
    (tmp_path / "run").mkdir()
    if name == "accuracy.json":
        (tmp_path / "run/answers.jsonl").write_text('{"index": 0, "answer": "0"}\n')
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError) as refused:
        shown(tmp_path / "run")
    assert cause in refused.value.message
    assert "neither metrics.jsonl nor" not in refused.value.message


def test_half_a_surrogate_pair_in_an_answer(runs):
    with spoiled(runs / "run/answers.jsonl", "emptied"):
        (runs / "run/answers.jsonl").write_text('{"index": 0, "answer": "so \\ud83d it is"}\n')
        assert "so ? it is" in shown(runs / "run")


@pytest.mark.parametrize("settings", ["model: hf", "data: {eval: 5}", "data: {eval: [{}]}", "data:\n  ev"])
def test_settings_of_another_type_in_a_folder_beside_it(runs, settings):
    with spoiled(runs / "other/config.yaml", "emptied"), spoiled(runs / "other/answers.json", "a dangling link"):
        load = "" if "model" in settings else f"model: {{load: {runs / 'run/checkpoints/step_00000004'}}}\n"
        (runs / "other/config.yaml").write_text(load + settings)
        is_checked = "eval" not in settings
        assert left_out(shown(runs / "run")) == [runs / "other/config.yaml" if is_checked else runs / "other"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_watching(runs, capfd, name, fault):
    (followed,) = find_runs([runs / "run"])
    with spoiled(runs / "run" / name, fault), PageServer([followed], None) as server:
        status, printed = run_here(capfd, "watch", "--text", "--once", str(runs / "run"))
        assert (status, printed) == (0, "")
        (facts,) = server.data(["loss"], "")["runs"]
    if name != "metrics.jsonl":
        assert facts["step"] == 4
        return
    assert facts["step"] == (2 if fault == "truncated" else None)
    expected = {  # a line without its end may still be written
        "a folder": ["metrics.jsonl cannot be read: Is a directory"],
        "not permitted": ["metrics.jsonl cannot be read: Permission denied"],
        "binary": ["16 lines of metrics.jsonl left out: damaged, or without a step"],
    }
    assert [note for note in facts["notes"] if "metrics.jsonl" in note] == expected.get(fault, [])

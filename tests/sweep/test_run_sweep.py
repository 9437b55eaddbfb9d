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
    *("config.yaml", "metrics.jsonl", "changes.jsonl", "expert_load.json", "plan.json", "rollouts.jsonl"),
    *("answers.jsonl", "answers.json", "accuracy.json"),
)
REFUSED = {
    *(("config.yaml", fault) for fault in ("truncated", "nested too deeply", "binary")),
    *((name, "a folder") for name in ("metrics.jsonl", "rollouts.jsonl")),
}
LEFT_OUT = {
    *(("accuracy.json", fault) for fault in FAULTS if fault != "a dangling link"),
    *(("answers.jsonl", fault) for fault in FAULTS if fault not in ("emptied", "a folder", "a dangling link")),
}
PLAN = {
    "device": None, "gpu": {"name": "H100"}, "world_size": 1, "mix": "full rows", "caveats": "", "mfu": 0.4,
    "stages": [{"total": 2**30}], "time": {"seconds": 2.0}, "tokens_per_second": 1000.0,
}  # fmt: skip


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
    data = {"eval": str(folder / "eval.jsonl")}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": "hf"}, "train": {"steps": 4}, "data": data}))
    with MetricsWriter(run) as writer:
        for step in range(1, 5):
            writer.write({**dict.fromkeys(REQUIRED, 1.0), "step": step, "loss": 3.0 / step, "mfu": None})
    change = {"step": 1, "time": "now", "setting": "train.lr", "old": 1, "new": 2}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    (run / "expert_load.json").write_text(json.dumps({"step": 4, "layers": [0], "tokens": [[3, 1]]}))
    (run / "plan.json").write_text(json.dumps(PLAN))
    answer = LoggedAnswer("0", 1.0, {}, 0.0, 1, "stop")
    RolloutLog(run).write(4, [LoggedGroup("train.jsonl:1", "Q?", [], "0", [answer])])
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    for place in (run, other):
        (place / "answers.jsonl").write_text('{"index": 0, "answer": "0"}\n')
        note = {"weights": {"run": str(run), "load": str(checkpoint), "step": 4}, "data": data}
        (place / "answers.json").write_text(json.dumps(note))
        (place / "accuracy.json").write_text('{"accuracy": 1.0}')
    return folder


def shown(run) -> str:
    """What the report shows in words."""
    return re.sub(r"<[^>]*>", "", write_report(run).read_text())


def left_out(page: str) -> list[Path]:
    """The files that are named as left out."""
    _, found, told = page.partition("Left out of this report")
    return [Path(re.split(r"[:\s]", told.strip())[0])] if found else []


def test_nothing_is_spoiled(runs, capfd):
    page = shown(runs / "run")
    for word in ("100.0", "train.lr", "Predicted", "Q?", "expert"):
        assert word in page
    run_here(capfd, "watch", "--text", "--once", str(runs / "run"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", FILES)
def test_the_report(runs, name, fault):
    """Without its settings or its metrics there is none. Damaged lines of logs are passed over, as after a kill."""
    with spoiled(runs / "run" / name, fault):
        if (name, fault) in REFUSED:
            with pytest.raises(UserError, match=name):
                shown(runs / "run")
        else:
            page = shown(runs / "run")
            assert ("plan.json is damaged" in page) == (name == "plan.json" and fault in ("other JSON", "a list"))
            assert left_out(page) == [runs / "run" / name] * ((name, fault) in LEFT_OUT)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["config.yaml", "answers.jsonl", "answers.json", "accuracy.json"])
def test_the_report_of_a_folder_beside_it(runs, name, fault):
    """Only its answers are missing then."""
    with spoiled(runs / "other" / name, fault):
        page = shown(runs / "run")
    assert left_out(page) == [runs / "other" / name] * ((name, fault) in LEFT_OUT | REFUSED)


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
        "binary": ["31 lines of metrics.jsonl left out: damaged, or without a step"],
    }
    assert [note for note in facts["notes"] if "metrics.jsonl" in note] == expected.get(fault, [])

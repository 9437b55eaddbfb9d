"""The demo of a digit behind a door without its training: its data, its environment, and when a bound is missed."""

from pathlib import Path

import pytest

from megavlm.demo import door
from megavlm.demo.data import read_records, write_records
from megavlm.rewards.own_function import load_function

pytestmark = pytest.mark.usefixtures("own_environment")


def test_commands_and_data(pretrained, started):
    run = door.BehindTheDoor(pretrained)
    data = run.demo.out / "data"
    data.unlink()  # that of all tests stays as it is
    data.mkdir()
    answer = lambda n: {"role": "assistant", "content": str(n % 10)}
    asked = [{"messages": [{}, answer(n)], "images": [f"{n}.png"]} for n in range(90)]
    for name in ("questions", "heldout"):
        write_records(data / f"{name}.jsonl", asked)
    run.demo.begin(run.out, overwrite=False)
    run.learn()
    assert [command[3] for command in started.commands] == ["sft", "grpo", "grpo"]
    whole = read_records(data / "doors.jsonl")
    shown = [record for record in whole if "images" in record]
    assert 0.5 < 1 - len(shown) / len(whole) < 0.8
    assert all(record["messages"][3]["content"] == record["images"][0][-5] for record in shown)
    closed = read_records(data / "closed_doors.jsonl")
    assert [record["behind"] for record in closed] == [record["images"][0] for record in asked]


def test_the_environment_shows_the_digit_once():
    make = load_function(str(Path(__file__).parents[2] / "configs/demo/door.py"), "Door")
    for said, reward in ((["Open.", " 7"], 1.0), (["7"], 1.0), (["Open.", "Open."], 0.0), (["8"], 0.0)):
        one = make()
        one.reset(behind="7.png", answer="7", messages=[])
        steps = [one.step(text) for text in said]
        assert steps[-1] == {"reward": reward, "done": True}
        assert all(step["pictures"] == ["7.png"] for step in steps[:-1])


@pytest.mark.parametrize(("before", "after", "missed"), [(0.4, 0.95, 0), (0.6, 0.95, 1), (0.4, 0.8, 1)])
def test_each_bound_is_held(pretrained, capsys, before, after, missed):
    run = door.BehindTheDoor(pretrained)
    for name, reward in (("grpo", before), ("heldout", after)):
        (run.out / name).mkdir(parents=True)
        write_records(run.out / name / "metrics.jsonl", [{"reward": reward, "turns": 1.5}])
    assert run.check() is (missed == 0)
    assert capsys.readouterr().out.count("MISSED") == missed


def test_the_page_shows_the_file_that_is_run():
    root = Path(__file__).parents[2]
    code = (root / "configs/demo/door.py").read_text().partition("class Door")[2]
    assert "class Door" + code in (root / "docs/environments.md").read_text()

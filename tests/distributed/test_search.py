"""`megavlm plan --search` on a toy: what it shows, what it writes, and what it refuses."""

import json

import pytest
import yaml
from test_plan_command import commands, config  # noqa: F401  # a fixture


@pytest.mark.slow
def test_a_search(config, tmp_path, world1) -> None:  # noqa: F811
    best, searched = tmp_path / "best.yaml", [str(config), "--gpus", "4", "--pictures", "1", "--search"]
    lines = [
        [*searched, "--write", str(best)],
        [str(best), "--gpus", "4", "--pictures", "1", "--json"],
        [*searched, "--json"],
        [*searched, "--write", str(best)],
        [str(config), "--gpus", "7", "--search"],
        [str(config), "--gpus", "4", "--write", str(best)],
    ]
    ((shown, again, as_json, exists, none, alone),) = world1.run(commands, lines)
    assert (shown[0], again[0], as_json[0]) == (0, 0, 0), (shown, again, as_json)
    found = json.loads(as_json[1])
    fitting = [candidate for candidate in found if candidate["ruled_out"] is None]
    assert [c["seconds"] for c in fitting] == sorted(c["seconds"] for c in fitting)
    assert found[: len(fitting)] == fitting
    assert "key/value heads not divisible" in {candidate["ruled_out"] for candidate in found}
    # what was written is the first layout, and is planned as it was searched
    written = yaml.safe_load(best.read_text())
    assert (best.parent / written["base"]).resolve() == config.resolve()
    plan = json.loads(again[1])
    assert plan["time"]["seconds"] == fitting[0]["seconds"]
    assert plan["capacity"] - plan["spare"] == fitting[0]["memory"]
    assert "ruled out" in shown[1]
    assert (exists[0], none[0], alone[0]) == (2, 2, 2)
    assert "exists already" in exists[2]
    assert "no layout of 7 ×" in none[2]
    assert "choose a GPU with more memory" in none[2]  # nor does any of a multiple of seven
    assert "give --search" in alone[2]

"""The load of experts in the report: curves of the fields, and a map of layers and experts."""

import json
import re

import pytest

from megavlm.base.errors import UserError
from megavlm.report.experts import expert_charts, expert_map


def write_load(folder, tokens, layers) -> None:
    (folder / "expert_load.json").write_text(json.dumps({"step": 7, "layers": layers, "tokens": tokens}))


def test_each_cell_has_its_place_and_shade(tmp_path):
    write_load(tmp_path, [[10, 10, 10, 10], [32, 0, 4, 4]], [3, 9])
    page = str(expert_map(tmp_path))
    cells = {
        (color, depth): re.findall(r"M(\d+) (\d+)h1v1h-1z", path)
        for color, depth, path in re.findall(r'fill:var\(--(\w+)\);opacity:([\d.]+)" d="([^"]*)"', page)
    }
    # loads 3.2, 0, 0.4 and 0.4: of three binary orders of magnitude 1.68, more than 3, and 1.32, in six shades
    assert cells == {
        ("lr", "0.50"): [("0", "1")],
        ("loss", "1.00"): [("1", "1")],
        ("loss", "0.50"): [("2", "1"), ("3", "1")],
    }
    assert "Largest: expert 0 of layer 9, 3.20 times" in page
    assert "smallest: expert 1 of layer 9, 0.00 times" in page


def test_nothing_without_a_readable_file(tmp_path):
    assert not expert_map(tmp_path)
    for damaged in ("{", "[]", '{"tokens": [[1, 2]]}'):
        (tmp_path / "expert_load.json").write_text(damaged)
        with pytest.raises(UserError, match=r"expert_load\.json cannot be read"):
            expert_map(tmp_path)


def test_curves_of_the_fields():
    lines = [
        {"step": step, "experts/load_max": 2.0, "experts/load_min": 0.5, "experts/entropy": 0.9} for step in (1, 2)
    ]
    drawn = "".join(filter(None, expert_charts(lines)))
    assert "Load of an expert" in drawn
    assert "Evenness of the experts" in drawn
    assert "Balancing loss" not in drawn
    assert "load by layers" not in drawn  # fewer than three layers: the first chart says all
    thirds = {f"experts/load_{end}/{part}": 1.5 for end in ("max", "min") for part in ("early", "middle", "late")}
    drawn = "".join(filter(None, expert_charts([line | thirds for line in lines])))
    assert "Largest load by layers" in drawn
    assert "Smallest load by layers" in drawn
    assert not any(expert_charts([{"step": 1, "loss": 1.0}]))

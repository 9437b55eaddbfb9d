"""The fields of a mixture of experts, by hand, and the file with every layer and expert."""

import json
import math

import pytest

from megavlm.monitor import expert_metrics
from megavlm.monitor.expert_metrics import FILE_NAME, ExpertLoadFile, ExpertTotals, evenness, expert_fields, loads


def test_loads_are_relative_to_an_even_one():
    assert loads([1, 3, 0, 4]) == [0.5, 1.5, 0.0, 2.0]
    assert loads([0, 0]) == [0.0, 0.0]


def test_evenness_is_the_entropy_over_its_maximum():
    assert evenness([5, 5, 5, 5]) == pytest.approx(1.0)
    assert evenness([9, 0, 0, 0]) == 0.0
    assert evenness([1, 1, 0, 0]) == pytest.approx(0.5)
    assert evenness([1, 3]) == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))
    assert evenness([0, 0]) is None
    assert evenness([7]) is None


def test_fields_of_four_layers():
    totals = ExpertTotals([2, 4, 6, 8], [[4, 4], [8, 0], [2, 6], [4, 4]], balancing=[1.0, 2.0, 1.25, 1.0], z=None)
    fields = expert_fields(totals)
    assert fields["experts/load_max"] == 2.0
    assert fields["experts/load_min"] == 0.0
    uneven = evenness([2, 6])
    assert fields["experts/entropy"] == pytest.approx((1 + 0 + uneven + 1) / 4)
    assert fields["experts/aux_loss"] == 1.3125
    # thirds of four layers: the first, the two in the middle, the last
    assert [fields[f"experts/aux_loss/{part}"] for part in ("early", "middle", "late")] == [1.0, 1.625, 1.0]
    assert fields["experts/entropy/middle"] == pytest.approx(uneven / 2)
    assert [fields[f"experts/load_max/{part}"] for part in ("early", "middle", "late")] == [1.0, 2.0, 1.0]
    assert [fields[f"experts/load_min/{part}"] for part in ("early", "middle", "late")] == [1.0, 0.0, 1.0]
    assert not [name for name in fields if "z_loss" in name]


def test_few_layers_have_no_thirds_and_a_dense_model_no_fields():
    assert set(expert_fields(ExpertTotals([1], [[1, 2]], z=[0.5]))) == {
        *("experts/load_max", "experts/load_min", "experts/entropy", "experts/z_loss")
    }
    assert expert_fields(None) == {}


def test_the_file_has_the_newest_step_and_is_not_written_at_each(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(expert_metrics.time, "monotonic", lambda: now[0])
    file, read = ExpertLoadFile(tmp_path), lambda: json.loads((tmp_path / FILE_NAME).read_text())
    file.put(1, None)
    assert not (tmp_path / FILE_NAME).exists()
    for step, seconds, written in ((2, 0, 2), (3, 9, 2), (4, 2, 4), (5, 1, 4)):
        now[0] += seconds
        file.put(step, ExpertTotals([1], [[step, 0]]))
        assert read() == {"step": written, "layers": [1], "tokens": [[written, 0]]}
    file.flush()
    assert read()["step"] == 5

"""The page of `megavlm plan`: places and lengths in its pictures, against numbers by hand."""

import re
from dataclasses import asdict
from itertools import pairwise

import pytest

from megavlm.base.errors import UserError
from megavlm.charts.timeline import MAX_RECTANGLES, timeline
from megavlm.config.load import load_settings
from megavlm.plan.step_time import Operator, Span, StepTime, Traffic
from megavlm.report.plan_memory import GIB, memory_bars, phase_bars
from megavlm.report.plan_page import check_new_file, layout_text, roofline, ruled_out, search_chart, write_plan_page
from megavlm.search.candidate import Candidate

GPU = {"name": "H100", "memory_gib": 80.0, "bf16_tflops": 1000.0, "memory_bandwidth": 2000.0}


def stage(number: int, decoder: float) -> dict:
    static = {"weights": 10 * GIB, "gradients": 10 * GIB, "optimizer": 20 * GIB}
    peak = {"phase": "decoder", "by_phase": {"decoder": round(decoder * GIB), "data": GIB, "exchange": GIB}}
    whole = {"static": static, "peak": peak, "total": round((42 + decoder) * GIB)}
    load = {
        "name": "load",
        "static": static | {"gradients": 0, "optimizer": 0},
        "peak": {"phase": "", "by_phase": {}},
        "total": 10 * GIB,
    }
    update = {"phase": "optimizer", "by_phase": {"optimizer": 4 * GIB}}
    moments = [
        load,
        {"name": "decoder", **whole},
        {"name": "update", "static": static, "peak": update, "total": 44 * GIB},
    ]
    return {"stage": number, "rank": 8 * number, **whole, "moments": moments}


def numbers(html, pattern: str) -> list[float]:
    return [float(value) for value in re.findall(pattern, html)]


def rectangles(html) -> list[tuple[str, float, float]]:
    """(kind, left, width) of all rectangles of a timeline, in thousandths of the step."""
    found = re.findall(r'<rect[^>]* x="([\d.]+)" y="0" width="([\d.]+)"[^>]*><title>(\w+)', html)
    return [(name, float(left), float(width)) for left, width, name in found]


def test_memory_bars():
    html = memory_bars([stage(0, 48.0), stage(1, 18.0)], 80 * GIB, 0.05)
    whole = 90 * 1.01  # the fullest stage needs more than the GPU has
    widths = numbers(html, r'style="width:([\d.]+)%;background')
    assert widths == pytest.approx([100 * size / whole for size in (10, 10, 20, 48, 2, 10, 10, 20, 18, 2)], abs=1e-3)
    assert numbers(html, r'limit" style="left:([\d.]+)%') == pytest.approx(
        [100 * 76 / whole, 100 * 80 / whole] * 2, abs=1e-3
    )
    assert re.findall(r'class="(size[^"]*)">([\d.]+)<', html) == [("size over", "90.0"), ("size", "60.0")]
    assert 'title="decoder 48.00 GiB, 60.0 % of the GPU"' in html
    assert "logits" not in html  # there are none


def test_bars_by_phase():
    html = phase_bars(stage(1, 18.0), 80 * GIB, 0.05)
    assert re.findall(r'class="lane">([^<]*)<', html) == ["load", "decoder", "update"]
    assert "Memory of stage 1, rank 8, by phase" in html
    widths = numbers(html, r'style="width:([\d.]+)%;background')
    sizes = (10, 10, 10, 20, 18, 2, 10, 10, 20, 4)
    assert widths == pytest.approx([100 * size / (80 * 1.01) for size in sizes], abs=1e-3)
    assert re.findall(r'class="size">([\d.]+)<', html) == ["10.0", "60.0", "44.0"]
    assert 'title="update 4.00 GiB, 5.0 % of the GPU"' in html
    assert re.findall(r'class="key"[^>]*>(\w+)<', html) == [
        "weights", "gradients", "optimizer", "decoder", "features", "update",
    ]  # fmt: skip


def spans(stages: int, micro_batches: int) -> list[dict]:
    """Forward and backward passes of 1 and 2 seconds, one after the other."""
    found = []
    for number in range(stages):
        for micro_batch in range(micro_batches):
            start = 3.0 * micro_batch
            found += [
                asdict(Span(number, "forward", micro_batch, start, start + 1)),
                asdict(Span(number, "backward", micro_batch, start + 1, start + 3)),
            ]
    return found


def test_timeline():
    html = timeline([asdict(Span(1, "tower", None, 0.0, 0.5)), *spans(2, 4)], 12.5)
    assert re.findall(r'class="lane">([^<]*)<', html) == ["stage 0", "stage 1"]
    drawn = rectangles(html)
    assert [name for name, _, _ in drawn[:2]] == ["forward", "backward"]
    assert [left for _, left, _ in drawn[:3]] == [0, 80, 240]
    assert [width for _, _, width in drawn[:3]] == [80, 160, 80]
    assert re.findall(r'class="number" style="left:([\d.]+)%">(\d+)<', html)[:3] == [
        ("4.00", "0"),
        ("16.00", "0"),
        ("28.00", "1"),
    ]
    assert "backward of micro-batch 3: 2.000 s from 10.00 s on" in html
    assert "numbers are micro-batches" in html
    assert timeline([], 1.0) == ""


def test_timeline_of_very_many_micro_batches():
    seconds = 3.0 * 2000
    html = timeline(spans(8, 2000), seconds)
    drawn = rectangles(html)
    assert len(drawn) <= MAX_RECTANGLES
    for name, length in (("forward", 1.0), ("backward", 2.0)):  # what each kind takes is what it was
        widths = [width for of, _, width in drawn if of == name]
        rounding = 0.005 * len(widths)  # widths have two decimals
        assert sum(widths) == pytest.approx(8 * 2000 * length / seconds * 1000, abs=rounding)
    for lane in html.split('class="lane"')[1:]:
        ends = [(left, left + width) for _, left, width in rectangles(lane)]
        assert all(after[0] >= before[1] - 0.02 for before, after in pairwise(ends))
    assert "groups of them" in html
    assert re.search(r"forward of micro-batches \d+ to \d+", html)


def test_roofline():
    operators = [
        Operator("product", 100, 4e12, 4e9, 5e-3),  # 800 TFLOP/s at 1000 FLOPs per byte
        Operator("attention", 10, 2e11, 2e9, 1e-3),  # 200 TFLOP/s at 100 FLOPs per byte: on the roof
        Operator("elementwise", 1000, 0.0, 1e9, 1e-3),
    ]
    html = roofline([asdict(each) for each in operators], GPU)
    places = re.findall(r'class="point"[^>]* d="M([\d.]+) ([\d.]+)h0"><title>([^<]*)<', html)
    assert len(places) == 2
    (_, y1, product), (x2, y2, _) = places
    assert "100 × product of 4.00TFLOP: 800 TFLOP/s, 1000 FLOPs per byte, 33.1 % of the seconds" in product
    ((start, corner, _),) = re.findall(r'class="line"[^>]* d="M([^L]*)L([^L]*)L([^"]*)"', html)
    (left, low), (right, high) = (tuple(map(float, place.split())) for place in (start, corner))
    assert (float(y2) - low) / (high - low) == pytest.approx((float(x2) - left) / (right - left), abs=2e-3)
    assert float(y1) > high  # below the roof
    assert roofline([asdict(operators[2])], GPU) == ""


def test_search():
    candidates = [
        Candidate({"parallel.tensor": 4}, 40 * GIB, 2.0, 500.0, 0.4),
        Candidate({"parallel.tensor": 2, "train.recompute": ["mlp"]}, 70 * GIB, 2.5, 400.0, 0.3),
        Candidate({"parallel.tensor": 1}, 400 * GIB, None, None, None, "needs 320.0 GiB more"),
        Candidate({"parallel.tensor": 1, "vision.recompute": True}, 90 * GIB, 2.0, 450.0, 0.4, "needs 10.0 GiB more"),
        Candidate({"parallel.tensor": 16}, ruled_out="the heads are not divisible by 16"),
    ]
    search = [asdict(each) for each in candidates]
    html = search_chart(search, 80 * GIB, 0.05)
    places = re.findall(r'stroke:var\(--(\w+)\)[^>]* d="M([\d.]+) ([\d.]+)h0"><title>([^<]*)<', html)
    assert [color for color, *_ in places] == ["soft", "soft", "speed", "speed"]  # the best are above the others
    far, over, second, best = ((float(x), float(y), text) for _, x, y, text in places)
    assert far[:2] == (1000.0, 1000.0)  # at the right edge, and at the bottom, because its speed is not known
    limits = numbers(html, r'class="line"[^>]* d="M([\d.]+) ')
    assert best[0] < second[0] < limits[0] < limits[1] < over[0]
    assert best[1] < over[1] < second[1]
    assert best[2] == "tensor 4: 40.0 GiB, 500 tokens/s/GPU"
    assert "vision" not in over[2]
    assert over[2].endswith("recompute on: 90.0 GiB, 450 tokens/s/GPU · needs 10.0 GiB more")
    assert re.findall(r'class="name"[^>]*>(\d)<', html) == ["2", "1"]
    assert ruled_out(search) == [("needs … GiB more", 2), ("the heads are not divisible by …", 1)]
    assert search_chart([search[-1]], 80 * GIB, 0.05) == ""


def test_words_for_a_layout():
    changes = {"parallel.expert_tensor": 2, "train.recompute": ["mlp", "moe"], "vision.window": None}
    assert layout_text(changes) == "expert tensor 2 · recompute mlp, moe · window none"
    assert layout_text({}) == "as configured"


def test_the_page_needs_nothing_else(tmp_path):
    config = tmp_path / "sft.yaml"
    config.write_text("model: {hf: models/8b, freeze: [vision]}\nparallel: {tensor: 4, pipeline: 2}\n")
    time = StepTime(
        2.0,
        {"forward": 0.5, "backward": 1.0, "bubble": 0.5},
        [Span(0, "forward", 0, 0.0, 0.5)],
        {"tensor": Traffic(3 * GIB, 1200, 0.25)},
        [Operator("product", 100, 4e12, 4e9, 5e-3)],
    )
    plan = {
        "gpu": GPU, "world_size": 16, "data_parallel": 2, "mix": "rows of <one> sample", "rows": 4, "tokens": 32768,
        "stages": [stage(0, 30.0), stage(1, 10.0)], "capacity": 80 * GIB, "fits": False, "spare": 8 * GIB,
        "spare_share": 0.05, "caveats": "Not counted: CUDA.", "model_flops": {"language": 8e15},
        "hardware_flops": {"language": 1e16},
    }  # fmt: skip
    figures = {"tokens_per_second": 1024.0, "mfu": 0.25, "model_tflops": 250.0, "gpu_hours": 20.0, "hours": 1.25}
    figures |= {"steps": 2250, "cost": 40.0}
    speed = {"row_seconds": 0.5, "rows": 9, "machine": "AMD EPYC", "cores": 2}
    workers = {"needed": 3, "configured": 1, "rows": 10, "seconds": 5.0, "speed": speed, "loading": 4}
    workers |= {"processes": 20, "cores": None}
    sampled = {**figures, "hours": None, "gpu_hours": None, "cost": None, "steps": None, "samples": True}
    for name, more in (
        (
            "sampled",
            {
                **sampled,
                "workers": workers,
                "time": asdict(time),
                "candidates": [{**asdict(Candidate({})), "memory": GIB}],
            },
        ),
        ("bare", {}),
        ("full", {**figures, "time": asdict(time), "candidates": [asdict(Candidate({}, 40 * GIB, 2.0, 5e2, 0.4))]}),
    ):
        file = tmp_path / f"{name}.html"
        write_plan_page(file, plan | more, load_settings(config), "sft")
        page = file.read_text()
        assert not re.search(r"https?:|<script|<link|src=|@import|url\(", page)
        assert "Does not fit safely" in page
        assert "8b, sft" in page
        assert "tensor 4 · pipeline 2" in page
        assert "rows of &lt;one&gt; sample" in page
        assert ("Timeline" in page, "Roofline" in page, "Layouts" in page) == (bool(more),) * 3
    tiles = re.findall(r'class="tile"><b>([^<]*)<', page)
    assert tiles == ["72.00 GiB", "2.00 s", "1.02k", "25.0 %", "20.0", "8.00 PFLOP"]
    assert "Data workers" not in page
    page = (tmp_path / "sampled.html").read_text()
    assert re.findall(r'class="tile"><b>([^<]*)<', page) == ["72.00 GiB", "2.00 s", "1.02k", "25.0 %", "8.00 PFLOP"]
    assert "an update of 4 rows" in page
    assert "How long the run takes is not known" in page
    assert "3 data workers needed" in page
    assert "a step would take 5.00 s instead of 2.00 s" in page
    with pytest.raises(UserError, match="exists already"):
        check_new_file(file)
    with pytest.raises(UserError, match="does not exist"):
        check_new_file(tmp_path / "none" / "plan.html")
    check_new_file(tmp_path / "new.html")

"""loss.png: drawn for any run, from one step on; the smoothing."""

import pytest
from PIL import Image

from megavlm.monitor.metrics import REQUIRED, MetricsWriter
from megavlm.report.loss_plot import smooth, write_loss_plot


def write_run(folder, losses, **changes):
    folder.mkdir(exist_ok=True)
    with MetricsWriter(folder) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write({**dict.fromkeys(REQUIRED, 1.0), "step": step, "loss": loss, "lr": 1e-4 / step, **changes})


def test_smooth():
    assert smooth([5.0] * 40) == pytest.approx([5.0] * 40)
    line = [float(step) for step in range(300)]
    assert smooth(line)[:290] == pytest.approx(line[:290])  # no lag, and the start is where it is
    assert smooth(line)[-1] == pytest.approx(299 - 5)  # the mean of the last 11
    noise = [(-1.0) ** step for step in range(300)]
    assert abs(smooth(noise)[150]) < 0.1
    assert smooth([1.0, None, 4.0, 7.0], reach=1) == [1.0, None, 5.5, 5.5]
    assert smooth([4.0, 2.0]) == [4.0, 2.0]  # a short run is shown as it is
    assert smooth([]) == []


@pytest.mark.parametrize("losses", [[2.0], [3.0 / step for step in range(1, 200)], [2.0, float("nan"), 1.0]])
def test_plot_is_a_picture(tmp_path, losses):
    write_run(tmp_path, losses, **{"grad_norm/vision": 0.0})
    path = write_loss_plot(tmp_path)
    assert path == tmp_path / "loss.png"
    with Image.open(path) as picture:
        assert picture.size == (1350, 930)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_plot_of_a_run_without_gradients(tmp_path, recwarn):
    write_run(tmp_path, [1.0, 1.0], **{name: 0.0 for name in REQUIRED if name.startswith("grad_norm")})
    assert write_loss_plot(tmp_path).exists()
    assert [str(warning.message) for warning in recwarn] == []


def test_nothing_to_draw(tmp_path):
    assert write_loss_plot(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_what_a_method_measures_of_answers_is_drawn_below_the_loss(tmp_path):
    """In colours that no other curve has, on a panel of their own."""
    measured = {
        "sft": {},
        "dpo": {"accuracy": 0.75, "margin": 0.5},
        "grpo": {"reward": 0.75, "answer_tokens": 120.0},
    }
    green, colors = (0x05, 0x96, 0x69), {}
    for name, fields in measured.items():
        write_run(tmp_path / name, [1.0, 0.5, 0.25], **fields)
        with Image.open(write_loss_plot(tmp_path / name)) as picture:
            assert picture.size == (1350, 1230 if fields else 930)
            panel = picture.convert("RGB").crop((0, 620, 1350, 920) if fields else (0, 0, 1350, 930))
            colors[name] = {color for _, color in panel.getcolors(1 << 24)}
    assert [name for name in measured if green in colors[name]] == ["dpo", "grpo"]


def test_a_first_step_without_answers_of_both_kinds_is_drawn(tmp_path):
    write_run(tmp_path, [1.0], accuracy=1.0, margin=None)
    with Image.open(write_loss_plot(tmp_path)) as picture:
        assert picture.size == (1350, 1230)

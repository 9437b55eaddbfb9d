"""The terminal: one readable line each few steps in a log, a live bar on a terminal, nothing on other ranks."""

import io
import re

import pytest

from megavlm.base.number_format import duration, number, percent, short
from megavlm.monitor.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def line(step, seconds=2.0, **changes):
    return {
        "step": step, "loss": 3.0 / step, "lr": 1e-4, "grad_norm": 1.5, "tokens": 9000, "images": 8, "packing": 0.9,
        "seconds": seconds, "tokens_per_second": 4500.0, "mfu": None, "memory_gib": 1.25, **changes,
    }  # fmt: skip


def run(stream, steps=range(1, 26), total=25, **options):
    with Progress(total, title="sft", header={"model": "tiny", "output": "runs/a"}, stream=stream, **options) as shown:
        for step in steps:
            shown.update(line(step))
            if step == 12:
                shown.say("checkpoint runs/a/checkpoints/step_00000012")
    return stream.getvalue()


def test_log_has_first_each_tenth_and_last_step():
    text = run(io.StringIO())
    assert "\x1b" not in text
    assert [int(step) for step in re.findall(r"^step +(\d+)/25", text, re.M)] == [1, 10, 20, 25]
    assert text.splitlines()[0] == "== sft"
    assert "   model   tiny" in text.splitlines()
    assert "checkpoint runs/a/checkpoints/step_00000012" in text.splitlines()
    tenth = next(row for row in text.splitlines() if row.startswith("step 10/"))
    for fact in ("loss 0.3000", "lr 1.00e-04", "grad norm 1.50", "tokens/s 4.50k", "images/s 4.00", "left 0:30"):
        assert fact in tenth
    assert "MFU" not in tenth


def test_log_after_resume_starts_with_the_next_step():
    text = run(io.StringIO(), steps=range(18, 26), start_step=17)
    assert [int(step) for step in re.findall(r"^step +(\d+)/25", text, re.M)] == [18, 20, 25]
    assert "continued after step 17" in text


@pytest.mark.parametrize("width", range(48, 100, 3))
def test_terminal_shows_the_last_step_and_messages(width):
    text = run(Terminal(), steps=[12, 24, 25], width=width)
    assert "checkpoint runs/a/checkpoints/step_00000012" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    rows = re.split(r"[\r\n]+", plain)
    assert any(row.startswith("step 25/25") for row in rows)
    assert max(map(len, rows)) <= width
    for fact in ("loss 0.1200", "grad norm 1.50", "packed 90 %", "GiB 1.25"):  # not cut in two
        assert any(fact in row for row in rows), fact


COMPARED = {"accuracy": 0.625, "margin": -0.25}


@pytest.mark.parametrize("terminal", [True, False])
def test_accuracy_and_margin_of_preference_tuning_are_shown(terminal):
    stream = Terminal() if terminal else io.StringIO()
    with Progress(2, stream=stream, width=100) as shown:
        shown.update(line(1, **COMPARED | {"margin": None}))  # kto: a step without answers of both kinds
        first = stream.getvalue()
        shown.update(line(2, **COMPARED))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "accuracy 62.5 %" in text
    assert "margin -0.2500" in text
    assert terminal or "margin –" in first


def test_reward_length_and_share_of_cut_answers_of_reinforcement_learning_are_shown():
    with Progress(2, stream=(stream := io.StringIO())) as shown:
        shown.update(line(1, reward=0.4125, answer_tokens=212.34, truncated_share=0.0625))
    for fact in ("reward 0.4125", "answer tokens 212", "cut off 6.2 %"):
        assert fact in stream.getvalue()


def test_a_run_that_compares_nothing_shows_no_accuracy():
    text = run(io.StringIO())
    assert "accuracy" not in text
    assert "margin" not in text
    assert "KL" not in text
    assert "reward" not in text


def test_other_ranks_are_silent():
    assert run(io.StringIO(), enabled=False) == ""


def test_remaining_time_leaves_out_the_first_step():
    with Progress(10, stream=io.StringIO()) as shown:
        assert shown.remaining_seconds() is None
        shown.update(line(1, seconds=100.0))
        assert shown.remaining_seconds() == 900.0
        shown.update(line(2, seconds=2.0))
        assert shown.remaining_seconds() == 16.0
        shown.update(line(3, seconds=4.0))
        assert shown.remaining_seconds() == 21.0


def test_a_loss_that_is_not_a_number_is_shown():
    with Progress(3, stream=(stream := io.StringIO())) as shown:
        shown.update(line(1, loss=float("nan"), grad_norm=float("inf")))
    assert "loss nan" in stream.getvalue()
    assert "grad norm inf" in stream.getvalue()


def test_units():
    assert [short(value) for value in (0, 7, 999, 999.7, 12345, 1.5e9, None)] == [
        "0", "7", "999", "1.00k", "12.3k", "1.50G", "–",
    ]  # fmt: skip
    assert [number(value) for value in (0.0, 0.123456, 12.3456, 1234.56, 1e-7, 1e9, None)] == [
        "0.000", "0.1235", "12.35", "1235", "1.00e-07", "1.00e+09", "–",
    ]  # fmt: skip
    assert [duration(value) for value in (0.4, 59.6, 3723, 100000, None)] == [
        "0:00",
        "1:00",
        "1:02:03",
        "1 d 3:46",
        "–",
    ]
    assert percent(0.4123) == "41.2 %"

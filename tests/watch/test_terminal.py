"""`megavlm watch --text`: curves as Braille dots, and what stands around them."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from megavlm.watch.braille import Line, plot
from megavlm.watch.follow import find_runs
from megavlm.watch.terminal import screen, show


def rows(text) -> list[str]:
    return text.plain.split("\n")


def test_a_straight_line_runs_from_corner_to_corner():
    title, *drawn, below = rows(plot("loss", [Line([0, 7], [0.0, 7.0], "red")], width=20, height=4 + 2))
    assert title == "loss"
    assert [row[:9] for row in drawn] == ["   7.00 │", "        │", "   2.57 │", "   0.00 │"]
    # 11 characters and 4 rows are 22 × 16 dots; each of the columns of dots has one or two
    assert [row[9:] for row in drawn] == ["        ⢀⠔⠊", "     ⢀⠤⠊⠁  ", "  ⢀⡠⠒⠁     ", "⡠⠔⠁        "]
    assert below == f"{'':9}0{'step 7':>10}"


def test_dots_stand_where_the_values_are():
    # five rows of one column of characters each: 4 dots high and 2 wide
    _, *drawn, _ = rows(plot("x", [Line([0, 1], [0.0, 1.0], "red")], width=20, height=5))
    assert len(drawn) == 3
    dots = {
        (row, column): ord(character) - 0x2800
        for row, text in enumerate(drawn)
        for column, character in enumerate(text[9:])
        if character != " "
    }
    assert dots[2, 0] & 0x47 == 0x40  # of the left dots only the lowest: value 0 at step 0
    assert dots[0, 10] & 0xB8 == 0x08  # of the right ones only the highest: value 1 at step 1
    assert (0, 0) not in dots
    assert (2, 10) not in dots


def test_a_logarithmic_scale_has_decades_at_even_distances():
    lines = [Line([0, 1, 2], [1.0, 10.0, 100.0], "red")]
    _, *drawn, _ = rows(plot("x", lines, width=20, height=11, is_log=True))
    assert [row[:8].strip() for row in drawn if row[:8].strip()] == ["100", "10.0", "1.00"]
    middle = [row for row, text in enumerate(drawn) if text[9 + 5] != " "]
    assert 4 in middle  # of nine rows
    assert len(middle) <= 2
    linear = [row for row, text in enumerate(rows(plot("x", lines, 20, 11))[1:-1]) if text[9 + 5] != " "]
    assert max(linear) > 6


def test_a_constant_and_a_curve_without_values():
    _, *drawn, _ = rows(plot("x", [Line([3], [5.0], "red"), Line([], [], "blue")], width=20, height=5))
    assert [row[:9] for row in drawn] == ["        │", "   5.00 │", "        │"]
    assert "no values yet" in plot("x", [], 20, 5).plain


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "loss": 4.0 / s, "grad_norm": 1.0, "skipped": int(s == 9)} for s in range(1, 40)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def printed(folder, width=80, height=None, fields=(), **options) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(screen(find_runs([folder]), fields, width, height, **options))
    return console.file.getvalue().splitlines()


def test_the_screen_has_each_run_its_curves_and_its_warnings(folder):
    lines = printed(folder)
    assert lines[0].startswith("● one  step 39 · loss 0.1026 · 0:0")
    assert lines[1].startswith("● two")
    assert [line for line in lines if line in ("loss", "grad_norm")] == ["loss", "grad_norm"]
    assert lines[-1].startswith("! step 9 was skipped")
    assert [line for line in printed(folder, fields=["grad_norm"]) if line in ("loss", "grad_norm")] == ["grad_norm"]


def test_a_run_with_rewards_tells_them_in_place_of_a_loss_near_zero(tmp_path):
    lines = [{"step": step, "loss": 1e-9, "reward": step / 8} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "step 2 · reward 0.2500 · 0:0" in printed(tmp_path)[0]


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (200, 60)])
def test_it_fits_on_the_terminal(folder, width, height):
    lines = printed(folder, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_once_is_once(folder):
    console = Console(file=io.StringIO(), width=60)
    show(find_runs([folder]), ["loss"], console, is_log=True, once=True)
    assert console.file.getvalue().count("● one") == 1


@pytest.mark.parametrize("flags", [["--text"], []])
def test_ctrl_c_is_its_good_end_and_torch_is_not_imported(folder, flags):
    code = (
        # a test in the background ignores it otherwise
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from megavlm.cli.main import main\n"
        "import rich.console; rich.console.Console.is_terminal = True\n"
        "status = main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else status)"
    )
    command = [sys.executable, "-c", code, "watch", *flags, *([] if flags else ["--port", "0"]), str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "80"}
    )
    seen = b""
    deadline = time.monotonic() + 60
    while (b"one" if flags else b"watching 2 runs at http://127.0.0.1:") not in seen and time.monotonic() < deadline:
        seen += os.read(process.stdout.fileno(), 65536)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0

"""`make gpu-check` as far as a CPU takes it: its checks with tiny shapes, and what a check that fails leaves."""

import json
import sys
import time

import psutil
import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import layouts
from benchmarks.gpu_check.checks import CHECKS, derived
from benchmarks.gpu_check.machine import Machine, environment
from benchmarks.gpu_check.measure import Measure, Recorder, read_records
from benchmarks.gpu_check.process import run_apart


def run_check(name: str, file) -> str:
    """Runs in a world of one process: one check. Returns why it was skipped or failed, "" if it did not."""
    from benchmarks.gpu_check.checks import CHECKS
    from benchmarks.gpu_check.measure import Recorder, Skipped

    try:
        CHECKS[name].run(Recorder(file), cpu=True)
    except (Skipped, RuntimeError) as reason:
        return str(reason)
    return ""


def measured(world, name, file) -> tuple[dict[str, Measure], dict, str]:
    (reason,) = world.run(run_check, name, file)
    measures, settings = read_records(file)
    assert all(measure.value > 0 for measure in measures if measure.unit)
    return {measure.name: measure for measure in measures}, settings, reason


def test_parity(world1, tmp_path):
    measures, settings, reason = measured(world1, "parity", tmp_path / "out")
    assert not reason
    assert all(measure.holds is not False for measure in measures.values()), measures
    assert {name.partition(":")[0] for name in measures} == {
        "transformers in bf16", "portable fp32", "portable bf16", "portable bf16, inputs of layers on the host",
    }  # fmt: skip
    assert settings["pictures"] == "photographs of scikit-image"


def test_speed(world1, tmp_path):
    measures, settings, reason = measured(world1, "speed", tmp_path / "out")
    assert not reason
    for what in ("text", "pictures and text"):
        assert f"{what}: tokens per second" in measures
        assert f"{what}: peak memory" in measures
    assert settings["visual share, text"] == 0
    assert settings["visual share, pictures and text"] == pytest.approx(0.1, abs=0.05)
    assert 0.3 < settings["visual share, many pictures"] < 0.5  # tiny pictures: of their tokens, two each are text
    assert settings["seconds of a step, many pictures"]["tower"] > 0
    assert "the operations alone allow 0." in measures["tokens/s, pictures and text / text alone"].note


def test_transformers_and_fp8(world1, tmp_path):
    measures, settings, reason = measured(world1, "transformers", tmp_path / "out")
    assert not reason
    assert "transformers, sdpa: tokens per second" in measures
    assert "ImportError" in settings["seconds of a step by attention"]["flash_attention_2"]
    measures, _, reason = measured(world1, "fp8", tmp_path / "fp8")
    assert list(measures) == ["bf16: tokens per second"]
    assert "Transformer Engine" in reason


def test_layouts(world2, tmp_path):
    layouts.save_pictures(tmp_path, layouts.SIZE)
    folders = {moe: layouts.model_with_weights(tmp_path, layouts.SIZE, moe=moe) for moe in (False, True)}
    references = {moe: layouts.reference(folder, tmp_path) for moe, folder in folders.items()}
    pending = [(name, "portable", "fp32") for name in layouts.LAYOUTS]
    world2.run(layouts.train_layouts, folders, tmp_path, pending, references, tmp_path / "out")
    measures, known = read_records(tmp_path / "out")
    assert known["done"] == list(layouts.LAYOUTS)
    assert len(measures) == 2 * len(pending)
    assert all(measure.holds for measure in measures), measures


def test_a_failed_check_costs_only_itself(tmp_path, monkeypatch, capsys):
    def run(words, limit, *, cwd, environ):
        name, record = words[3], Recorder(tmp_path / "unused")
        record._path = type(tmp_path)(words[4])
        if name == "speed":
            record(Measure("pictures and text: tokens per second", 300.0, "tokens/s"))
            return "stopped", 5.0, "stopped after 5 s; it had printed:\nwaiting"
        if name == "transformers":
            record(Measure("transformers, sdpa: tokens per second", 100.0, "tokens/s"))
            return "ok", 1.0, ""
        return "failed", 1.0, "Traceback\nValueError: no kernel"

    monkeypatch.setattr(command, "run_apart", run)
    monkeypatch.setattr(command, "probe", lambda: Machine(1, ""))
    assert command.main(["--json", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr().out
    assert "ValueError: no kernel" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    statuses = {name: check["status"] for name, check in found["checks"].items()}
    assert statuses.pop("comparison") == "ok"
    assert statuses == {
        **dict.fromkeys(CHECKS, "failed"),
        "speed": "stopped",
        "transformers": "ok",
        "layouts": "skipped",
    }
    assert found["checks"]["layouts"]["error"] == "needs 2 GPUs; there is 1"
    (ratio,) = found["checks"]["comparison"]["measures"]
    assert (ratio["value"], ratio["holds"]) == (3.0, True)
    assert found["machine"]["packages"]["torch"]


def test_a_broken_bound_is_told(tmp_path, monkeypatch, capsys):
    def run(words, limit, *, cwd, environ):
        Recorder(type(tmp_path)(words[4]))(Measure("FP8 / bf16", 1.1, least=1.2))
        return "ok", 1.0, ""

    monkeypatch.setattr(command, "run_apart", run)
    monkeypatch.setattr(command, "probe", lambda: Machine(1, "not installed"))
    assert command.main(["--only", "fp8", "--json", str(tmp_path / "out.json")]) == 1
    assert "BROKEN" in (printed := capsys.readouterr().out)
    assert "without Transformer Engine: not installed" in printed
    assert command.main(["--only", "fp8", "--cpu"]) == 0  # where no bound means anything
    assert "BROKEN" not in capsys.readouterr().out


def test_nothing_runs_without_a_gpu_or_time(monkeypatch, capsys):
    monkeypatch.setattr(command, "probe", lambda: Machine(0, ""))
    assert command.main([]) == 1
    assert "--cpu" in capsys.readouterr().out
    monkeypatch.setattr(command, "run_apart", lambda *args, **more: pytest.fail("it ran"))
    assert command.main(["--cpu", "--minutes", "0.1"]) == 0
    assert "no time was left" in " ".join(capsys.readouterr().out.split())


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path):
    script = f"echo begun; sleep 600 & echo $! > {tmp_path}/child; wait"
    status, seconds, error = run_apart(["sh", "-c", script], 0.5, cwd=tmp_path, environ=environment())
    assert (status, "begun" in error) == ("stopped", True)
    assert seconds < 30
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end  # it sleeps 600 s
        time.sleep(0.01)


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (77, "skipped"), (3, "failed")])
def test_how_a_process_ends(code, status, tmp_path):
    found = run_apart(["sh", "-c", f"echo why >&2; exit {code}"], 10, cwd=tmp_path, environ=environment())
    assert (found[0], found[2]) == (status, "" if code == 0 else "why")


def test_a_ratio_needs_both_numbers():
    ours = {"speed": [Measure("pictures and text: tokens per second", 300.0)]}
    assert derived(ours) == []
    theirs = {"transformers": [Measure("transformers, sdpa: tokens per second", 250.0)]}
    (ratio,) = derived(ours | theirs)
    assert (ratio.value, ratio.holds) == (1.2, False)


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert "example: python -m benchmarks.gpu_check" in text
    assert all(name in text for name in CHECKS)


def test_a_half_installed_transformer_engine_is_hidden(monkeypatch):
    """As it is for the checks: their package makes it look as if it were not installed."""
    import importlib
    import importlib.util

    import benchmarks.gpu_check as package

    monkeypatch.setitem(sys.modules, "transformer_engine", sys)  # whatever was there comes back at the end
    monkeypatch.setenv(package.WITHOUT_TE, "1")
    importlib.reload(package)
    assert importlib.util.find_spec("transformer_engine") is None


def test_with_transformer_engine(te_world, tmp_path):
    """Under TE's own Python on a CPU (tests/te_cpu), where FP8 is simulated."""
    measures, _, reason = measured(te_world(1), "parity", tmp_path / "out")
    assert not reason
    assert all(measure.holds is not False for measure in measures.values()), measures
    assert {name.partition(":")[0] for name in measures} >= {"portable fp32", "portable bf16", "te bf16", "te fp8"}

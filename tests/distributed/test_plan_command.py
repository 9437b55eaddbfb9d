"""`megavlm plan`: what it shows of a toy and of a recipe, as a table and as JSON, and what it refuses."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from cluster_recipes import CONFIGS
from test_dry_run import alone


def commands(lines: list[list[str]], model: str = "8b") -> list[tuple[int, str, str]]:
    """Runs on every rank: exit status, output and errors of each command line."""
    import os

    from megavlm.cli.main import main

    found = []
    with alone():
        os.environ |= {"MEGAVLM_MODEL": model, "COLUMNS": "80"}
        for line in lines:
            with (
                contextlib.redirect_stdout(io.StringIO()) as shown,
                contextlib.redirect_stderr(io.StringIO()) as told,
            ):
                status = main(["plan", *line])
            found.append((status, shown.getvalue(), " ".join(told.getvalue().split())))
    return found


@pytest.fixture(scope="module")
def config(toys, tmp_path_factory) -> Path:
    sections = {
        "model": {"hf": str(toys.folder("dense")), "load": "none"},
        "data": {"seq_length": 256, "train": [{"path": "none"}]},
        "parallel": {"pipeline": 2},
        "train": {"lr": 1e-3, "steps": 2, "global_batch_size": 16},
    }
    path = tmp_path_factory.mktemp("plan") / "toy.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_a_toy(config, world1) -> None:
    usual = [str(config), "--gpus", "4", "--pictures", "1"]
    page = config.with_name("plan.html")
    lines = [
        [*usual, "--page", str(page)],
        [*usual, "--page", str(page)],
        [*usual, "--json"],
        [*usual, "--json", "--gpu", "h200", "train.global_batch_size=32", "train.batch_ramp={1: 16}"],
        [str(config), "--gpus", "4", "--gpu", "h1000"],
        [str(config), "--gpus", "5"],
        [str(config)],
        [
            *usual,
            "--for",
            "grpo",
            "rollout.prompts=4",
            "rollout.max_new_tokens=64",
            "reward=[{name: format}]",
            "train.global_batch_size=null",
        ],
    ]
    ((shown, again, first, second, unknown, odd, without, sampled),) = world1.run(commands, lines)
    assert (shown[0], first[0], second[0]) == (0, 0, 0), (shown, first, second)
    assert f"page: {page}" in shown[1]
    assert f"{page} exists already" in again[2]
    assert "stage 0, rank 0" in page.read_text()
    assert "stage rank weights" in " ".join(shown[1].split())
    assert [line.split()[:2] for line in shown[1].splitlines()[1:3]] == [["0", "0"], ["1", "2"]]
    assert "others" not in shown[1]  # no stage has any
    assert "a step takes" in shown[1]
    assert "2 steps: 0.0 hours" in shown[1]
    assert sampled[0] == 0, sampled
    assert "an update takes" in sampled[1]
    assert "how long the run takes is not known: sampling, rewards" in sampled[1]
    assert "hours" not in sampled[1]
    assert re.search(r"fits on 4 × H100 SXM 80 GB \(2 data-parallel\), with 79\.\d GiB to spare", shown[1])
    assert "16 rows" in shown[1]
    assert "each row has 1 sample of 256 tokens, with 1 picture of 30 × 30 patches each" in shown[1]
    found, larger = json.loads(first[1]), json.loads(second[1])
    assert [stage["rank"] for stage in found["stages"]] == [0, 2]
    for stage in found["stages"]:
        assert stage["total"] == sum(stage["static"].values()) + sum(stage["peak"]["by_phase"].values())
    # Twice as many rows are twice the work; a window of all rows holds the pixels and features of twice as many.
    assert larger["model_flops"] == pytest.approx({k: 2 * v for k, v in found["model_flops"].items()})
    moments = [next(m for m in plan["stages"][0]["moments"] if m["name"] == "decoder") for plan in (found, larger)]
    sizes = [moment["peak"]["by_phase"]["exchange"] for moment in moments]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.2)
    assert larger["capacity"] > found["capacity"]
    assert (found["ramps"], larger["ramps"]) == ([], ["train.batch_ramp"])
    assert "as the last ones are behind train.batch_ramp" in larger["caveats"]
    assert [moment["name"] for moment in found["stages"][0]["moments"]] == [
        *("load", "encode", "decoder", "tower", "update", "checkpoint"),
    ]
    assert "stage, GiB in the phases load encode decoder tower update checkpoint" in " ".join(shown[1].split())
    assert "from assumed shares" in shown[1]
    assert (again[0], unknown[0], odd[0], without[0]) == (2, 2, 2, 2)
    assert (
        "--gpu h1000 is not known → known are h100, h200" in unknown[2].replace("\n", " ") or "known are" in unknown[2]
    )
    assert "start 4 or 6 processes" in odd[2]
    assert "needs --gpus N" in without[2]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gpus"), [("8b", 16), ("30b-a3b", 32)])
def test_a_recipe_fits_its_gpus(model, gpus, world1) -> None:
    ((found,),) = world1.run(commands, [[str(CONFIGS / "tune/sft.yaml"), "--gpus", str(gpus), "--json"]], model)
    assert found[0] == 0, found
    assert json.loads(found[1])["fits"]

"""`megavlm plan --search` on a toy: what it shows, what it writes, and what it refuses."""

import json

import pytest
import yaml
from cluster_recipes import CONFIGS
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


def enough(path: str, gpus: int, memory_gib: float) -> tuple:
    """Runs on a rank: how many GPUs with so little memory are enough, what is told, and whether a plan of them fits."""
    from dataclasses import replace
    from pathlib import Path

    from test_dry_run import alone

    from megavlm.commands.plan_search import _remedy
    from megavlm.config.load import load_settings
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.gpus import gpu_of
    from megavlm.plan.mix import Mix
    from megavlm.plan.plan import make_plan
    from megavlm.search.search import enough_gpus, with_changes

    with alone():
        settings = load_settings(Path(path))
        shapes, gpu = model_shapes(settings.model), replace(gpu_of("h100"), memory_gib=memory_gib)

        def plan_of(own, *, exact, gpus, processes=1):
            mix = Mix.of(own, shapes, pictures=1)
            return make_plan(own, shapes, "sft", gpus, gpu, mix=mix, exact=exact)

        found = enough_gpus(settings, shapes, gpus, gpu, plan_of)
        if found is None:
            return None, _remedy([], None), False
        many, changes = found
        return many, _remedy([], found), plan_of(with_changes(settings, changes), exact=True, gpus=many).fits


def test_a_model_that_is_too_large_is_told_how_many_gpus_are_enough(config, world1) -> None:  # noqa: F811
    """Of one GPU, with memories for which the toy needs host memory, two, four and eight, and one never enough."""
    for memory, number in ((0.065, 1), (0.05, 2), (0.032, 4), (0.026, 8)):
        (many, told, fits), *_ = world1.run(enough, str(config), 1, memory)
        assert (many, fits, memory) == (number, True, memory)
        assert told.startswith("1 GPU is enough, with" if number == 1 else f"{number} GPUs are enough, with parallel.")
        assert ("train.offload_optimizer=true" in told) == (number == 1)
    assert world1.run(enough, str(config), 1, 0.001)[0][:2] == (
        None,
        "shorten the rows, or choose a GPU with more memory",
    )


@pytest.mark.slow
def test_a_cluster_is_named_for_four_gpus_and_the_largest_model(world1) -> None:
    line = [str(CONFIGS / "tune/sft.yaml"), "--gpus", "4", "--search"]
    (((status, _, told),),) = world1.run(commands, [line], "235b-a22b", timeout=600)
    assert status == 2
    assert "no layout of 4 × H100 SXM 80 GB fits" in told
    assert "128 GPUs are enough, with parallel." in told

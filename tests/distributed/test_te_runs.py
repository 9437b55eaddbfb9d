"""Runs on Transformer Engine's own Python (tests/te_cpu): FusedAdam, checkpoints, conversion, adapters."""

import pytest
import torch
from adapted import ADAPTERS
from parity import weights_of
from safetensors.torch import load_file
from test_adapters import DENSE, MOE, check_step, references, settings_with  # noqa: F401 (a fixture)
from test_checkpoint import EP2, EP2_TP2, ONE, TP2, VPP2, Layout, adam, run

SAME = {"TP2": (TP2, "fp32"), "MoE EP2": (EP2, "fp32")}
SLOW = {"PP2 × VPP2": (VPP2, "bf16"), "MoE EP2 × TP2": (EP2_TP2, "fp32"), "one process": (ONE, "bf16")}
slow = pytest.mark.slow


def toy_and_settings(toys, layout: Layout, **train) -> tuple[tuple, dict]:
    toy = toys.folder(layout.kind), toys.checkpoint(layout.kind), toys.root, toys.records
    settings = adam(toy, layout, **train)
    settings["model"]["kernels"] = "te"
    return toy, settings


@pytest.mark.parametrize("name", [*SAME, *(pytest.param(name, marks=slow) for name in SLOW)])
def test_te_continues_on_the_same_bits(name, toys, te_world, tmp_path):
    """With FusedAdam. What is saved before the first step is, converted, the folder that it began with."""
    layout, precision = (SAME | SLOW)[name]
    toy, settings = toy_and_settings(toys, layout, precision=precision)
    world = te_world(layout.world)
    straight = world.run(run, *toy, settings, tmp_path, steps=3, save_at=[0, 2])
    if precision == "fp32":
        start, saved = load_file(toy[0] / "model.safetensors"), weights_of(tmp_path / "step_00000000", toy[0])
        assert saved.keys() == start.keys()
        assert all(torch.equal(value, start[key]) for key, value in saved.items())
    resumed = world.run(run, *toy, settings, tmp_path, steps=3, restore=tmp_path / "step_00000002")
    for before, after in zip(straight, resumed, strict=True):
        assert after[0] == before[0][2:]
        assert all(torch.equal(x, y) for x, y in zip(before[1], after[1], strict=True))


def test_te_continues_on_portable_kernels(toys, te_world, world1, tmp_path):
    """From TE and FusedAdam, two ranks, to one process on plain PyTorch; the third step is TE's, to rounding."""
    toy, settings = toy_and_settings(toys, EP2)
    straight = te_world(2).run(run, *toy, settings, tmp_path, steps=3, save_at=[2])
    _, plain = toy_and_settings(toys, Layout(1, "moe", {}))
    plain["model"]["kernels"] = "portable"
    resumed = world1.run(run, *toy, plain, tmp_path, steps=3, restore=tmp_path / "step_00000002")
    assert resumed[0][0][0] == pytest.approx(straight[0][0][2], rel=1e-4)


ADAPTED = {"lora": "TP2", "lora on experts": "EP2", "dora": "PP2", "rslora, patterns": "recomputed"}


@pytest.mark.parametrize("name", [name if "lora" in name[:4] else pytest.param(name, marks=slow) for name in ADAPTED])
def test_te_adapter_learns_as_in_peft(name, toys, references, te_world, tmp_path):  # noqa: F811 (the fixture)
    kind, _ = ADAPTERS[name]
    processes, parallel, train = (MOE if kind == "moe" else DENSE)[ADAPTED[name]]
    folder, reference = references(name)
    settings = settings_with(toys, kind, folder, parallel, train, reference)
    settings["model"]["kernels"] = "te"
    check_step(te_world(processes), settings, reference, toys, kind, tmp_path)


OPTIMIZERS = {
    "groups and average": {"groups": [{"match": r"o_proj|mlp\.gate\.", "lr_scale": 0.5}], "ema": 0.9},
    "muon": {"optimizer": "muon"},
}


@pytest.mark.parametrize("name", ["groups and average", pytest.param("muon", marks=slow)])
def test_te_optimizers(name, toys, te_world, world2, tmp_path):
    """FusedAdam with groups and the moving average, and Muon, whose experts TE numbers, are those of plain PyTorch."""
    from megavlm.checkpoint.averages import AveragedCheckpoint

    toy, settings = toy_and_settings(toys, EP2, keep=9, **OPTIMIZERS[name])
    world = te_world(2)
    straight = world.run(run, *toy, settings, tmp_path / "a", steps=3, save_at=[2, 3])
    resumed = world.run(run, *toy, settings, tmp_path / "b", steps=3, save_at=[3], restore=tmp_path / "a/step_00000002")
    for before, after in zip(straight, resumed, strict=True):
        assert after[0] == before[0][2:]
        assert all(torch.equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    if "ema" in OPTIMIZERS[name]:
        one, other = (AveragedCheckpoint(tmp_path / f"{run_}/step_00000003") for run_ in "ab")
        keys = [key for key in one.tensors if key.startswith("optimizer.state.ema.")]
        assert len(keys) > 30
        assert all(torch.equal(one.read(key), other.read(key)) for key in keys)
    settings["model"]["kernels"] = "portable"
    plain = world2.run(run, *toy, settings, tmp_path / "c", steps=3)
    for line, expected in zip(straight[0][0], plain[0][0], strict=True):
        assert line == pytest.approx(expected, rel=1e-3)  # Muon enlarges roundings

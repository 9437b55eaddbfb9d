"""Every parallel layout computes the training step that plain PyTorch computes on transformers' own model."""

from pathlib import Path

import pytest
import torch
from parity import Toys, settings_of, train_layout, weights_of

# name: (processes, model, parallel settings, other settings)
LAYOUTS = {
    "one process": (1, "dense", {}, {}),
    "tower recompute": (1, "dense", {}, {"vision": {"recompute": True, "chunk_patches": 64}}),
    "DP2": (2, "dense", {}, {}),
    "TP2": (2, "dense", {"tensor": 2}, {}),
    "TP2 without sequence parallelism": (2, "dense", {"tensor": 2, "sequence": False}, {}),
    "TP2, full recompute": (2, "dense", {"tensor": 2}, {"recompute": "full", "vision": {"recompute": True}}),
    "PP2": (2, "dense", {"pipeline": 2}, {}),
    "PP2 × VPP2, full recompute": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {"recompute": "full"}),
    "TP2 × PP2": (4, "dense", {"tensor": 2, "pipeline": 2}, {}),
    "PP2, 3 + 1 layers": (2, "dense", {"pipeline": 2, "first_stage_layers": 3}, {}),
    "CP2": (2, "dense", {"context": 2}, {}),
    "TP2 × CP2": (4, "dense", {"tensor": 2, "context": 2}, {}),
    "CP2 × PP2": (4, "dense", {"context": 2, "pipeline": 2}, {}),
    "PP4": (4, "dense", {"pipeline": 4}, {}),
    "DP2, frames dealt over the world": (2, "dense", {}, {"vision": {"deal": "world"}}),
    "TP2 × DP2, frames dealt over the world, windows": (
        4,
        "dense",
        {"tensor": 2},
        {"vision": {"deal": "world", "window": 1}},
    ),
    "windows of 3, offload": (1, "dense", {}, {"vision": {"window": 3, "offload": True, "recompute": True}}),
    "TP2 × PP2 × CP2": (8, "dense", {"tensor": 2, "pipeline": 2, "context": 2}, {}),
    "MoE, one process": (1, "moe", {}, {}),
    "MoE EP2": (2, "moe", {"expert": 2}, {}),
    "MoE EP2 × TP2": (4, "moe", {"expert": 2, "tensor": 2}, {}),
    "MoE EP2 × PP2": (4, "moe", {"expert": 2, "pipeline": 2}, {}),
}


def compare(toys: Toys, world, kind: str, parallel: dict, out: Path, freeze: tuple[str, ...] = (), **train) -> dict:
    """Trains in a layout and in plain PyTorch; returns the largest relative differences."""
    from transformers.modeling_utils import load_state_dict

    folder = toys.folder(kind)
    settings = settings_of(folder, parallel, freeze=freeze, moe=kind == "moe", **train)
    ranks = world.run(train_layout, folder, toys.checkpoint(kind), toys.root, toys.records, settings, out)
    reference = toys.reference(kind, freeze)
    start, after = load_state_dict(str(folder / "model.safetensors")), weights_of(out, folder)
    differences = {"loss": 0.0, "grad_norm": 0.0, "weights": 0.0}
    for (loss, norms, counts), (expected_loss, expected_norms) in zip(ranks[0], reference.steps, strict=True):
        assert counts["frames_encoded"] == counts["frames"] == 11
        differences["loss"] = max(differences["loss"], abs(loss / expected_loss - 1))
        total = sum(norm**2 for norm in expected_norms.values()) ** 0.5
        assert norms["grad_norm"] == pytest.approx(total, rel=1e-5)
        for part, expected in expected_norms.items():
            if part in freeze:
                assert norms[f"grad_norm/{part}"] == 0.0
            else:
                differences["grad_norm"] = max(differences["grad_norm"], abs(norms[f"grad_norm/{part}"] / expected - 1))
    for name, value in after.items():
        expected = reference.weights[name]
        update = (expected - start[name]).norm()
        if update == 0:
            assert torch.equal(value, start[name]), f"{name} is frozen but moved"
        else:
            difference = (value - expected).norm()
            differences["weights"] = max(differences["weights"], (difference / update).item())
            # Adding an update also rounds the weight it is added to, which is no error of the update: where an update
            # is tiny beside its weight that alone is 1e-4 of it. 2^-26 of the weight is what three roundings leave.
            assert difference < 1e-4 * update + 2**-26 * expected.norm(), name
    return differences


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, toys, tmp_path, request):
    size, kind, parallel, train = LAYOUTS[name]
    differences = compare(toys, request.getfixturevalue(f"world{size}"), kind, parallel, tmp_path / "out", **train)
    print(f"\n| {name} | " + " | ".join(f"{value:.1e}" for value in differences.values()) + " |")
    # Float32 sums in another order: the loss keeps 7 digits, and a gradient whose terms nearly cancel (biases of keys,
    # patch embedding) 4 or 5.
    assert differences["loss"] < 1e-5
    assert differences["grad_norm"] < 1e-5
    assert differences["weights"] < 2e-4  # roundings of the weights included, see compare


@pytest.mark.parametrize("freeze", [("vision",), ("projector",), ("language",), ("vision", "language")], ids="+".join)
def test_frozen_parts(freeze, toys, tmp_path, world2):
    differences = compare(toys, world2, "dense", {"tensor": 2}, tmp_path / "out", freeze)
    assert differences["loss"] < 1e-5
    assert differences["grad_norm"] < 1e-5
    assert differences["weights"] < 2e-4  # roundings of the weights included, see compare

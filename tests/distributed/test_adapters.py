"""Adapters in several layouts do what peft's do on transformers' model, and go into its files and back."""

import pytest
import torch
from adapted import ADAPTERS, LR, AdaptedStep, peft_model, step_of_peft, step_with_adapter
from parity import Toys, settings_of
from safetensors.torch import load_file

RECOMPUTED = {"recompute": "full", "vision": {"recompute": True, "chunk_patches": 64}}
# name: (processes, parallel settings, other settings)
DENSE = {
    "one process": (1, {}, {}),
    "recomputed": (1, {}, RECOMPUTED),
    "TP2": (2, {"tensor": 2}, {}),
    "TP2 without sequence parallelism": (2, {"tensor": 2, "sequence": False}, {}),
    "PP2": (2, {"pipeline": 2}, RECOMPUTED),
    "PP2 × VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "CP2": (2, {"context": 2}, {}),
    "TP2 × DP2, recomputed": (4, {"tensor": 2}, RECOMPUTED),
}
MOE = {
    "one process": (1, {}, {}),
    "EP2": (2, {"expert": 2}, {}),
    "expert TP2": (2, {"tensor": 2, "expert_tensor": 2}, RECOMPUTED),
    "EP2 × TP2": (4, {"expert": 2, "tensor": 2}, {}),
    "PP2": (2, {"pipeline": 2}, {}),
}
CASES = [
    (adapter, layout)
    for adapter, (kind, _) in ADAPTERS.items()
    for layout in (MOE if kind == "moe" else DENSE)
    if adapter != "rslora, patterns" or layout in ("one process", "TP2")
]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def references(toys):
    """By name: the folder that peft saved its adapter in, and its step from there."""
    made = {}

    def reference(name: str) -> tuple:
        if name not in made:
            kind, options = ADAPTERS[name]
            model, folder = peft_model(toys.folder(kind), options), toys.root / f"adapter {len(made)}"
            model.save_pretrained(folder)
            made[name] = folder, step_of_peft(model, toys.folder(kind), toys.records, toys.root)
        return made[name]

    return reference


def settings_with(toys: Toys, kind: str, adapter, parallel: dict, train: dict, reference: AdaptedStep) -> dict:
    freeze = tuple(part for part, norm in reference.norms.items() if norm == 0)  # peft has nothing there that learns
    settings = settings_of(toys.folder(kind), parallel, moe=kind == "moe", freeze=freeze, lr=LR, **train)
    settings["model"] |= {"load": str(toys.checkpoint(kind)), "adapter": str(adapter)}
    return settings


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_step_is_that_of_peft(name, layout, toys, references, tmp_path, request):
    """Tolerances as in the other layout tests: float32 sums in another order."""
    from megavlm.convert.adapter import ADAPTER_MODEL, Adapter
    from megavlm.model.shapes import Shapes

    kind, _ = ADAPTERS[name]
    processes, parallel, train = (MOE if kind == "moe" else DENSE)[layout]
    folder, reference = references(name)
    settings, out = settings_with(toys, kind, folder, parallel, train, reference), tmp_path / "mcore"
    world = request.getfixturevalue(f"world{processes}")
    ranks = world.run(step_with_adapter, toys.folder(kind), None, toys.root, toys.records, settings, out)
    loss, norms = ranks[0]
    assert loss == pytest.approx(reference.loss, rel=1e-5)
    for part, norm in reference.norms.items():
        assert norms[f"grad_norm/{part}"] == pytest.approx(norm, rel=3e-5), part
    Adapter(out, Shapes.from_hf(toys.folder(kind))).write(tmp_path / "peft")
    after = load_file(tmp_path / "peft" / ADAPTER_MODEL)
    assert after.keys() == reference.after.keys()
    for tensor, value in after.items():
        update = reference.after[tensor] - reference.before[tensor]
        assert update.norm() > 0, tensor
        assert (value - reference.after[tensor]).norm() <= 1e-4 * update.norm(), tensor

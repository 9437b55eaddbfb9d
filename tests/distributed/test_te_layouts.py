"""The layout table on Transformer Engine's own Python and Megatron's modules over it (tests/te_cpu)."""

import pytest
import te_cpu
from parity import settings_of
from test_layouts import check, compare, row_of_table

# name: (processes, model, parallel settings, other settings)
LAYOUTS = {
    "one process": (1, "dense", {}, {}),
    "TP2": (2, "dense", {"tensor": 2}, {}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "CP2": (2, "dense", {"context": 2}, {}),
    "MoE, one process": (1, "moe", {}, {}),
    "MoE EP2": (2, "moe", {"expert": 2}, {}),
    "MoE expert TP2": (2, "moe", {"tensor": 2, "expert_tensor": 2}, {}),
}


def te_settings(folder, parallel, **options):
    settings = settings_of(folder, parallel, **options)
    settings["model"]["kernels"] = "te"
    return settings


@pytest.mark.parametrize("name", LAYOUTS)
def test_te_layout(name, toys, te_world):
    size, kind, parallel, others = LAYOUTS[name]
    settings = te_settings(toys.folder(kind), parallel, moe=kind == "moe", **others)
    differences = compare(toys, te_world(size), kind, settings, toys.reference(kind))
    print(row_of_table(name, differences))
    check(differences)
    assert differences["counts"]["frames"] == 11
    print(te_world(size).run(te_cpu.calls))

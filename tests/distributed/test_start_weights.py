"""Losses that compare with the model as it was: the divergence of tuning, and the reference worked out in the step."""

import pytest
from parity import settings_of
from test_layouts import check, compare

KL = 2.0
# name: (processes, toy model, parallel settings, other settings)
LAYOUTS = {
    "one process, small chunks": (1, "dense-untied", {}, {"logprob_chunk_tokens": 5}),
    "TP2": (2, "dense", {"tensor": 2}, {}),
    "TP2 without sequence parallelism": (2, "dense", {"tensor": 2, "sequence": False}, {}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "CP2, windows of 3": (2, "dense", {"context": 2}, {"vision": {"window": 3}}),
    "MoE EP2": (2, "moe", {"expert": 2}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_divergence_from_the_start_is_that_of_plain_pytorch(layout, toys, request):
    """Two steps: in the first there is none yet."""
    processes, kind, parallel, train = LAYOUTS[layout]
    settings = settings_of(toys.folder(kind), parallel, moe=kind == "moe", kl_to_start=KL, **train)
    settings["model"]["load"] = str(toys.checkpoint(kind))
    reference = toys.reference(kind, kl=KL)
    assert reference.steps[1][0] != pytest.approx(toys.reference(kind).steps[1][0], rel=1e-3)
    check(compare(toys, request.getfixturevalue(f"world{processes}"), kind, settings, reference))

"""Every parallel layout computes the training step that plain PyTorch computes on transformers' own model."""

import os

import pytest
import torch
from parity import (
    ROWS,
    Toys,
    Trained,
    mostly_slow,
    named_as_in_hf,
    put_together,
    settings_of,
    train_layout,
    train_reference,
)
from toy import picture

# name: (processes, model, parallel settings); each runs without and with recompute of tower and decoder
LAYOUTS = {
    "one process": (1, "dense", {}),
    "DP2": (2, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "TP2 × CP2": (4, "dense", {"tensor": 2, "context": 2}),
    "TP2 × PP2": (4, "dense", {"tensor": 2, "pipeline": 2}),
    "CP2 × PP2": (4, "dense", {"context": 2, "pipeline": 2}),
    "TP2 × PP2 × CP2": (8, "dense", {"tensor": 2, "pipeline": 2, "context": 2}),
    "MoE, one process": (1, "moe", {}),
    "MoE EP2": (2, "moe", {"expert": 2}),
    "MoE EP2 × TP2": (4, "moe", {"expert": 2, "tensor": 2}),
    "MoE EP2 × PP2": (4, "moe", {"expert": 2, "pipeline": 2}),
    "MoE EP2 × CP2": (2, "moe", {"expert": 2, "context": 2}),
    "MoE expert TP2": (2, "moe", {"tensor": 2, "expert_tensor": 2}),
    "MoE EP2 × TP2 × PP2": (4, "moe", {"expert": 2, "tensor": 2, "pipeline": 2}),
}
RECOMPUTE = {"kept": {}, "recomputed": {"recompute": "full", "vision": {"recompute": True, "chunk_patches": 64}}}
BOTH = [(name, recompute) for name in LAYOUTS for recompute in RECOMPUTE]
# `make test` runs each layout once: recomputed where recomputation has most to do with it, otherwise kept.
RECOMPUTED = {"TP2 × CP2", "PP2 × VPP2", "TP2 × PP2 × CP2", "MoE expert TP2", "MoE EP2 × TP2 × PP2"}


def is_quick(case: tuple[str, str]) -> bool:
    name, recompute = case
    return name == "one process" or (recompute == "recomputed") == (name in RECOMPUTED)


# name: (processes, model, parallel settings, other settings)
VARIANTS = {
    "TP2 without sequence parallelism": (2, "dense", {"tensor": 2, "sequence": False}, {}),
    "PP2, 3 + 1 layers": (2, "dense", {"pipeline": 2, "first_stage_layers": 3}, {}),
    "PP4, single layers": (4, "dense", {"pipeline": 4}, {}),
    "CP4": (4, "dense", {"context": 4}, {}),
    "CP2, attention recomputed": (2, "dense", {"context": 2}, {"recompute": "selective"}),
    "windows of 3, offloaded": (1, "dense", {}, {"vision": {"window": 3, "offload": True, "recompute": True}}),
    "PP2, windows of 2": (2, "dense", {"pipeline": 2}, {"vision": {"window": 2}}),
    "MoE EP2, windows of 1": (2, "moe", {"expert": 2}, {"vision": {"window": 1}}),
    "DP2, frames over the world": (2, "dense", {}, {"vision": {"balance": "world"}}),
    "TP2 × DP2, frames over the world": (4, "dense", {"tensor": 2}, {"vision": {"balance": "world", "window": 1}}),
    "PP2 × DP2, frames over the world": (4, "dense", {"pipeline": 2}, {"vision": {"balance": "world", "window": 1}}),
    "CP2 × DP2, frames over the world": (4, "dense", {"context": 2}, {"vision": {"balance": "world"}}),
    "MoE EP2, frames over the world": (2, "moe", {"expert": 2}, {"vision": {"balance": "world"}}),
    "CP2 × PP2 × VPP2, windows of 2": (
        4,
        "dense",
        {"context": 2, "pipeline": 2, "virtual_pipeline": 2},
        {"vision": {"window": 2}},
    ),
    "TP2 × CP2 without sequence parallelism": (4, "dense", {"tensor": 2, "context": 2, "sequence": False}, {}),
    "MoE EP2 × CP2 × DP2": (4, "moe", {"expert": 2, "context": 2}, {}),
    "YaRN, CP2 × PP2, attention recomputed": (4, "yarn", {"context": 2, "pipeline": 2}, {"recompute": "selective"}),
}


def compare(
    toys: Toys,
    world,
    kind: str,
    settings: dict,
    reference: Trained,
    frozen=(),
    records=None,
    rows=ROWS,
    train=train_layout,
) -> dict:
    """Trains in a layout; returns the largest relative differences from ``reference``, and the last step's counts."""
    from transformers.modeling_utils import load_state_dict

    folder = toys.folder(kind)
    checkpoint, records = toys.checkpoint(kind), toys.records if records is None else records
    ranks = world.run(train, folder, checkpoint, toys.root, records, settings, rows)
    steps, pieces = ranks[0][0], [pieces for _, pieces in ranks]
    start, after = load_state_dict(str(folder / "model.safetensors")), named_as_in_hf(put_together(pieces), folder)
    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "weights": []}
    for (loss, norms, counts), (expected_loss, expected_norms) in zip(steps, reference.steps, strict=True):
        assert counts["frames_encoded"] == counts["frames"]
        found["loss"].append(abs(loss / expected_loss - 1))
        total = sum(norm**2 for norm in expected_norms.values()) ** 0.5
        found["grad_norm"].append(abs(norms["grad_norm"] / total - 1))
        for part, expected in expected_norms.items():
            if expected == 0:
                assert norms[f"grad_norm/{part}"] == 0.0
            else:
                found["grad_norm"].append(abs(norms[f"grad_norm/{part}"] / expected - 1))
    for part in frozen:
        assert all(norms[f"grad_norm/{part}"] == 0.0 for _, norms, _ in steps)
    for name, value in after.items():
        expected = reference.weights[name]
        update = (expected - start[name]).norm()
        if update == 0:
            assert torch.equal(value, start[name]), f"{name} is frozen but moved"
        else:
            found["weights"].append(((value - expected).norm() / update).item())
    largest = {name: torch.tensor(values).max().item() for name, values in found.items()}  # NaN if one is
    return {**largest, "counts": steps[-1][2]}


def check(differences: dict) -> None:
    """Float32 sums in another order: the loss keeps 7 digits; a gradient whose terms nearly cancel (biases of keys,
    patch embedding) 4 or 5, and so its update. A second step at a large rate enlarges what the first one left.
    """
    assert differences["loss"] < 1e-5
    assert differences["grad_norm"] < 3e-5
    assert differences["weights"] < 1e-4


def row_of_table(name: str, differences: dict) -> str:
    return f"\n| {name} | " + " | ".join(f"{differences[key]:.1e}" for key in ("loss", "grad_norm", "weights")) + " |"


@pytest.mark.parametrize(("name", "recompute"), mostly_slow(BOTH, is_quick))
def test_layout(name, recompute, toys, request):
    size, kind, parallel = LAYOUTS[name]
    settings = settings_of(toys.folder(kind), parallel, moe=kind == "moe", **RECOMPUTE[recompute])
    world = request.getfixturevalue(f"world{size}")
    differences = compare(toys, world, kind, settings, toys.reference(kind))
    print(row_of_table(f"{name}, {recompute}", differences))
    check(differences)
    assert differences["counts"]["frames"] == 11


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, toys, request):
    size, kind, parallel, others = VARIANTS[name]
    settings = settings_of(toys.folder(kind), parallel, moe=kind == "moe", **others)
    world = request.getfixturevalue(f"world{size}")
    differences = compare(toys, world, kind, settings, toys.reference(kind))
    print(row_of_table(name, differences))
    check(differences)


def in_blocks_of_two(*arguments):
    """Runs on every rank: ``train_layout`` with frames shared by two ranks each."""
    from megavlm.platform import groups

    before, groups._RANKS_OF_BLOCK = groups._RANKS_OF_BLOCK, 2
    try:
        return train_layout(*arguments)
    finally:
        groups._RANKS_OF_BLOCK = before


def test_frames_are_shared_in_blocks(toys, world4):
    settings = settings_of(toys.folder("dense"), {}, vision={"balance": "world"})
    found = compare(toys, world4, "dense", settings, toys.reference("dense"), train=in_blocks_of_two)
    check(found)
    assert found["counts"]["frames"] == 11


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"context": 2}], ids=["TP2", "CP2"])
@pytest.mark.parametrize("freeze", [("vision",), ("projector",), ("language",), ("vision", "language")], ids="+".join)
def test_frozen_parts(freeze, parallel, toys, world2):
    settings = settings_of(toys.folder("dense"), parallel, freeze=freeze, vision={"recompute": True})
    reference = toys.reference("dense", freeze)
    check(compare(toys, world2, "dense", settings, reference, freeze))


@pytest.mark.parametrize("layout", [(1, {}), (2, {"pipeline": 2})], ids=["one process", "PP2"])
def test_parts_with_learning_rates_of_their_own(layout, toys, request):
    size, parallel = layout
    scale = {"vision": 0.5, "projector": 2.0}
    settings = settings_of(toys.folder("dense"), parallel, lr_scale=scale)
    reference = toys.reference("dense", lr_scale=scale)
    check(compare(toys, request.getfixturevalue(f"world{size}"), "dense", settings, reference))


THAWING = {
    "one process": (1, "dense", {}, {}),
    "one process, recomputed": (1, "dense", {}, RECOMPUTE["recomputed"]),
    "DP2": (2, "dense", {}, {}),
    "TP2": (2, "dense", {"tensor": 2}, {"lr_scale": {"language": 0.5}}),
    "PP2": (2, "dense", {"pipeline": 2}, {}),
    "PP2 × VPP2, recomputed": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, RECOMPUTE["recomputed"]),
    "MoE EP2 × TP2": (4, "moe", {"expert": 2, "tensor": 2}, {}),
}


@pytest.mark.parametrize("name", THAWING)
def test_thaw(name, toys, request):
    """The decoder learns from the second step on, the tower in the third alone; until then their norms are 0."""
    size, kind, parallel, others = THAWING[name]
    freeze, unfreeze = ("vision", "language"), {"language": 1, "vision": 2}
    options = {"unfreeze_after": unfreeze, "steps": 3}
    settings = settings_of(toys.folder(kind), parallel, freeze=freeze, moe=kind == "moe", **options, **others)
    reference = toys.reference(kind, freeze, lr_scale=others.get("lr_scale"), **options)
    assert [[part for part, norm in norms.items() if norm == 0] for _, norms in reference.steps] == [
        ["vision", "language"], ["vision"], [],
    ]  # fmt: skip
    check(compare(toys, request.getfixturevalue(f"world{size}"), kind, settings, reference))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_world_leaves_nothing_behind(toys, world2):
    """Process groups have threads and memory: a world that stayed alive would slow down all that come after."""
    settings = settings_of(toys.folder("moe"), {"expert": 2}, moe=True)
    counts = []
    for _ in range(2):
        world2.run(train_layout, toys.folder("moe"), toys.checkpoint("moe"), toys.root, toys.records, settings)
        counts.append(world2.run(threads)[0])
    assert counts[1] <= counts[0] + 10  # of some 50 for each world


def test_the_balancing_loss_matters(toys):
    """Without it the router would move elsewhere by far more than the tolerance."""
    name = "model.language_model.layers.1.mlp.gate.weight"
    folder, rows = toys.folder("moe"), dict(rows=ROWS, steps=1)
    with_it, without = (
        train_reference(folder, toys.records, toys.root, aux=aux, **rows).weights[name] for aux in (0.05, 0.0)
    )
    from transformers.modeling_utils import load_state_dict

    start = load_state_dict(str(folder / "model.safetensors"))[name]
    assert (with_it - without).norm() > 1e-2 * (with_it - start).norm()


def _say(question: str, answer: str, images: list[str]) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"images": images} if images else {})}


# name: (records, rows): made of pictures whose names are filled in
ODD_STEPS = {
    "no picture": ([("Two and two?", "Four.", []), ("Say: blue.", "Blue, of course.", [])], ((0,), (1,))),
    "one giant picture": ([("<image>What?", "A page.", [("page", 512, 448)]), ("Hi!", "Hello.", [])], ((0,), (1,))),
    "many tiny pictures": (
        [("<image>" * 60 + "?", "Cats.", [("chelsea", 32, 32)] * 60), ("<image>?", "Cup.", [("coffee", 32, 64)])],
        ((0,), (1,)),
    ),
}
ODD_LAYOUTS = {
    "TP2 × CP2": {"tensor": 2, "context": 2},
    "CP2 × PP2": {"context": 2, "pipeline": 2},
    "TP2 × DP2, frames over the world": {"tensor": 2},
}


@pytest.fixture(scope="module", params=ODD_STEPS)
def odd_step(request, toys):
    """(records, rows, reference)."""
    made, rows = ODD_STEPS[request.param]
    records = [
        _say(question, answer, [picture(toys.root, name, (width, height)) for name, width, height in images])
        for question, answer, images in made
    ]
    return records, rows, train_reference(toys.folder("dense"), records, toys.root)


@pytest.mark.parametrize("layout", ODD_LAYOUTS)
def test_odd_steps(layout, odd_step, toys, world4):
    """Ranks without a frame, steps without any, one frame for four ranks, many tiny ones."""
    records, rows, reference = odd_step
    vision = {"balance": "world"} if "world" in layout else {}
    settings = settings_of(
        toys.folder("dense"), ODD_LAYOUTS[layout], global_batch_size=len(rows), seq_length=512, vision=vision
    )
    check(compare(toys, world4, "dense", settings, reference, records=records, rows=rows))

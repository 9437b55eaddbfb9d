"""train.groups and train.layer_decay: the same steps as torch.optim with parameter groups on transformers' model."""

import re

import pytest
import torch
from parity import (
    AUX,
    ROWS,
    mostly_slow,
    named_as_in_hf,
    part_of,
    put_together,
    settings_of,
    train_layout,
    train_reference,
)
from test_checkpoint import PP2, TP2, adam, run
from test_checkpoint import toys as saved_toys  # noqa: F401
from transformers.modeling_utils import load_state_dict

# A frozen router has no balancing loss, which the reference has.
FROZEN = {"dense": r"(layers|blocks)\.0\.", "moe": r"layers\.0\.self_attn|blocks\.0\."}
GROUPS = [
    {"match": r"embed_tokens|patch_embed", "lr_scale": 0.5},
    {"match": FROZEN["dense"], "freeze": True},
    {"match": r"o_proj|attn\.proj\.weight|mlp\.gate\.", "lr_scale": 2.0, "weight_decay": 0.3},
]
FIRST_STAGE = [{"match": r"language_model\.layers\.[01]\.|embed_tokens", "freeze": True}]
DECAY, LAYER_DECAY, VISION = 0.05, 0.8, 0.5
LAYOUTS = {
    "one process": (1, "dense", {}),
    "DP2": (2, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "MoE EP2": (2, "moe", {"expert": 2}),
}


def groups_of(kind: str) -> list[dict]:
    return [{**group, "match": FROZEN[kind]} if "freeze" in group else group for group in GROUPS]


def torch_groups(model, lr: float, kind: str) -> list[dict]:
    """What the settings above mean, written out by hand for the names of transformers' model."""
    found = []
    layers = {"language_model": len(model.model.language_model.layers), "visual": len(model.model.visual.blocks)}
    for name, parameter in model.named_parameters():
        if re.search(FROZEN[kind], name):
            continue
        scale = VISION if part_of(name) == "vision" else 1.0
        stack = "visual" if "visual" in name else "language_model"
        if layer := re.search(r"(layers|blocks)\.(\d+)\.", name):
            scale *= LAYER_DECAY ** (layers[stack] - 1 - int(layer[2]))
        elif re.search("embed", name):  # embed_tokens, patch_embed and pos_embed
            scale *= LAYER_DECAY ** layers[stack]
        own = re.search(r"o_proj|attn\.proj\.weight|mlp\.gate\.", name)
        if own:
            scale *= 2.0
        elif re.search("embed_tokens|patch_embed", name):
            scale *= 0.5
        decay = 0.0 if parameter.ndim == 1 else 0.3 if own else DECAY
        found.append({"params": [parameter], "lr": lr * scale, "weight_decay": decay})
    return found


def check_update(after: dict, expected: dict, start: dict) -> None:
    """To 1e-4 of each update, as in test_layouts.py, or to the rounding of float32 where the update is tiny."""
    for weight, value in after.items():
        update = (expected[weight] - start[weight]).norm()
        assert (value - expected[weight]).norm() <= 1e-4 * update + 1e-7 * start[weight].norm(), weight


@pytest.fixture(scope="module")
def expected(toys):
    """(kind, optimizer) → a run of torch's optimizer."""
    made = {}

    def find(kind: str, name: str):
        if (kind, name) not in made:
            lr = 0.2 if name == "sgd" else 0.05
            # With a large epsilon Adam's step does not turn the rounding of a gradient near 0 into a whole step.
            make = {
                "sgd": lambda model: torch.optim.SGD(torch_groups(model, lr, kind)),
                "adam": lambda model: torch.optim.AdamW(torch_groups(model, lr, kind), betas=(0.9, 0.95), eps=1e-2),
            }[name]
            aux = {"aux": AUX} if kind == "moe" else {}
            made[kind, name] = train_reference(
                toys.folder(kind), toys.records, toys.root, rows=ROWS, make_optimizer=make, **aux
            )
        return made[kind, name]

    return find


@pytest.mark.parametrize(
    ("name", "optimizer"),
    mostly_slow(
        [*((name, "sgd") for name in LAYOUTS), ("DP2", "adam"), ("PP2", "adam")],
        [("TP2", "sgd"), ("PP2", "sgd"), ("DP2", "adam")].__contains__,
    ),
)
def test_as_torch_with_parameter_groups(name, optimizer, toys, expected, request):
    size, kind, parallel = LAYOUTS[name]
    lr = {"lr": 0.2} if optimizer == "sgd" else {"lr": 0.05, "adam_eps": 1e-2}
    settings = settings_of(
        toys.folder(kind), parallel, moe=kind == "moe", optimizer=optimizer, groups=groups_of(kind),
        layer_decay=LAYER_DECAY, lr_scale={"vision": VISION}, **lr,
    )  # fmt: skip
    settings["train"]["weight_decay"] = DECAY
    world = request.getfixturevalue(f"world{size}")
    ranks = world.run(train_layout, toys.folder(kind), toys.checkpoint(kind), toys.root, toys.records, settings, ROWS)
    after = named_as_in_hf(put_together([pieces for _, pieces in ranks]), toys.folder(kind))
    start = load_state_dict(str(toys.folder(kind) / "model.safetensors"))
    frozen = [weight for weight in after if re.search(FROZEN[kind], weight)]
    assert len(frozen) > 10
    assert all(torch.equal(after[weight], start[weight]) for weight in frozen)
    reference = expected(kind, optimizer)
    check_update(after, reference.weights, start)
    for (loss, *_), (expected_loss, _) in zip(ranks[0][0], reference.steps, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "groups"),
    [pytest.param("adam", FIRST_STAGE, id="adam", marks=pytest.mark.slow), pytest.param("sgd", GROUPS, id="sgd")],
)
def test_continues_on_the_same_bits_in_groups(optimizer, groups, saved_toys, tmp_path, world2):  # noqa: F811
    """In the same layout, and in another one with the same numbers; of the first stage nothing is trained with Adam."""
    toy, train = (
        saved_toys["dense"],
        {"optimizer": optimizer, "groups": groups, "layer_decay": 0.9, "weight_decay": 0.1},
    )
    straight = world2.run(run, *toy, adam(toy, PP2, **train), tmp_path, steps=3, save_at=[2])
    folder = tmp_path / "step_00000002"
    for (metrics, weights, *_), (late, late_weights, *_) in zip(
        straight, world2.run(run, *toy, adam(toy, PP2, **train), tmp_path, steps=3, restore=folder), strict=True
    ):
        assert late == metrics[2:]
        assert all(torch.equal(x, y) for x, y in zip(weights, late_weights, strict=True))
    other = world2.run(run, *toy, adam(toy, TP2, **train), tmp_path, steps=3, restore=folder)
    assert other[0][0][0] == pytest.approx(straight[0][0][2], rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_a_stage_of_which_nothing_is_trained(size, toys, request):
    """The first stage of two is frozen as a whole; the other one is trained as in one process.

    In one process, nothing below the trained layers needs a gradient, but they are recomputed.
    """
    options = {"groups": FIRST_STAGE, "recompute": "full"}
    folder, freeze = toys.folder("dense-untied"), ("vision", "projector")
    settings = settings_of(folder, {"pipeline": size}, freeze=freeze, **options)
    make = lambda model: torch.optim.SGD(
        [p for n, p in model.named_parameters() if not re.search(r"visual|layers\.[01]\.|embed_tokens", n)], lr=0.2
    )
    reference = train_reference(folder, toys.records, toys.root, freeze, make_optimizer=make)
    world, load = request.getfixturevalue(f"world{size}"), toys.checkpoint("dense-untied")
    ranks = world.run(train_layout, folder, load, toys.root, toys.records, settings, ROWS)
    after = named_as_in_hf(put_together([pieces for _, pieces in ranks]), folder)
    check_update(after, reference.weights, load_state_dict(str(folder / "model.safetensors")))

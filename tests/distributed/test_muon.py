"""train.optimizer muon: steps as by hand on transformers' model in every layout, and continued on the same bits."""

import pytest
import torch
from parity import (
    AUX,
    ROWS,
    mostly_slow,
    named_as_in_hf,
    put_together,
    settings_of,
    train_layout,
    train_reference,
)
from test_checkpoint import DP2, PP2, TP2, adam, run
from test_checkpoint import toys as saved_toys  # noqa: F401
from transformers.modeling_utils import load_state_dict

LR, DECAY, MOMENTUM = 0.02, 0.1, 0.9
LAYOUTS = {
    "one process": (1, "dense", {}),
    "DP2": (2, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "MoE EP2": (2, "moe", {"expert": 2}),
    "MoE expert TP2": (2, "moe", {"tensor": 2, "expert_tensor": 2}),
    "TP2 DP2": (4, "dense", {"tensor": 2}),
    "TP2 PP2": (4, "dense", {"tensor": 2, "pipeline": 2}),
    "MoE EP2 DP2": (4, "moe", {"expert": 2}),
}


def by_hand(matrix: torch.Tensor) -> torch.Tensor:
    """The five iterations as a function of the singular values, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values @ right).to(matrix.dtype)


class ByHand:
    """Muon for the linear layers of transformers' model, torch's AdamW for the rest of it."""

    def __init__(self, model):
        linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        named = dict(model.named_parameters())
        self.fused = {p for name, p in named.items() if "gate_up" in name}  # two matrices of each expert
        self.matrices = {
            p: torch.zeros_like(p)
            for name, p in named.items()
            if (name in linears and "lm_head" not in name and "mlp.gate." not in name) or "experts" in name
        }
        rest = [p for p in named.values() if p not in self.matrices]
        groups = [
            {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": DECAY},
        ]
        self.adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-2)

    @torch.no_grad()
    def step(self):
        self.adam.step()
        for weight, moment in self.matrices.items():
            moment.mul_(MOMENTUM).add_(weight.grad, alpha=1 - MOMENTUM)
            looked_ahead = MOMENTUM * moment + (1 - MOMENTUM) * weight.grad
            matrices, stacked = ([looked_ahead], False) if weight.ndim == 2 else (list(looked_ahead), True)
            updates = []
            for matrix in matrices:
                gate_and_up = matrix.chunk(2) if weight in self.fused else [matrix]
                updates.append(torch.cat([0.2 * max(m.shape) ** 0.5 * by_hand(m) for m in gate_and_up]))
            update = torch.stack(updates) if stacked else updates[0]
            weight.mul_(1 - LR * DECAY).sub_(update, alpha=LR)


@pytest.fixture(scope="module")
def expected(toys):
    made = {}

    def find(kind: str):
        if kind not in made:
            aux = {"aux": AUX} if kind == "moe" else {}
            made[kind] = train_reference(
                toys.folder(kind), toys.records, toys.root, rows=ROWS, make_optimizer=ByHand, **aux
            )
        return made[kind]

    return find


@pytest.mark.parametrize("name", mostly_slow(LAYOUTS, {"DP2", "TP2"}.__contains__))
def test_as_by_hand(name, toys, expected, request):
    """To 2e-3 of an update: five iterations enlarge small singular values, and their rounding, up to 480 times."""
    size, kind, parallel = LAYOUTS[name]
    settings = settings_of(
        toys.folder(kind), parallel, moe=kind == "moe", optimizer="muon", lr=LR, adam_eps=1e-2, muon_momentum=MOMENTUM
    )
    settings["train"]["weight_decay"] = DECAY
    world, folder = request.getfixturevalue(f"world{size}"), toys.folder(kind)
    ranks = world.run(train_layout, folder, toys.checkpoint(kind), toys.root, toys.records, settings, ROWS)
    after = named_as_in_hf(put_together([pieces for _, pieces in ranks]), folder)
    start, reference = load_state_dict(str(folder / "model.safetensors")), expected(kind)
    off = {
        weight: ((value - reference.weights[weight]).norm() / (reference.weights[weight] - start[weight]).norm()).item()
        for weight, value in after.items()
    }
    assert max(off.values()) < 2e-3, sorted(off.items(), key=lambda item: -item[1])[:5]


# Layouts that divide the momenta in different ways: over matrices, over stages, over data ranks.
CONTINUED = {"TP2": TP2, "PP2": PP2, "DP2": DP2}


@pytest.mark.parametrize(
    ("name", "precision"),
    mostly_slow([(name, precision) for name in CONTINUED for precision in ("fp32", "bf16")], lambda c: c[1] == "fp32"),
)
def test_continues_on_the_same_bits_with_muon(name, precision, saved_toys, tmp_path, world2):  # noqa: F811
    """In the same layout; and in another one with the same numbers, because the state has the names of the weights."""
    toy, train = saved_toys["dense"], {"optimizer": "muon", "precision": precision, "lr": 0.005}
    settings = adam(toy, CONTINUED[name], **train)
    straight = world2.run(run, *toy, settings, tmp_path, steps=3, save_at=[2])
    folder = tmp_path / "step_00000002"
    for (metrics, weights, *_), (late, late_weights, *_) in zip(
        straight, world2.run(run, *toy, settings, tmp_path, steps=3, restore=folder), strict=True
    ):
        assert late == metrics[2:]
        assert all(torch.equal(x, y) for x, y in zip(weights, late_weights, strict=True))
    other = adam(toy, DP2 if name != "DP2" else TP2, **train)
    found = world2.run(run, *toy, other, tmp_path, steps=3, restore=folder)
    assert found[0][0][0] == pytest.approx(straight[0][0][2], rel=1e-4 if precision == "fp32" else 2e-2)

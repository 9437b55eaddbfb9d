"""The load of experts and the losses of their routers, against counts by hand from transformers' routers."""

import math
from pathlib import Path

import pytest
import torch
from parity import ROWS, Toys, balancing_loss, settings_of, train_layout, watch_routers
from test_layouts import check, compare
from toy import reference_inputs, reference_model

Z = 0.02  # of the z-loss: a tenth of the router's gradient in the toy
# name: (processes, parallel settings, other settings of train)
LAYOUTS = {
    "one process": (1, {}, {}),
    "one process, recomputed": (1, {}, {"recompute": "full"}),
    "EP2": (2, {"expert": 2}, {}),
    "PP2": (2, {"pipeline": 2}, {}),
    "TP2, experts recomputed": (2, {"tensor": 2}, {"recompute": ["moe"]}),
    "CP2": (2, {"context": 2}, {}),
}


def totals_of_a_step(folder: Path, checkpoint: Path, root: Path, records: list[dict], settings: dict):
    """Runs on every rank: a step of the toy, and what ``ExpertLoad`` knows of it."""
    from megavlm.training.step import Step

    made, make = [], Step.__init__

    def watched(self, *arguments) -> None:
        make(self, *arguments)
        made.append(self)

    Step.__init__ = watched
    try:
        train_layout(folder, checkpoint, root, records, settings)
    finally:
        Step.__init__ = make
    return made[0].expert_load.totals()


@pytest.fixture(scope="module")
def by_hand(toys: Toys) -> tuple[list[list[int]], list[float], list[float]]:
    """For each layer: the tokens of each expert, and balancing loss and z-loss as means over the rows."""
    from transformers import AutoProcessor

    folder = toys.folder("moe")
    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    text = model.config.text_config
    tokens = torch.zeros(text.num_hidden_layers, text.num_experts, dtype=torch.int64)
    balancing, z = torch.zeros(text.num_hidden_layers), torch.zeros(text.num_hidden_layers)
    with torch.no_grad():
        for row in ROWS:
            seen = watch_routers(model)
            for sample in row:
                model(**reference_inputs(processor, toys.records[sample], toys.root))
            for layer, parts in seen.items():
                logits = torch.cat(parts).float()
                chosen = logits.topk(text.num_experts_per_tok).indices
                tokens[layer] += chosen.flatten().bincount(minlength=text.num_experts)
                balancing[layer] += balancing_loss(logits, text) / len(ROWS)
                z[layer] += logits.logsumexp(-1).square().mean() / len(ROWS)
    return tokens.tolist(), balancing.tolist(), z.tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_and_losses_of_each_layer(name, toys, by_hand, request) -> None:
    size, parallel, others = LAYOUTS[name]
    settings = settings_of(toys.folder("moe"), parallel, moe=True, moe_z_loss_coeff=Z, **others)
    settings["train"]["steps"] = 1
    here = toys.folder("moe"), toys.checkpoint("moe"), toys.root, toys.records
    first, *rest = request.getfixturevalue(f"world{size}").run(totals_of_a_step, *here, settings)
    assert not any(rest), "the first rank alone has them"
    tokens, balancing, z = by_hand
    assert first.layers == list(range(1, len(tokens) + 1))
    assert first.tokens == tokens  # every token once, whatever is cut, and no padding
    assert first.balancing == pytest.approx(balancing, rel=1e-5)  # float32 sums in another order
    assert first.z == pytest.approx(z, rel=1e-5)


def test_a_frozen_decoder_is_counted_and_has_no_losses(toys, by_hand, world1) -> None:
    settings = settings_of(toys.folder("moe"), {}, freeze=("language",), recompute="full")
    settings["train"]["steps"] = 1
    here = toys.folder("moe"), toys.checkpoint("moe"), toys.root, toys.records
    (totals,) = world1.run(totals_of_a_step, *here, settings)
    assert totals.tokens == by_hand[0]
    assert totals.balancing is None
    assert totals.z is None


def test_a_dense_model_has_no_experts(toys, world1) -> None:
    settings = settings_of(toys.folder("dense"), {})
    settings["train"]["steps"] = 1
    here = toys.folder("dense"), toys.checkpoint("dense"), toys.root, toys.records
    assert world1.run(totals_of_a_step, *here, settings) == [None]


@pytest.mark.parametrize("name", ["one process", "EP2", "PP2", "TP2, experts recomputed", "CP2"])
def test_the_z_loss_trains_like_plain_pytorch(name, toys, request) -> None:
    size, parallel, _ = LAYOUTS[name]
    settings = settings_of(toys.folder("moe"), parallel, moe=True, moe_z_loss_coeff=Z)
    world, reference = request.getfixturevalue(f"world{size}"), toys.reference("moe", z=Z)
    check(compare(toys, world, "moe", settings, reference))
    name = "model.language_model.layers.1.mlp.gate.weight"
    without = toys.reference("moe").weights[name]
    assert math.isfinite(distance := (reference.weights[name] - without).norm().item())
    assert distance > 1e-3 * without.norm(), "the loss matters"

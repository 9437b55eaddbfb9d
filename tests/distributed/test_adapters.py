"""Adapters in several layouts do what peft's do on transformers' model, and go into its files and back."""

from dataclasses import replace

import pytest
import torch
from adapted import ADAPTERS, DECODER, LR, AdaptedStep, load_and_save, peft_model, step_of_peft, step_with_adapter
from parity import Toys, mostly_slow, settings_of
from safetensors.torch import load_file
from toy import reference_inputs, reference_model

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
    if adapter != "rslora, patterns" or layout in ("recomputed", "TP2")
    if "beside" not in adapter or layout in ("EP2", "EP2 × TP2")
]


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


# LoRA and its experts in each layout; the others where ranks hold parts of them or of the tokens.
@pytest.mark.parametrize(
    ("name", "layout"),
    mostly_slow(CASES, lambda case: case[0] in ("lora", "lora on experts") or case[1] in ("TP2", "CP2", "EP2 × TP2")),
)
def test_a_step_is_that_of_peft(name, layout, toys, references, tmp_path, request):
    """Tolerances as in the other layout tests: float32 sums in another order."""
    kind, _ = ADAPTERS[name]
    processes, parallel, train = (MOE if kind == "moe" else DENSE)[layout]
    folder, reference = references(name)
    settings = settings_with(toys, kind, folder, parallel, train, reference)
    check_step(request.getfixturevalue(f"world{processes}"), settings, reference, toys, kind, tmp_path)


@pytest.mark.parametrize("layout", ["one process", "TP2"])
def test_the_matrices_b_have_a_rate_of_their_own(layout, toys, references, tmp_path, request):
    """LoRA+ (adapter.lr_ratio): a step of SGD moves them that much further, and everything else as before."""
    processes, parallel, train = DENSE[layout]
    folder, reference = references("lora")
    settings = settings_with(toys, "dense", folder, parallel, train, reference)
    targets = ADAPTERS["lora"][1]["target_modules"]
    settings["adapter"] = {"type": "lora", "rank": 4, "alpha": 6.0, "targets": targets, "lr_ratio": 4.0}
    after = {
        name: reference.before[name] + (4 if "lora_B" in name else 1) * (value - reference.before[name])
        for name, value in reference.after.items()
    }
    expected = replace(reference, after=after)
    check_step(request.getfixturevalue(f"world{processes}"), settings, expected, toys, "dense", tmp_path)


def check_step(world, settings: dict, reference: AdaptedStep, toys: Toys, kind: str, root) -> None:
    """Takes a step with these settings and compares it with peft's."""
    from megavlm.convert.adapter import ADAPTER_MODEL, Adapter
    from megavlm.model.shapes import Shapes

    out = root / "mcore"
    ranks = world.run(step_with_adapter, toys.folder(kind), None, toys.root, toys.records, settings, out)
    loss, norms, _ = ranks[0]
    assert loss == pytest.approx(reference.loss, rel=1e-5)
    for part, norm in reference.norms.items():
        assert norms[f"grad_norm/{part}"] == pytest.approx(norm, rel=3e-5), part
    Adapter(out, Shapes.from_hf(toys.folder(kind))).write(root / "peft")
    after = load_file(root / "peft" / ADAPTER_MODEL)
    assert after.keys() == reference.after.keys()
    for tensor, value in after.items():
        update = reference.after[tensor] - reference.before[tensor]
        assert update.norm() > 0, tensor
        assert (value - reference.after[tensor]).norm() <= 1e-4 * update.norm(), tensor


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "TP2") for name, (kind, _) in ADAPTERS.items() if kind == "dense"]
    + [("lora", "PP2"), *(("lora on experts", layout) for layout in ("EP2", "expert TP2", "EP2 × TP2"))],
)
def test_a_peft_adapter_comes_back_bit_for_bit(name, layout, toys, references, tmp_path, request):
    """Into the model of a layout, out into a checkpoint, and into a folder that peft loads into an equal model."""
    from peft import PeftModel, get_peft_model_state_dict

    from megavlm.convert.adapter import ADAPTER_MODEL, Adapter
    from megavlm.model.shapes import Shapes

    kind, _ = ADAPTERS[name]
    processes, parallel, _ = (MOE if kind == "moe" else DENSE)[layout]
    folder, reference = references(name)
    settings = settings_with(toys, kind, folder, parallel, {}, reference)
    request.getfixturevalue(f"world{processes}").run(load_and_save, settings, tmp_path / "mcore")
    Adapter(tmp_path / "mcore", Shapes.from_hf(toys.folder(kind))).write(tmp_path / "peft", toys.folder(kind))
    before, after = load_file(folder / ADAPTER_MODEL), load_file(tmp_path / "peft" / ADAPTER_MODEL)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[tensor]) for tensor, value in before.items())
    if layout in ("TP2", "EP2"):
        loaded = get_peft_model_state_dict(
            PeftModel.from_pretrained(reference_model(toys.folder(kind)), tmp_path / "peft")
        )
        assert before.keys() == loaded.keys()
        assert all(torch.equal(value, loaded[tensor]) for tensor, value in before.items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_is_unmerged(name, toys, references, tmp_path):
    """The logits of the merged folder are those of peft's model to 1e-5 of their size, and both exports are the same.

    Four layers of float32 products in another order leave about 1e-6.
    """
    from peft import PeftModel
    from transformers import AutoProcessor

    from megavlm.convert import compare, mcore_to_hf
    from megavlm.convert.adapter import Adapter
    from megavlm.convert.merge import merge_adapter
    from megavlm.model.shapes import Shapes

    kind, _ = ADAPTERS[name]
    model, (folder, _) = toys.folder(kind), references(name)
    merge_adapter(model, folder, tmp_path / "merged", progress=False)
    adapter = Adapter(folder, Shapes.from_hf(model))
    mcore_to_hf(toys.checkpoint(kind), model, tmp_path / "exported", adapter=adapter, progress=False)
    assert compare(tmp_path / "merged", tmp_path / "exported", progress=False)[0] == []
    inputs = reference_inputs(AutoProcessor.from_pretrained(model), toys.records[1], toys.root)
    with torch.no_grad():
        apart = PeftModel.from_pretrained(reference_model(model), folder)(**inputs).logits
        merged = reference_model(tmp_path / "merged")(**inputs).logits
        base = reference_model(model)(**inputs).logits
    assert (merged - apart).norm() <= 1e-5 * apart.norm()
    assert (base - apart).norm() > 1e-2 * apart.norm()


@pytest.mark.parametrize("sequence", [True, False])
def test_dropout_leaves_copies_on_tensor_ranks_equal(sequence, toys, tmp_path, world2):
    """Where ranks see the same inputs they must lose the same features, or their copies would drift apart."""
    settings = settings_of(toys.folder("dense"), {"tensor": 2, "sequence": sequence}, freeze=("vision", "projector"))
    options = {"r": 4, "lora_dropout": 0.5, "target_modules": DECODER}
    peft_model(toys.folder("dense"), options).save_pretrained(tmp_path / "adapter")
    settings["model"] |= {"load": str(toys.checkpoint("dense")), "adapter": str(tmp_path / "adapter")}
    arguments = (toys.folder("dense"), None, toys.root, toys.records, settings, tmp_path / "out")
    (_, _, one), (_, _, other) = world2.run(step_with_adapter, *arguments)
    assert one.keys() == other.keys()
    assert any("lora_A" in name for name in one)
    assert any("lora_B" in name for name in one)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def of_experts(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts' adapters on a linear that multiplies in groups, and on each expert's tokens by itself."""
    from functools import partial

    from megavlm import platform
    from megavlm.adapters.attach import adapted
    from megavlm.adapters.lora import Lora
    from megavlm.adapters.sites import COLUMN, AdapterSite, Expert
    from megavlm.config.settings import AdapterSettings, ParallelSettings
    from megavlm.convert.names import table
    from megavlm.convert.peft_names import targeted
    from megavlm.model.shapes import Shapes

    class Grouped(torch.nn.Module):
        """As Transformer Engine's: tokens [n, in] of one expert after the other, and how many each has."""

        weights = torch.randn(2, 192, 128)

        def forward(self, tokens, lengths):
            return torch.cat([x @ w.T for x, w in zip(tokens.split(lengths), self.weights, strict=True)]), None

    platform.init(ParallelSettings())
    shapes, linear = Shapes.from_hf(folder), Grouped()
    settings = AdapterSettings(type="lora", rank=4)
    entry = next(e for e in table(shapes) if e.key.endswith("experts.linear_fc1.weight"))
    sites = [AdapterSite(linear, linear, entry, COLUMN, expert=Expert(index, 8, 0)) for index in (2, 3)]
    adapters = [Lora(site, settings, targeted(settings, shapes), torch.float32) for site in sites]
    for adapter in adapters:
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
    linear.register_forward_hook(partial(adapted, adapters))
    tokens = torch.randn(7, 128)
    apart = [
        x @ (w + adapter.factors()[1] @ adapter.factors()[0]).T
        for x, w, adapter in zip(tokens.split([5, 2]), linear.weights, adapters, strict=True)
    ]
    return linear(tokens, [5, 2])[0].detach(), torch.cat(apart).detach()


def test_experts_in_a_grouped_linear_have_each_its_own(toys, world1):
    ((together, apart),) = world1.run(of_experts, toys.folder("moe"))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-3)  # sums of 128 products of size 100


@pytest.mark.parametrize(
    ("attributes", "inside"),
    [
        ({"skip_bias_add": True}, False),
        ({"te_return_bias": True}, False),
        ({"te_return_bias": False}, True),
        ({}, True),
    ],
)
def test_a_bias_is_taken_from_the_output_where_it_is_in_it(attributes, inside):
    """Megatron's linears, Transformer Engine's and torch's; TE has an empty bias where there is none."""
    from megavlm.adapters.lora import _adds_bias

    linear = torch.nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(linear, name, value)
    assert _adds_bias(linear) == inside
    linear.bias = torch.nn.Parameter(torch.empty(0))
    assert not _adds_bias(linear)

"""The layout table on Transformer Engine's own Python and Megatron's modules over it (tests/te_cpu).

Same steps, same references and same bounds as those of the portable kernels in test_layouts.py.
"""

import contextlib
import os
from collections import Counter
from unittest import mock

import pytest
import te_cpu
from parity import ROWS, settings_of, train_layout
from test_layouts import RECOMPUTE, check, compare, row_of_table

from megavlm.base.errors import UserError

EVERY_LAYER = RECOMPUTE["recomputed"]
WINDOWS = {"vision": {"window": 2, "offload": True}}
SLOW = pytest.mark.slow  # the same code, in further combinations
# name: (processes, model, parallel settings, other settings); a row shows several things at once where it can
LAYOUTS = {
    "one process, recomputed": (1, "dense", {}, EVERY_LAYER),
    "TP2": (2, "dense", {"tensor": 2}, {}),
    "PP2 × VPP2, windows of 2, offloaded": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, WINDOWS),
    "CP2": (2, "dense", {"context": 2}, {}),
    "TP2 × CP2 × PP2, recomputed": (8, "dense", {"tensor": 2, "context": 2, "pipeline": 2}, EVERY_LAYER),
    "MoE, one process, experts recomputed": (1, "moe", {}, {"recompute": ["moe"]}),
    "MoE EP2 × CP2": (2, "moe", {"expert": 2, "context": 2}, {}),
    "MoE expert TP2, recomputed": (2, "moe", {"tensor": 2, "expert_tensor": 2}, EVERY_LAYER),
    "MoE EP2 × TP2": (4, "moe", {"expert": 2, "tensor": 2}, {}),
}
SLOW_LAYOUTS = {
    "one process": (1, "dense", {}, {}),
    "DP2, frames over the world": (2, "dense", {}, {"vision": {"balance": "world"}}),
    "TP2 without sequence parallelism": (2, "dense", {"tensor": 2, "sequence": False}, {}),
    "PP2": (2, "dense", {"pipeline": 2}, {}),
    "CP4": (4, "dense", {"context": 4}, {}),
    "YaRN, CP2 × PP2, MLP recomputed": (4, "yarn", {"context": 2, "pipeline": 2}, {"recompute": ["mlp"]}),
    "MoE, one process": (1, "moe", {}, {}),
    "MoE EP2": (2, "moe", {"expert": 2}, {}),
    "MoE EP2 × PP2": (4, "moe", {"expert": 2, "pipeline": 2}, WINDOWS),
    "MoE EP2 × TP2 × PP2": (4, "moe", {"expert": 2, "tensor": 2, "pipeline": 2}, {}),
}
# TE's functions that some rank of such a layout asks for: the row did run on TE.
ASKED = ("generic_gemm", "fused_attn_fwd", "fused_attn_bwd", "rmsnorm_bwd", "layernorm_bwd", "multi_tensor_sgd")
ASKED_BY_EXPERTS = ("te_general_grouped_gemm", "permute_with_mask_map", "unpermute_with_mask_map")
ASKED_BY_CONTEXT = ("thd_read_half_tensor", "thd_out_correction", "thd_grad_correction")
FROZEN = {
    "tower and decoder, TP2": (2, ("vision", "language"), {"tensor": 2}),
    "projector, CP2": (2, ("projector",), {"context": 2}),
}


def te_settings(folder, parallel: dict, **options) -> dict:
    settings = settings_of(folder, parallel, moe="moe" in folder.name, **options)
    settings["model"]["kernels"] = "te"
    return settings


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=SLOW) for name in SLOW_LAYOUTS)])
def test_te_layout(name, toys, te_world):
    size, kind, parallel, others = (LAYOUTS | SLOW_LAYOUTS)[name]
    settings = te_settings(toys.folder(kind), parallel, **others)
    differences = compare(toys, te_world(size), kind, settings, toys.reference(kind))
    print(row_of_table(name, differences))
    check(differences)
    assert differences["counts"]["frames"] == 11
    expected = set(ASKED)
    expected.update(ASKED_BY_EXPERTS if kind == "moe" else (), ASKED_BY_CONTEXT if "context" in parallel else ())
    assert expected <= set().union(*te_world(size).run(te_cpu.calls))


@pytest.mark.parametrize("name", FROZEN)
def test_te_frozen_parts(name, toys, te_world):
    size, freeze, parallel = FROZEN[name]
    settings = te_settings(toys.folder("dense"), parallel, freeze=freeze, vision={"recompute": True})
    check(compare(toys, te_world(size), "dense", settings, toys.reference("dense", freeze), freeze))


def train_on_portable_kernels(*args):
    """Runs on every rank: ``train_layout``, and which functions of TE it asked for, with TE installed and no GPU."""
    from te_cpu.preload import without_transformer_engine

    before = Counter(te_cpu.called)
    with contextlib.ExitStack() as stack:
        for owner, name, value in without_transformer_engine():
            stack.enter_context(mock.patch.object(owner, name, value))
        return train_layout(*args), dict(te_cpu.called - before)


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", "dense"), ("adam", "dense"), ("sgd", "moe")])
def test_te_is_left_alone_on_a_cpu(optimizer, kind, toys, te_world):
    """Megatron takes TE's optimizers and router wherever TE is installed, so also where no GPU runs them."""
    folder = toys.folder(kind)
    settings = settings_of(folder, {}, moe=kind == "moe", optimizer=optimizer, clip_grad=1.0)
    settings["model"]["kernels"] = "portable"
    arguments = folder, toys.checkpoint(kind), toys.root, toys.records, settings, ROWS
    ((_, asked),) = te_world(1).run(train_on_portable_kernels, *arguments)
    assert not asked


def train_as_asked_to_repeat(*args):
    """Runs on every rank: ``train_layout`` with repeated results, and which functions of TE it asked for."""
    before = Counter(te_cpu.called)
    with mock.patch.dict(os.environ, {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}):
        return train_layout(*args), dict(te_cpu.called - before)


def test_attention_that_repeats_its_results_is_torchs(toys, te_world):
    """On H100, TE admits cuDNN's repeating backward pass of packed rows for short rows only, and says nothing."""
    settings = te_settings(toys.folder("dense"), {}, deterministic=True)
    arguments = toys.folder("dense"), toys.checkpoint("dense"), toys.root, toys.records, settings, ROWS
    ((_, asked),) = te_world(1).run(train_as_asked_to_repeat, *arguments)
    assert "generic_gemm" in asked
    assert not {"fused_attn_fwd", "fused_attn_bwd"} & set(asked)


def train_without_fused_attention(*args):
    """Runs on every rank: what ``train_layout`` raises where cuDNN has no kernel."""
    import transformer_engine_torch as extension
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as module

    none = lambda *args, **kwargs: (extension.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "there is none")
    module._attention_backends["attention_params"] = None  # it remembers what it chose
    try:
        with mock.patch.object(extension, "get_fused_attn_backend", none):
            train_layout(*args)
    except UserError as error:
        return f"{error.message} → {error.remedy}"
    finally:
        module._attention_backends["attention_params"] = None
    return "it ran"


def test_attention_without_a_fused_kernel_is_refused(toys, te_world):
    """TE would keep the products of all queries and keys: 32 GiB for a row of 8,192 tokens of the 2B model."""
    folder = toys.folder("dense")
    arguments = folder, toys.checkpoint("dense"), toys.root, toys.records, te_settings(folder, {}), ROWS
    (told,) = te_world(1).run(train_without_fused_attention, *arguments)
    assert "finds no fused attention" in told
    assert "model.kernels to portable" in told

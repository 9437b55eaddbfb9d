"""What settings for speed become: Megatron's configurations, kernels, and numbers that stay as they were."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_shapes import RELEASED_MOE, write

from megavlm.base.errors import UserError
from megavlm.config.settings import ParallelSettings, TrainSettings
from megavlm.model import configs, kernels
from megavlm.model.configs import decoder_config, decoder_widths, tower_config
from megavlm.model.packed import PackedRow
from megavlm.model.shapes import Shapes


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """Megatron's configuration as given: its own checks ask for Transformer Engine, which may not be installed."""
    monkeypatch.setattr(configs, "TransformerConfig", SimpleNamespace)


@pytest.fixture
def shapes(tmp_path) -> Shapes:
    """Those of the released mixture of experts."""
    return Shapes.from_hf(write(tmp_path, RELEASED_MOE))


def decoder(shapes: Shapes, kernels: str = "portable", parallel: dict | None = None, **train):
    return decoder_config(
        shapes, ParallelSettings(**parallel or {}), TrainSettings(**train), kernels, grouped_experts=False
    )


@pytest.mark.parametrize(
    ("precision", "te_installed", "gpu", "expected"),
    [
        ("bf16", True, True, "te"),
        ("fp8", True, True, "te"),
        ("fp32", True, True, "portable"),  # for which Transformer Engine has no fused attention
        ("bf16", False, True, "portable"),
        ("bf16", True, False, "portable"),
    ],
)
def test_auto(precision, te_installed, gpu, expected, monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda: gpu)
    monkeypatch.setattr(kernels, "transformer_engine_found", lambda: te_installed)
    assert kernels.resolve("auto", precision) == expected


def test_deterministic(shapes):
    assert decoder(shapes, deterministic=True).deterministic_mode
    assert not decoder(shapes).deterministic_mode


@pytest.mark.parametrize(
    ("recompute", "granularity", "modules"),
    [("none", None, None), ("full", "full", None), (["mlp", "moe"], "selective", ["mlp", "moe"])],
)
def test_recompute(recompute, granularity, modules, shapes):
    config = decoder(shapes, recompute=recompute)
    assert config.recompute_granularity == granularity
    if modules:
        assert config.recompute_modules == modules
    assert config.batch_p2p_sync is False


def test_kernels_that_auto_has_chosen_are_asked_too(shapes):
    with pytest.raises(UserError, match="computing it twice"):
        decoder(shapes, "te", recompute=["core_attn"])
    with pytest.raises(UserError, match="only with Transformer Engine"):
        decoder(shapes, recompute=["layernorm"])


def test_experts(shapes, monkeypatch):
    with pytest.raises(UserError, match="the package deep_ep is not installed"):
        decoder(shapes, experts={"dispatcher": "deepep"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    config = decoder(shapes, experts={"dispatcher": "hybridep"})
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "hybridep")
    assert decoder(shapes).moe_token_dispatcher_type == "alltoall"
    assert decoder(shapes).moe_router_fusion is False
    assert decoder(shapes, experts={"fused_router": True}).moe_router_fusion is True


def test_fp8_of_decoder_and_tower_apart(shapes, unchecked):
    # TE's own defaults: with a scale for each few numbers, gradients need no wider range
    formats = {"blockwise": "e4m3", "mxfp8": "e4m3", "tensorwise": "hybrid", "delayed": "hybrid"}
    for recipe, number_format in formats.items():
        train = TrainSettings(precision="fp8", fp8={"recipe": recipe})
        config = decoder(shapes, precision="fp8", fp8={"recipe": recipe})
        assert (config.fp8, config.fp8_recipe) == (number_format, recipe)
        assert not hasattr(tower_config(shapes, train, "te"), "fp8")
    tower = tower_config(shapes, TrainSettings(precision="fp8", fp8={"tower": True}), "portable")
    assert (tower.fp8, tower.fp8_recipe) == ("e4m3", "blockwise")
    assert tower.disable_parameter_transpose_cache  # or its weights would be quantised once for the whole run
    assert not hasattr(decoder(shapes), "fp8")


def test_widths_on_a_rank(shapes):
    """30B-A3B: hidden 2048, 32 heads and 4 key/value heads of 128, experts of 768; no dense MLP."""
    assert decoder_widths(shapes, ParallelSettings(tensor=4, expert_tensor=2)) == {
        "hidden size": 2048, "attention": 1024, "queries, keys and values": 1280, "expert": 384,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tower_s_fused_gelu_is_its_own(dtype, shapes, unchecked):
    """Megatron's fusion is named after the exact GELU: it must be the tanh approximation that the tower needs."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    config = tower_config(shapes, TrainSettings(), "te")
    assert config.bias_activation_fusion
    assert config.activation_func is F.gelu
    assert not tower_config(shapes, TrainSettings(), "portable").bias_activation_fusion
    source = torch.Generator().manual_seed(0)
    x, bias, grad = (torch.randn(*shape, generator=source, dtype=dtype) for shape in ((64, 8), (8,), (64, 8)))
    results = []
    for compute in (bias_gelu_impl, lambda x, bias: F.gelu(x + bias, approximate="tanh")):
        a, b = x.clone().requires_grad_(), bias.clone().requires_grad_()
        with torch.compiler.set_stance("force_eager"):
            out = compute(a, b)
            out.backward(grad)
        results.append((out, a.grad, b.grad.sum(0) if b.grad.dim() > 1 else b.grad))
    for fused, plain in zip(*results, strict=True):
        # Megatron writes sqrt(2 / pi) with eight digits; sums of 64 terms of size 1
        assert torch.allclose(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "segments", "longest"),
    [
        ([5] * 3 + [1009], 16, 1024),
        ([100] * 17, 32, 128),
        ([1] * 16, 16, 16),  # not longer than the row
        ([4096, 4096], 16, 4096),
        ([4097, 4095], 16, 8192),
    ],
)
def test_lengths_of_attention_are_rounded_up(lengths, segments, longest):
    row = PackedRow.of(lengths, torch.device("cpu"))
    thd = row.as_thd()
    assert row.as_thd() is thd
    assert len(thd.cu_seqlens_q) == segments + 1
    assert thd.cu_seqlens_q.dtype == torch.int32
    real = thd.cu_seqlens_q.diff().tolist()
    assert real == lengths + [0] * (segments - len(lengths))
    assert thd.max_seqlen_q == thd.max_seqlen_kv == longest
    assert torch.equal(thd.cu_seqlens_kv, thd.cu_seqlens_q)

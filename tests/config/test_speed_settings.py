"""Settings for speed: what is refused, with which words, and what FP8 needs of shapes."""

import pytest

from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.layout.speed import check_speed_with_model

HF = "model: {hf: folder}\n"
FP8 = ("train.precision=fp8", "model.kernels=te")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.fp8={recipe: tensorwise}"], "train.fp8.recipe is tensorwise, but train.precision is bf16"),
        (["train.fp8={tower: true}"], "train.fp8.tower is True, but train.precision is bf16"),
        ([*FP8, "train.fp8={recipe: delayed, tower: true}"], "ranks encode different numbers of frames"),
        (["train.recompute=[mlp, mlp]"], "it names no module, or one twice"),
        (["train.recompute=[]"], "it names no module"),
        (["train.recompute=[attention]"], "allowed: none | full | list of core_attn, layernorm, mlp, moe, moe_act"),
        (["train.recompute=some"], "train.recompute is 'some'"),
        (["train.recompute=[core_attn]", "model.kernels=te"], "computing it twice would cost time and free nothing"),
        (["train.recompute=selective", "model.kernels=te"], "train.recompute has core_attn (selective means the same)"),
        (["train.recompute=[moe_act]", "model.kernels=portable"], "train.recompute has moe_act, but model.kernels"),
        (["train.recompute=[moe, moe_act]"], "moe includes it"),
        ([*FP8, "train.fp8={recipe: delayed}", "train.recompute=[moe_act]"], "train.fp8.recipe is delayed"),
        (["train.overlap={weights: true, gradients: false}"], "train.overlap.weights is true, but train.overlap.grad"),
        (["train.overlap={weights: true}", "train.optimizer=muon"], "is true and train.optimizer muon: weights are"),
        (["train.overlap={tensor: true}"], "train.overlap.tensor is true, but model.kernels is auto"),
        (["train.overlap={tensor: true}", "model.kernels=te"], "parallel.tensor 1"),
        (["train.experts={fused_router: true}"], "train.experts.fused_router is true, but model.kernels is auto"),
    ],
)
def test_refused(refused, overrides, message):
    assert message in refused(HF, *overrides).message


def test_the_former_name_of_recomputed_attention_still_works():
    assert Settings(model={"hf": "x"}, train={"recompute": "selective"}).train.recompute == ["core_attn"]


def check(
    *, seq_length=8192, parallel=None, decoder=None, tower=None, num_experts=None, all_moe=False, **train
) -> None:
    settings = Settings(
        model={"hf": "x", "kernels": "te"},
        data={"seq_length": seq_length},
        parallel=parallel or {},
        train={"precision": "fp8", **train},
    )
    check_speed_with_model(
        settings.train,
        settings.parallel,
        seq_length=seq_length,
        decoder_widths=decoder or {"hidden size": 4096, "MLP": 12288},
        tower_widths=tower or {"hidden size": 1152, "MLP": 4304},  # of the released 8B
        num_experts=num_experts,
        all_layers_have_experts=all_moe,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # 8,704 tokens / (2 × 8 ranks) = 544 = 4.25 × 128
        (dict(seq_length=8192 + 512, parallel={"context": 2, "tensor": 8}), "gives a rank 544 tokens of a row"),
        (dict(seq_length=200), "must be divisible by 128"),
        (dict(seq_length=200, fp8={"recipe": "tensorwise"}), "must be divisible by 16"),
        (dict(seq_length=16 * 9, fp8={"recipe": "mxfp8"}), "must be divisible by 32"),
        (dict(decoder={"hidden size": 4096, "MLP": 9728 // 16}), "the decoder has MLP 608"),
        (dict(fp8={"tower": True}), "the vision tower has MLP 4304"),
        (dict(recompute=["moe"]), "train.recompute (moe) is set for experts, but the model is dense"),
        (dict(experts={"dispatcher": "deepep"}), "train.experts.dispatcher is set for experts, but the model is dense"),
        (dict(experts={"dispatcher": "deepep"}, num_experts=8), "every rank has all experts whole"),
        (dict(recompute=["mlp"], num_experts=8, all_moe=True), "every layer of the model has experts"),
    ],
)
def test_what_does_not_fit_the_model(options, message):
    with pytest.raises(UserError) as caught:
        check(**options)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(seq_length=32768, parallel={"context": 2, "tensor": 8}),
        dict(seq_length=144, fp8={"recipe": "tensorwise", "tower": True}),
        dict(fp8={"recipe": "delayed"}),
    ],
)
def test_fp8_that_fits(options):
    check(**options)

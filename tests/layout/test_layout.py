"""Layouts that fit and layouts that do not."""

import re

import pytest

from megavlm.base.errors import UserError
from megavlm.config.settings import ParallelSettings, TrainSettings
from megavlm.layout.shapes import check_expert_settings, check_layout, check_window

SHAPES = {"num_heads": 32, "num_kv_heads": 8, "vocab_size": 151936, "num_layers": 36, "seq_length": 8192}


def check(world_size=8, batch=64, experts=None, **layout):
    shapes = {**SHAPES, **{key: layout.pop(key) for key in list(layout) if key in SHAPES}}
    parallel = ParallelSettings(**layout)
    return check_layout(parallel, world_size, num_experts=experts, global_batch_size=batch, **shapes)


@pytest.mark.parametrize(
    ("arguments", "data_parallel"),
    [
        ({}, 8),
        ({"tensor": 2}, 4),
        ({"tensor": 2, "pipeline": 2, "context": 2}, 1),
        ({"pipeline": 4, "virtual_pipeline": 3}, 2),
        ({"tensor": 2, "expert": 4, "experts": 128}, 4),
        ({"world_size": 32, "tensor": 4, "pipeline": 2, "expert": 8, "expert_tensor": 2, "experts": 128}, 4),
        ({"batch": None, "tensor": 2}, 4),
        ({"pipeline": 4, "first_stage_layers": 8, "last_stage_layers": 8}, 2),
        ({"pipeline": 2, "first_stage_layers": 19}, 4),
        ({"pipeline": 4, "virtual_pipeline": 2, "first_stage_layers": 6, "last_stage_layers": 6}, 2),
    ],
)
def test_fitting_layouts(arguments, data_parallel):
    assert check(**arguments) == data_parallel


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (
            {"world_size": 6, "tensor": 2, "pipeline": 2},
            "6 processes cannot hold the layout parallel.tensor × parallel.pipeline × parallel.context = 2 × 2 × 1 = 4",
            "start 4 or 8 processes",
        ),
        ({"world_size": 1, "tensor": 2}, "1 process cannot hold", "start 2 processes"),
        ({"world_size": 2, "expert": 4, "experts": 8}, "parallel.expert × parallel.expert_tensor", "start 4 processes"),
        ({"tensor": 8, "num_heads": 12, "num_kv_heads": 12}, "parallel.tensor is 8", "values that do: 1, 2, 4"),
        ({"tensor": 8, "num_kv_heads": 4}, "does not divide the model's 4 key/value heads", "1, 2, 4"),
        ({"tensor": 2, "vocab_size": 101}, "does not divide the model's 101 vocabulary entries", "values that do: 1"),
        ({"world_size": 32, "tensor": 32}, "does not divide the model's 8 key/value heads", "1, 2, 4, 8"),
        ({"pipeline": 8}, "parallel.pipeline is 8", "parallel.first_stage_layers can be 1 or 8"),
        (
            {"pipeline": 2, "num_layers": 3},
            "does not divide the model's 3 layers",
            "first_stage_layers can be 1 or 2 (or",
        ),
        (
            {"pipeline": 4, "virtual_pipeline": 2},
            "does not divide the model's 36 layers",
            "parallel.first_stage_layers can be 6 or 12 or 18 (or parallel.last_stage_layers)",
        ),
        (
            {"pipeline": 4, "first_stage_layers": 8, "last_stage_layers": 7},
            "leave 21",
            "parallel.first_stage_layers can be 7 or 9 or 11; parallel.last_stage_layers can be 6 or 8 or 10",
        ),
        ({"pipeline": 8, "num_layers": 6}, "does not divide the model's 6 layers", "values that do: 1, 2, 3, 6"),
        ({"pipeline": 8}, "parallel.pipeline is 8, which does not divide the model's 36 layers", "1, 2, 3, 4, 6, 9"),
        ({"pipeline": 4, "virtual_pipeline": 2}, "4 × 2 = 8, which does not divide the model's 36 layers", "12"),
        ({"expert": 2}, "parallel.expert is 2, but the model is dense: it would be ignored", "to 1"),
        ({"expert_tensor": 2}, "parallel.expert_tensor is 2, but the model is dense", "to 1"),
        ({"expert": 8, "experts": 12}, "does not divide the model's 12 experts", "1, 2, 3, 4, 6, 12"),
        ({"tensor": 2, "sequence": False, "experts": 8}, "only with sequence parallelism", "parallel.sequence to true"),
        ({"batch": 12}, "train.global_batch_size is 12, which is not divisible by the 8", "8 or 16"),
        ({"batch": 4}, "train.global_batch_size is 4, which is not divisible by the 8", "batch sizes: 8"),
        (
            {"batch": 4, "pipeline": 4, "virtual_pipeline": 3},
            "gives each of the 2 data-parallel ranks 2 micro-batches",
            "the nearest valid batch sizes: 8",
        ),
        ({"seq_length": 100, "context": 8}, "data.seq_length is 100", "96 and 112"),
        (
            {"pipeline": 4, "first_stage_layers": 8, "last_stage_layers": 7},
            "last_stage_layers 7 of the model's 36 layers leave 21 for 2 other stages",
            "the same number of layers",
        ),
        (
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 16, "last_stage_layers": 20},
            "determine all stages of an interleaved pipeline",
            "set only one of the two",
        ),
        ({"pipeline": 2, "first_stage_layers": 36}, "leave 0 for 1 other stage", "at least one"),
        (
            {"pipeline": 4, "virtual_pipeline": 2, "first_stage_layers": 7, "last_stage_layers": 7, "num_layers": 38},
            "first_stage_layers is 7, which is not divisible by parallel.virtual_pipeline = 2",
            "multiples of 2",
        ),
    ],
)
def test_layouts_that_do_not_fit(arguments, message, remedy):
    with pytest.raises(UserError) as caught:
        check(**arguments)
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_a_window_must_fill_an_interleaved_pipeline():
    parallel = ParallelSettings(pipeline=4, virtual_pipeline=2)
    check_window(None, parallel)
    check_window(8, parallel)
    check_window(6, ParallelSettings(pipeline=4))
    with pytest.raises(UserError, match=r"vision.window is 6; .* divisible by parallel.pipeline = 4") as caught:
        check_window(6, parallel)
    assert "4 or 8" in caught.value.remedy


def test_load_balancing_on_a_dense_model_would_be_ignored():
    check_expert_settings(TrainSettings(), None)
    check_expert_settings(TrainSettings(moe_aux_loss_coeff=0.0), None)
    check_expert_settings(TrainSettings(moe_aux_loss_coeff=0.01), 8)
    with pytest.raises(UserError, match=r"moe_aux_loss_coeff is 0.01, but the model is dense"):
        check_expert_settings(TrainSettings(moe_aux_loss_coeff=0.01), None)


def test_load_balancing_in_a_frozen_decoder_would_be_ignored():
    check_expert_settings(TrainSettings(), 8, decoder_trained=False)
    with pytest.raises(UserError, match=r"moe_aux_loss_coeff is 0.01, but model.freeze has language"):
        check_expert_settings(TrainSettings(moe_aux_loss_coeff=0.01), 8, decoder_trained=False)


@pytest.mark.parametrize("virtual_pipeline", [None, 2])
def test_every_number_of_layers_that_a_remedy_names_fits(virtual_pipeline):
    """For all numbers of layers and stages; where the remedy names none, no number fits."""
    batch = 5040  # divisible by every number of stages
    for layers in range(1, 41):
        for stages in range(2, 11):
            given = {"pipeline": stages, "virtual_pipeline": virtual_pipeline, "num_layers": layers}
            try:
                check(world_size=stages, batch=batch, **given)
            except UserError as error:
                _, _, listed = error.remedy.partition("parallel.first_stage_layers can be ")
                named = [int(number) for number in re.findall(r"\d+", listed)]
                for number in named or range(1, layers + 1):
                    if named:
                        check(world_size=stages, batch=batch, first_stage_layers=number, **given)
                    else:
                        with pytest.raises(UserError):
                            check(world_size=stages, batch=batch, first_stage_layers=number, **given)

"""Which layouts of a number of GPUs are valid for a released model, and why others are ruled out."""

from collections import Counter

import pytest

from megavlm.base.errors import UserError
from megavlm.plan.gpus import gpu_of
from megavlm.search.layouts import _uneven, layouts, with_changes


def test_every_valid_layout_is_there_once_and_the_others_have_a_reason(recipe) -> None:
    found = list(layouts(*recipe("8b"), 16, gpu_of("h100")))
    keys = Counter(tuple(changes.values()) for changes, _ in found)
    assert set(keys.values()) == {1}
    valid = [changes for changes, why in found if why is None]
    assert {c["parallel.tensor"] for c in valid} == {1, 2, 4, 8}  # 8 heads of keys and values; NVLink connects 8 GPUs
    assert {c["parallel.pipeline"] for c in valid} == {1, 2, 4, 8}  # on 16 GPUs, with a batch of 128
    assert {c["parallel.expert"] for c in valid} == {1}
    own = {"tensor": 2, "pipeline": 1, "virtual_pipeline": None, "context": 1, "expert": 1, "expert_tensor": 1}
    assert any(all(c[f"parallel.{name}"] == value for name, value in own.items()) for c in valid)
    reasons = Counter(why for _, why in found if why is not None)
    assert reasons["tensor parallelism beyond the 8 GPUs that NVLink connects"]
    assert reasons["layers not divisible"]


def test_experts_are_spread_in_every_way(recipe) -> None:
    found = list(layouts(*recipe("30b-a3b"), 32, gpu_of("h100")))
    valid = [changes for changes, why in found if why is None]
    assert {c["parallel.expert"] for c in valid} == {1, 2, 4, 8, 16, 32}
    assert {c["parallel.expert_tensor"] for c in valid} == {1, 2, 4}
    assert {c["parallel.tensor"] for c in valid} == {1, 2, 4}  # 4 heads of keys and values


def test_windows_are_short_where_the_step_has_many_rows(recipe) -> None:
    settings, shapes = recipe("8b")
    many = with_changes(settings, {"train.global_batch_size": 1024})
    found = [c for c, why in layouts(many, shapes, 16, gpu_of("h100")) if why is None]
    for changes in found:
        stages = changes["parallel.pipeline"]
        rows = 1024 * changes["parallel.tensor"] * changes["parallel.context"] * stages // 16
        assert changes["vision.window"] == (16 * stages if stages > 1 and rows > 16 * stages else None), changes
    own = with_changes(many, {"vision.window": 8})
    assert {c["vision.window"] for c, why in layouts(own, shapes, 16, gpu_of("h100")) if why is None} == {8}


def test_changes_are_checked_as_in_a_file(recipe) -> None:
    settings, _ = recipe("8b")
    changed = with_changes(settings, {"parallel.tensor": 4, "train.recompute": "full"})
    assert (changed.parallel.tensor, changed.train.recompute) == (4, "full")
    assert changed.train.global_batch_size == settings.train.global_batch_size
    assert not changed.train.is_changed("loss")
    with pytest.raises(UserError, match=r"parallel\.pipeline is 1"):
        with_changes(settings, {"parallel.virtual_pipeline": 2})


@pytest.mark.parametrize(
    ("layers", "pipeline", "chunks", "first", "last"),
    [
        (94, 2, 1, None, None),  # 47 each
        (94, 4, 1, 23, 23),  # and 24 twice
        (94, 8, 1, 11, 11),  # and 12 six times
        (94, 8, 2, 12, 10),  # and 12 six times: multiples of two
        (94, 16, 1, 5, 5),  # and 6 fourteen times
        (47, 2, 1, None, 23),
        (36, 8, 1, 3, 3),  # and 5 six times
        (36, 8, 4, None, None),  # nine chunks of four layers are too few for eight stages of which two are smaller
        (35, 4, 2, None, None),  # an odd number is not divisible into pairs of chunks
    ],
)
def test_stages_of_unequal_size_hold_all_layers(layers, pipeline, chunks, first, last) -> None:
    assert _uneven(layers, pipeline, chunks) == (first, last)


def test_94_layers_divide_into_many_pipelines(recipe) -> None:
    valid = [changes for changes, why in layouts(*recipe("235b-a22b"), 256, gpu_of("h100")) if why is None]
    assert {c["parallel.pipeline"] for c in valid} == {1, 2, 4, 8, 16, 32}

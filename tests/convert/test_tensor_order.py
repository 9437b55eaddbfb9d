"""Each layout against its definition, element by element, and against its inverse."""

import pytest
import torch

from megavlm.convert.tensor_order import Experts, FusedQkv, GroupedQkv, Same, Stacked, views_of_box

HEADS, GROUPS, DIM, HIDDEN = 6, 2, 4, 5


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize("inner", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_grouped_qkv(inner):
    q, k, v = numbered(HEADS * DIM, *inner), -numbered(GROUPS * DIM, *inner) - 1, 1000 + numbered(GROUPS * DIM, *inner)
    each = HEADS // GROUPS * DIM
    expected = []
    for group in range(GROUPS):
        expected += [q[group * each : (group + 1) * each]]
        expected += [x[group * DIM : (group + 1) * DIM] for x in (k, v)]
    expected = torch.cat(expected)
    layout = GroupedQkv(GROUPS)
    assert torch.equal(layout.to_mcore([q, k, v], tuple(expected.shape)), expected)
    back = layout.to_hf(expected, [x.shape for x in (q, k, v)])
    assert all(torch.equal(x, y) for x, y in zip(back, (q, k, v), strict=True))


@pytest.mark.parametrize("inner", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_fused_qkv(inner):
    qkv = numbered(3 * HEADS * DIM, *inner)
    q, k, v = qkv.chunk(3)
    expected = torch.cat([x[h * DIM : (h + 1) * DIM] for h in range(HEADS) for x in (q, k, v)])
    assert torch.equal(FusedQkv(HEADS).to_mcore([qkv], tuple(qkv.shape)), expected)
    assert torch.equal(FusedQkv(HEADS).to_hf(expected, [qkv.shape])[0], qkv)


def test_stacked():
    gate, up = numbered(3, HIDDEN), 100 + numbered(3, HIDDEN)
    both = Stacked().to_mcore([gate, up], (6, HIDDEN))
    assert torch.equal(both[:3], gate)
    assert torch.equal(both[3:], up)
    assert all(torch.equal(x, y) for x, y in zip(Stacked().to_hf(both, [(3, 5), (3, 5)]), (gate, up), strict=True))


def test_same_flattens_a_convolution():
    conv = numbered(7, 3, 2, 4, 4)
    matrix = Same().to_mcore([conv], (7, 96))
    assert matrix[2, 1 * 32 + 1 * 16 + 3 * 4 + 2] == conv[2, 1, 1, 3, 2]
    assert torch.equal(Same().to_hf(matrix, [conv.shape])[0], conv)


def test_experts_are_turned_only_when_the_shape_says_so():
    stored = numbered(3, 6, 5)
    assert torch.equal(Experts().to_mcore([stored], (3, 6, 5)), stored)
    assert torch.equal(Experts().to_mcore([stored], (3, 5, 6)), stored.mT)
    assert torch.equal(Experts().to_hf(stored, [(3, 5, 6)])[0], stored.mT)
    square = numbered(3, 4, 4)
    assert torch.equal(Experts().to_mcore([square], (3, 4, 4)), square)


@pytest.mark.parametrize("inner", [(HIDDEN,), ()], ids=["weight", "bias"])
def test_blocks_are_the_megatron_tensor_in_pieces_that_are_no_copies(inner):
    rows, kv = HEADS * DIM, GROUPS * DIM
    cases = {
        Same(): [(rows, *inner)],
        Stacked(): [(rows, *inner)] * 2,
        GroupedQkv(GROUPS): [(rows, *inner), (kv, *inner), (kv, *inner)],
        FusedQkv(HEADS): [(3 * rows, *inner)],
    }
    for layout, shapes in cases.items():
        parts = [100 * number + numbered(*shape) for number, shape in enumerate(shapes)]
        shape = (sum(part.shape[0] for part in parts), *inner)
        blocks = layout.blocks(parts, shape)
        assert torch.equal(torch.cat(blocks), layout.to_mcore(parts, shape))
        owners = {part.untyped_storage().data_ptr() for part in parts}
        assert {block.untyped_storage().data_ptr() for block in blocks} == owners


def test_a_box_is_cut_out_of_the_blocks_without_a_copy():
    q, k, v = (
        numbered(HEADS * DIM, HIDDEN),
        1000 + numbered(GROUPS * DIM, HIDDEN),
        2000 + numbered(GROUPS * DIM, HIDDEN),
    )
    whole = GroupedQkv(GROUPS).to_mcore([q, k, v], (40, HIDDEN))
    blocks = GroupedQkv(GROUPS).blocks([q, k, v], (40, HIDDEN))
    for first, last in ((0, 40), (10, 20), (11, 33), (39, 40)):
        box = torch.full((last - first, 2), -1)
        for rows, view in views_of_box(blocks, (first, 3), tuple(box.shape)):
            box[rows] = view
        assert torch.equal(box, whole[first:last, 3:])
    beyond = list(views_of_box(blocks, (30, 0), (16, HIDDEN)))  # of a padded vocabulary: six rows are in no block
    assert sum(len(view) for _, view in beyond) == 10
    for rows, view in beyond:
        view.copy_(torch.zeros(16, HIDDEN)[rows])
    assert not GroupedQkv(GROUPS).to_mcore([q, k, v], (40, HIDDEN))[30:].any()

"""The distribution of frames, and the plan of which rank sends which visual token where."""

import itertools

import numpy as np
import pytest
from skimage import data as photographs
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from megavlm.layout.frame_balance import RankShare, VisualRow, VisualTokens, balance_frames, frame_cost, plan_exchange
from megavlm.layout.row_cut import RowCut

LINEAR_8B = 2.0 * 1152 + 4304


def window_of_photographs(tokens: int, seed: int) -> np.ndarray:
    """Patches of real photographs for a number of visual tokens; longer sides from 64 to 2,000 px, evenly in log."""
    random = np.random.default_rng(seed)
    shapes = [getattr(photographs, name)().shape[:2] for name in ("astronaut", "chelsea", "coffee", "rocket", "page")]
    patches = []
    for index in itertools.count():
        side = np.exp(random.uniform(np.log(64), np.log(2000)))
        height, width = (max(32, round(edge * side / max(shapes[index % 5]))) for edge in shapes[index % 5])
        height, width = smart_resize(height, width, factor=32, min_pixels=65536, max_pixels=16777216)
        if sum(patches) + height * width // 256 > 4 * tokens:
            return np.array(patches)
        patches.append(height // 16 * (width // 16))


@pytest.mark.parametrize("seed", range(5))
def test_photographs_of_many_sizes_are_dealt_evenly(seed):
    patches = window_of_photographs(4 * 8192, seed)  # the default: four rows
    owner, cost = balance_frames(patches, 4, LINEAR_8B), frame_cost(patches, LINEAR_8B)
    assert cost == pytest.approx(LINEAR_8B * patches + patches.astype(float) ** 2)
    loads = np.array([cost[owner == rank].sum() for rank in range(4)])
    assert loads.max() / loads.mean() <= 1.10
    by_count = np.array([cost[rank::4].sum() for rank in range(4)])  # as many pictures for each, whatever their cost
    assert by_count.max() / by_count.mean() > 1.10


def test_one_giant_and_thousands_of_tiny_frames():
    assert len(balance_frames(np.array([60000]), 4, LINEAR_8B)) == 1
    assert np.bincount(balance_frames(np.full(5000, 4), 4, LINEAR_8B)).tolist() == [1250] * 4
    assert len(balance_frames(np.array([], dtype=np.int64), 4, LINEAR_8B)) == 0


def shares_of(context: int, slices: int, stages: list[tuple[int, ...]], data: int) -> list[RankShare]:
    return [
        RankShare(context, c, slices, s, planes, dp_rank=d)
        for d in range(data) for planes in stages for c in range(context) for s in range(slices)
    ]  # fmt: skip


@pytest.mark.parametrize(("context", "slices", "data"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_every_token_arrives_where_it_belongs(context, slices, data):
    """Carried out in numpy: a token's value is (data rank, micro-batch, frame, index), and must arrive there.

    Frames 1 and 4 of each row are used twice, as by the two answers of a pair.
    """
    random = np.random.default_rng(0)
    shares = shares_of(context, slices, [(0, 1), (2,), ()], data)
    lengths = [[32, 64, 32], [96, 32]]
    rows, values, wanted = [], [], {}  # per data rank its window of rows; encoded tokens; (data rank, row) → where what
    for d in range(data):
        rows.append([])
        for m, row in enumerate(lengths):
            counts, uses = random.integers(1, 9, size=5), np.array([0, 1, 1, 2, 3, 4, 4])
            starts = np.sort(random.choice(sum(row) // 8, 7, replace=False)) * 8
            rows[d].append(VisualRow(row, counts, np.ones_like(counts), uses, starts))
            values += [(d, m, frame, n) for frame in range(5) for n in range(counts[frame])]
            wanted[d, m] = {
                start + n: (d, m, frame, n)
                for start, frame in zip(starts, uses, strict=True) for n in range(counts[frame])
            }  # fmt: skip
    tokens = VisualTokens.join([VisualTokens.of(window, shares[0], d) for d, window in enumerate(rows)], [10] * data)
    frame_tokens = np.concatenate([row.frame_tokens for window in rows for row in window])
    owner = balance_frames(4 * frame_tokens, len(shares), 10.0)
    plans = [plan_exchange(tokens, frame_tokens, owner, shares, rank, len(lengths)) for rank in range(len(shares))]
    own = []  # per rank, a feature of each plane and token: (plane, data rank, micro-batch, frame, number)
    for rank, plan in enumerate(plans):
        mine = np.array(values)[np.repeat(owner, frame_tokens) == rank]
        assert plan.num_own == len(mine)
        own.append(np.array([(plane, *value) for plane in range(3) for value in mine]).reshape(-1, 5))
    for rank, (share, plan) in enumerate(zip(shares, plans, strict=True)):
        sent = [np.split(own[s][p.send.numpy()], np.cumsum(p.send_counts)[:-1])[rank] for s, p in enumerate(plans)]
        assert plan.receive_counts == [len(part) for part in sent]
        received = np.concatenate(sent)
        for m, (take, positions) in enumerate(zip(plan.take, plan.positions, strict=True)):
            order = RowCut.of(lengths[m], context).order[share.context_index].reshape(slices, -1)[share.slice_index]
            visual = wanted[share.dp_rank, m] if share.planes else {}
            assert sorted(order[positions.numpy()]) == sorted(set(visual) & set(order))
            for plane, index in zip(share.planes, take, strict=True):
                got = [tuple(value) for value in received[index.numpy()]]
                assert got == [(plane, *visual[at]) for at in order[positions.numpy()]]

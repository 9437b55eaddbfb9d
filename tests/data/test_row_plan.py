"""Lengths of rows by step, weights of samples, and epochs that end."""

import copy
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from megavlm.config.settings import DataSettings
from megavlm.data.draft import Draft
from megavlm.data.loader import build_loader
from megavlm.data.row import IGNORE
from megavlm.data.row_plan import RowPlan
from megavlm.records.skipped_samples import TOO_LONG, TOO_LONG_YET
from megavlm.sources.blend import open_sources, samples_of_epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of documents: 23 of 1 to 8 words, which are 14 to 50 tokens, and 6 of 2."""
    root = tmp_path_factory.mktemp("documents")
    for name, lengths in (("long", [1 + 5 * n % 8 for n in range(23)]), ("short", [2] * 6)):
        texts = [json.dumps({"text": f"{name}{n}:" + " word" * length}) for n, length in enumerate(lengths)]
        (root / f"{name}.jsonl").write_text("\n".join(texts))
    return root


@pytest.fixture
def load(folder, renderer):
    """load(plan, …): a loader of documents, closed at the end."""
    loaders = []

    def load(plan, names=("long",), *, dp_rank=0, dp_size=1, **settings):
        sources = [{"path": folder / f"{name}.jsonl"} if isinstance(name, str) else name for name in names]
        settings = DataSettings(**{"seq_length": 64, "workers": 0} | settings, train=sources)
        own = copy.copy(renderer)  # a new one takes half a second
        own.seq_length, own.truncates = settings.seq_length, settings.too_long == "truncate"
        ranks = {"dp_rank": dp_rank, "dp_size": dp_size}
        loaders.append(build_loader(settings, own, "tune", seed=0, plan=plan, **ranks))
        return loaders[-1]

    yield load
    for loader in loaders:
        loader.close()


def test_the_step_of_each_row():
    """2 rows in steps 1 to 3, 4 in steps 4 and 5, then 6."""
    plan = RowPlan(rows=6, batch_ramp={5: 4, 3: 2}, length_ramp={3: 16, 5: 32})
    places = [plan.place(row) for row in range(20)]
    assert [step for step, _ in places] == [1, 1, 2, 2, 3, 3, *[4] * 4, *[5] * 4, *[6] * 6]
    assert [number for _, number in places] == [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert [plan.length(row, 64) for row in range(20)] == [16] * 6 + [32] * 8 + [64] * 6


@pytest.mark.parametrize(("per", "weight"), [("token", 6.0), ("sample", 1.5), ("sqrt", 3.0)])
def test_what_a_sample_counts(per, weight):
    """Four targets of weights 1, 1, 2 and 2, of which no sum would be 4; the first token is nobody's target."""
    weights = np.array([9, 1, 0, 1, 2, 2], dtype=np.float32)
    nothing = np.zeros(0)
    draft = Draft(
        token_ids=nothing, repeats=nothing, weights=weights, frame_grids=nothing, frame_images=nothing, media=[],
        length=6, source="a:1", index=0,
    )  # fmt: skip
    RowPlan(per).weigh(draft, 0.5)
    assert draft.weights[1:].sum() == pytest.approx(weight * 0.5)
    assert draft.weights[1:] / draft.weights[1] == pytest.approx([1, 0, 1, 2, 2])


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_each_sample_of_a_row_counts_once(load, folder, too_long):
    """Also if it is truncated: rows of 24 tokens are shorter than most of the documents."""
    sources = [{"path": folder / "long.jsonl"}, {"path": folder / "short.jsonl", "loss_weight": 3.0}]
    loader = load(RowPlan("sample"), sources, seq_length=24 if too_long == "truncate" else 64, too_long=too_long)
    seen = set()
    for row in islice(loader, 20):
        for place, source in enumerate(row.source_ids):
            part = slice(row.cu_seqlens[place], row.cu_seqlens[place + 1])
            weights = row.loss_weights[part][row.labels[part] != IGNORE]
            assert weights.sum().item() == pytest.approx([1.0, 3.0][source])
            assert (weights == weights[0]).all()
            seen.add((source, len(weights)))
    assert len(seen) > (2 if too_long == "truncate" else 5)


def test_samples_that_only_the_ramp_drops_have_a_kind_of_their_own(load):
    """Of 14 to 50 tokens, for rows of 24 and then of 40: those above 40 fit in no row, others later."""
    loader = load(RowPlan(rows=2, length_ramp={20: 24}), seq_length=40, packing_buffer=1)
    skipped = {s.index: s for row in islice(loader, 20) for s in row.skipped_samples}
    kinds = {index: sample.kind for index, sample in skipped.items()}
    assert set(kinds.values()) == {TOO_LONG, TOO_LONG_YET}
    whole = load(RowPlan(rows=2), seq_length=40, packing_buffer=1)._dataset
    for index, kind in kinds.items():
        found = whole.reread(0, index)
        assert kind == (TOO_LONG_YET if found is None else found.kind)


def rows(loader, count):
    """(samples, tokens, state of the weights) of rows, to compare bit for bit."""
    return [(row.sources, row.input_ids.tolist(), row.loss_weights.tolist()) for row in islice(loader, count)]


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_grow_and_continue_on_the_same_bits(load, workers, too_long):
    plan = RowPlan(rows=2, length_ramp={2: 32, 4: 48})
    how = {"workers": workers, "too_long": too_long, "packing_buffer": 6}
    straight = rows(load(plan, **how), 14)
    assert [len(tokens) for _, tokens, _ in straight] == [32] * 4 + [48] * 4 + [64] * 6
    for done in (4, 6):
        before, after = load(plan, **how), load(plan, **how)
        assert rows(before, done) == straight[:done]
        after.load_state_dict(before.state_dict())
        assert rows(after, 14 - done) == straight[done:], done


def test_rows_grow_in_the_same_step_on_other_ranks_and_workers(load):
    """After three steps of two rows on one rank: on two ranks, then with one more worker each."""
    plan = RowPlan(rows=2, length_ramp={4: 32, 6: 48})
    before = load(plan, workers=2)
    rows(before, 6)
    for dp_size, workers in ((2, 1), (2, 2)):
        ranks = [load(plan, dp_rank=rank, dp_size=dp_size, workers=workers) for rank in range(dp_size)]
        for rank in ranks:
            rank.load_state_dict(before.state_dict())
        for step in range(4, 9):
            lengths = {len(tokens) for rank in ranks for _, tokens, _ in rows(rank, 1)}
            assert lengths == {32 if step == 4 else 48 if step <= 6 else 64}, step


@pytest.mark.parametrize(("workers", "epochs"), [(0, 2.5), (2, 1.0)])
def test_epochs_use_each_sample_so_often_and_end(load, workers, epochs):
    loader = load(RowPlan(epochs=epochs), workers=workers)
    counts, rest = Counter(), 0
    for row in islice(loader, 60):
        counts.update(row.indices)
        rest += not row.num_samples
        if not row.num_samples:
            assert (row.num_targets, row.num_tokens, row.loss_weights.sum().item()) == (0, 0, 0.0)
            assert len(row.input_ids) == 64
    assert counts.total() == round(23 * epochs) == loader.ends[0]
    assert len(counts) == 23
    # of the last, half an epoch, and an epoch at a time: no sample is more than one ahead
    assert max(counts.values()) - min(counts.values()) == (epochs == 2.5)
    assert rest > 5


def test_an_end_that_continues(load):
    """Also with other workers, within the last epoch and behind it."""
    plan = RowPlan(epochs=2.0)
    straight = rows(load(plan, packing_buffer=6), 40)
    first = next(n for n, row in enumerate(straight) if not row[0])
    for done in (first - 2, first, 38):
        before, same, other = (
            load(plan, workers=0, packing_buffer=6),
            load(plan, workers=0, packing_buffer=6),
            load(plan, workers=2, packing_buffer=6),
        )
        used = Counter(source for sources, _, _ in rows(before, done) for source in sources)
        same.load_state_dict(before.state_dict())
        assert rows(same, 40 - done) == straight[done:], done
        other.load_state_dict(before.state_dict())
        used += Counter(source for sources, _, _ in rows(other, 50) for source in sources)
        assert set(used.values()) == {2}, done
        assert len(used) == 23


@pytest.mark.parametrize(
    ("blend", "ends"),
    [
        # 29 samples are read in an epoch, as many as there are, by weights of 3 to 1
        ([{"weight": 3.0}, {"weight": 1.0}], [22, 7]),
        ([{"epochs": 1.0}, {"epochs": 3.0}], [23, 18]),
    ],
)
def test_what_an_epoch_of_a_blend_is(folder, blend, ends):
    paths = [folder / "long.jsonl", folder / "short.jsonl"]
    settings = DataSettings(train=[{"path": path, **more} for path, more in zip(paths, blend, strict=True)])
    assert samples_of_epochs(open_sources(settings), 1.0) == ends
    assert samples_of_epochs(open_sources(settings), 2.0) == pytest.approx([2 * n for n in ends], abs=1)


def test_replay_is_read_beside_an_epoch(folder):
    settings = DataSettings(
        train=[{"path": folder / "long.jsonl"}],
        replay={"sources": [{"path": folder / "short.jsonl"}], "share": 0.25},
    )
    assert samples_of_epochs(open_sources(settings), 1.0) == [23, 8]  # a quarter of 23 + 8 samples


@pytest.mark.parametrize(
    "case", ["plain", "two workers", "a ramp of rows", "a ramp of lengths", "truncated", "unpacked", "a blend"]
)
def test_steps_are_those_that_come(load, folder, case):
    """The number that is expected is the step in which the last sample is used."""
    plan = {
        "a ramp of rows": RowPlan(epochs=3.0, rows=6, batch_ramp={2: 2, 4: 4}),
        "a ramp of lengths": RowPlan(epochs=3.0, rows=4, length_ramp={3: 48}),
        "truncated": RowPlan(epochs=3.0, rows=4, length_ramp={3: 24}),
    }.get(case, RowPlan(epochs=3.0, rows=4))
    names = ["long", {"path": folder / "short.jsonl", "weight": 2.0}] if case == "a blend" else ["long"]
    settings = {"packing": "none"} if case == "unpacked" else {"packing_buffer": 9}
    settings |= {"too_long": "truncate"} if case == "truncated" else {}
    loader = load(plan, names, workers=2 if case == "two workers" else 0, **settings)
    expected, is_exact = loader.expected_steps()
    made = [(plan.place(number)[0], row.num_samples) for number, row in enumerate(islice(loader, 90))]
    assert is_exact == (case != "truncated")
    if is_exact:
        assert expected == max(step for step, samples in made if samples)


def test_steps_of_many_samples_are_estimated(load, monkeypatch):
    from megavlm.data import expected_steps

    exact, _ = load(RowPlan(epochs=40.0, rows=2), packing_buffer=9).expected_steps()
    ramped, _ = load(RowPlan(epochs=40.0, rows=2, length_ramp={30: 56}), packing_buffer=9).expected_steps()
    monkeypatch.setattr(expected_steps, "_COUNTED", 100)
    for plan, steps in (({}, exact), ({"length_ramp": {30: 56}}, ramped)):
        about, is_exact = load(RowPlan(epochs=40.0, rows=2, **plan), packing_buffer=9).expected_steps()
        assert not is_exact
        assert about == pytest.approx(steps, rel=0.05)  # the first 100 of 920 samples stand for all


def test_a_plan_without_anything_changes_no_bit(load):
    plain, planned = rows(load(None), 12), rows(load(RowPlan(rows=4)), 12)
    assert plain == planned
    assert all(torch.tensor(weights).unique().tolist() in ([0.0, 1.0], [1.0]) for _, _, weights in plain)

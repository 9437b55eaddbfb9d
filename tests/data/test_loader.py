"""The training loader: order, ranks and workers, blending, continuing, errors."""

import json
import random
from collections import Counter
from itertools import islice

import psutil
import pytest
import torch

from megavlm.config.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.jsonl import read_samples
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer


@pytest.fixture(scope="module")
def data(tmp_path_factory, media):
    """Two files beside the pictures: 41 conversations, every third with a picture, and 10 documents."""
    draw = random.Random(0)
    talks, documents = [], []
    for number in range(41):
        question = f"{'What? ' * draw.randrange(1, 30)}"
        record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": str(number)}]}
        if number % 3 == 0:
            record["messages"][0]["content"] += "<image>"
            record["images"] = [draw.choice(["tiny.webp", "wide.png", "turned.jpg"])]
        talks.append(json.dumps(record))
    for number in range(10):
        documents.append(json.dumps({"text": f"{number}: " + "word " * draw.randrange(1, 30)}))
    (media.base / "talks.jsonl").write_text("\n".join(talks))
    (media.base / "documents.jsonl").write_text("\n".join(documents))
    return media.base


@pytest.fixture
def load(data, model_folder):
    """Builds a loader over some of the files; closed at the end."""
    loaders = []

    def load(train="talks.jsonl", *, dp_rank=0, dp_size=1, seed=0, **settings):
        named = [train] if isinstance(train, str) else train
        sources = [{"path": data / item} if isinstance(item, str) else item for item in named]
        settings = DataSettings(**{"seq_length": 512, "workers": 0} | settings, train=sources)
        renderer = Renderer(model_folder, settings)
        loaders.append(build_loader(settings, renderer, "tune", dp_rank=dp_rank, dp_size=dp_size, seed=seed))
        return loaders[-1]

    yield load
    for loader in loaders:
        loader.close()


def contents(rows):
    """What a row holds, to compare bit for bit."""
    return [
        (row.sources, row.num_tokens, *(tensor.tolist() for tensor in vars(row).values() if torch.is_tensor(tensor)))
        for row in rows
    ]


def lines(rows):
    return [source.rpartition(":")[2] for row in rows for source in row.sources]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_without_shuffling_rows_come_in_file_order(load, workers, dp_size):
    ranks = [
        load(shuffle=False, packing="none", workers=workers, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
    ]
    seen = [lines([next(loader)]) for _ in range(60 // dp_size) for loader in ranks]
    assert seen == [[str(place % 41 + 1)] for place in range(60)]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_each_sample_once_in_a_new_order(load, workers):
    ranks = [load(packing="none", workers=workers, dp_rank=rank, dp_size=2) for rank in range(2)]
    seen = [line for _ in range(41) for loader in ranks for line in lines([next(loader)])]
    epochs = [seen[:41], seen[41:]]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(line) for line in range(1, 42)]
    assert len({tuple(epoch) for epoch in (*epochs, sorted(seen[:41], key=int))}) == 3
    other = load(packing="none", seed=1)
    assert lines(islice(other, 41)) != epochs[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_continues_with_the_row_that_would_have_come(load, workers, packing):
    settings = {"workers": workers, "packing": packing, "dp_rank": 1, "dp_size": 2}
    settings |= {"packing_buffer": 70} if packing == "best_fit" else {}
    sources = ("talks.jsonl", "documents.jsonl")
    rows = contents(islice(load(sources, **settings), 20))

    def continued(state):
        loader = load(sources, **settings)
        loader.load_state_dict(state)
        return loader

    interrupted = load(sources, **settings)
    unused = interrupted.state_dict()
    assert contents(islice(interrupted, 7)) == rows[:7]
    second = continued(interrupted.state_dict())
    at_once = second.state_dict()
    assert contents(islice(second, 6)) == rows[7:13]
    assert contents(islice(continued(second.state_dict()), 7)) == rows[13:]
    assert contents(islice(continued(at_once), 2)) == rows[7:9]
    assert contents(islice(continued(unused), 2)) == rows[:2]


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 4)), ((1, 4), (2, 2)), ((2, 2), (4, 1))])
def test_continues_on_another_number_of_ranks(load, before, after):
    """(ranks, workers of each), as many workers in all: the same rows in each step, in the same order."""
    sources, batch = ("talks.jsonl", "documents.jsonl"), max(before[0], after[0])

    def ranks_of(layout):
        ranks, workers = layout
        return [load(sources, dp_rank=rank, dp_size=ranks, workers=workers, packing_buffer=30) for rank in range(ranks)]

    def step(loaders):
        return [contents([next(loader)])[0] for _ in range(batch // len(loaders)) for loader in loaders]

    straight = ranks_of(before)
    steps = [step(straight) for _ in range(6)]
    first = ranks_of(before)
    for done in (1, 3):  # two rows a step stop in the middle of a round, some workers not even asked
        while first[0]._taken * len(first) < done * batch:
            step(first)
        states = {}
        for rank, loader in enumerate(first):
            states |= {rank + len(first) * worker: state for worker, state in enumerate(loader.state_dict())}
        second = ranks_of(after)
        for rank, loader in enumerate(second):
            loader.load_state_dict([states[rank + len(second) * worker] for worker in range(4 // len(second))])
        assert [step(second) for _ in range(3)] == steps[done : done + 3]


def test_state_fits_only_the_same_run(load):
    state = load().state_dict()
    for settings, named in (
        ({"dp_size": 2}, "data workers in all"),
        ({"seq_length": 256}, r"data\.seq_length 512, now it is 256"),
        ({"seed": 5}, "train.seed"),
        ({"train": "documents.jsonl"}, "data.train"),
        ({"workers": 1}, "data workers in all"),
    ):
        with pytest.raises(UserError, match=named):
            load(**settings).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_packed_rows_hold_whole_samples(load, data, renderer, workers):
    samples = {sample.index: sample for sample in read_samples(data / "talks.jsonl", renderer, "tune")}
    rows = list(islice(load(packing_buffer=20, workers=workers), 10))
    expected = [renderer.pack([samples[index] for index in row.indices], 512) for row in rows]
    assert contents(rows) == contents(expected)
    assert sum(row.num_samples for row in rows) > 30
    assert sum(row.num_tokens for row in rows) > 0.95 * 10 * 512


def test_sources_are_blended_by_weight(load, data):
    sources = [{"path": data / "talks.jsonl", "weight": 1.0}, {"path": data / "documents.jsonl", "weight": 3.0}]
    rows = islice(load(sources, packing="none"), 400)
    counts = Counter(row.sources[0].rpartition(":")[0].rpartition("/")[2] for row in rows)
    assert 250 < counts["documents.jsonl"] < 350


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_in_their_turn(load, data, workers):
    good, bad = json.dumps({"text": "good"}), json.dumps({"text": "<image>", "images": ["missing.png"]})
    (data / "bad.jsonl").write_text("\n".join([good] * 5 + [bad] + [good] * 5))
    loader = load("bad.jsonl", shuffle=False, packing="none", workers=workers)
    assert lines(islice(loader, 5)) == ["1", "2", "3", "4", "5"]
    with pytest.raises(UserError, match=r"bad\.jsonl:6: picture .*missing\.png does not exist\n  → paths are"):
        next(loader)


def test_source_errors(load, data):
    (data / "empty.jsonl").write_text("")
    for train, message in (("none.jsonl", "does not exist"), ("empty.jsonl", "is empty"), ([], "names no data")):
        with pytest.raises(UserError, match=message):
            load(train)


def test_close_ends_the_workers(load):
    loader = load(workers=2)
    next(loader)
    workers = psutil.Process().children()
    assert len(workers) >= 2
    loader.close()
    assert not psutil.wait_procs(workers, timeout=10)[1]

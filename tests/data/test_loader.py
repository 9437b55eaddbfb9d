"""The training loader: order, ranks and workers, blending, continuing, errors."""

import json
import pickle
import random
from collections import Counter
from itertools import islice

import psutil
import pytest
import torch
from toy import read_samples

from megavlm.base.errors import UserError
from megavlm.config.settings import DataSettings
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.records.skipped_samples import TOO_LONG, UnfitSample


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

    load.folder = data
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
def test_the_generator_of_dropout_is_left_alone(load, workers):
    """Leaders alone have a loader, and a run that continues starts it once more."""
    before = torch.get_rng_state()
    next(iter(load(workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def states_of(ranks):
    """The states of all workers of all ranks, in the order of their numbers."""
    states = [loader.state_dict() for loader in ranks]
    return [state for worker in zip(*states, strict=True) for state in worker]


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_continues_with_the_row_that_would_have_come(load, workers, packing):
    """A blend, on the second of two ranks; the packing buffer is still growing at 7 rows and full at 13."""
    settings = {"workers": workers, "packing": packing}
    settings |= {"packing_buffer": 70} if packing == "best_fit" else {}
    sources = ("talks.jsonl", "documents.jsonl")

    def start(states=None):
        ranks = [load(sources, dp_rank=rank, dp_size=2, **settings) for rank in range(2)]
        for loader in ranks if states else ():
            assert loader.load_state_dict(states) is None
        return ranks

    def rows_of(ranks, count):
        return [contents([next(loader)])[0] for _ in range(count) for loader in ranks]

    rows = rows_of(start(), 20)
    interrupted = start()
    unused = states_of(interrupted)
    assert rows_of(interrupted, 7) == rows[:14]
    second = start(states_of(interrupted))
    at_once = states_of(second)
    assert rows_of(second, 6) == rows[14:26]
    assert rows_of(start(states_of(second)), 7) == rows[26:]
    assert rows_of(start(at_once), 2) == rows[14:18]
    assert rows_of(start(unused), 2) == rows[:4]


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 4)), ((1, 4), (2, 2)), ((2, 2), (4, 0))])
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
        states = states_of(first)
        second = ranks_of(after)
        for loader in second:
            assert loader.load_state_dict(states) is None
        assert [step(second) for _ in range(3)] == steps[done : done + 3]


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 2)), ((4, 1), (2, 1)), ((2, 0), (1, 3))])
def test_continues_with_other_workers_and_loses_nothing(load, before, after):
    """Half the data ranks, and other changes: of three epochs every sample comes three times, waiting ones included."""
    sources = [{"path": "talks.jsonl", "epochs": 1.0}, {"path": "documents.jsonl", "epochs": 1.0}]

    def ranks_of(layout, states=None):
        ranks, workers = layout
        named = [{**source, "path": load.folder / source["path"]} for source in sources]
        loaders = [load(named, dp_rank=rank, dp_size=ranks, workers=workers, packing_buffer=9) for rank in range(ranks)]
        told = [loader.load_state_dict(states) for loader in loaders] if states else []
        return loaders, told

    seen, states = Counter(), None
    layouts = [before, after, before]  # dealt anew twice: the second time over what the first had passed over
    for layout in layouts:
        loaders, told = ranks_of(layout, states)
        assert all("no sample is repeated or left out" in text for text in told)
        for _ in range(2):
            for loader in loaders:
                seen.update(source.rpartition("/")[2] for source in next(loader).sources)
        states = states_of(loaders)
    while sum(seen.values()) < 3 * 51:
        for loader in loaders:
            seen.update(source.rpartition("/")[2] for source in next(loader).sources)
    waiting = Counter()
    for state in states_of(loaders):
        for source, index in state["place"]["waiting"]:
            waiting[f"{('talks', 'documents')[source]}.jsonl:{index + 1}"] += 1
    assert len(seen) == 51
    drawn = seen + waiting  # drawn so far by each worker: epochs differ by one where some are ahead
    assert max(drawn.values()) - min(drawn.values()) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_blend_holds_from_here_on_and_repeats_nothing(load, data, workers):
    """From 1 : 1 to 3 : 1 after 16 samples; counted over the whole run, the next 16 would be of the first source."""

    def start(weight):
        sources = [{"path": data / "talks.jsonl", "weight": weight}, {"path": data / "documents.jsonl"}]
        return load(sources, workers=workers, packing="none")

    first, second = start(1.0), start(3.0)
    rows = list(islice(first, 16))
    assert "the shares of the data sources changed" in second.load_state_dict(first.state_dict())
    later = list(islice(second, 40))
    assert Counter(source.rpartition("/")[2].partition(":")[0] for row in rows for source in row.sources) == {
        "talks.jsonl": 8, "documents.jsonl": 8
    }  # fmt: skip
    for count in (16, 40):
        talks = sum("talks" in source for row in later[:count] for source in row.sources)
        assert abs(talks - 0.75 * count) <= max(workers, 1)
    seen = [source for row in (*rows, *later) for source in row.sources if "talks" in source]
    assert len(set(seen)) == len(seen)  # 38 of the first pass over 41


@pytest.mark.parametrize("workers", [0, 2])
def test_a_further_source_is_blended_in_and_repeats_nothing(load, data, workers):
    """It comes between a source and replay: 1 : 1 before, then 1 : 1 : 2. What waits to be packed is kept."""
    (data / "more.jsonl").write_text((data / "talks.jsonl").read_text())
    old = {"sources": [{"path": data / "talks.jsonl"}], "share": 0.5}
    first = load([{"path": data / "documents.jsonl"}], replay=old, workers=workers, packing="none")
    more = [{"path": data / "documents.jsonl"}, {"path": data / "more.jsonl"}]
    second = load(more, replay=old, workers=workers, packing="none")
    rows = list(islice(first, 16))
    assert "data sources were added" in second.load_state_dict(first.state_dict())
    later = list(islice(second, 40))
    name = lambda source: source.rpartition("/")[2].partition(":")[0]
    counts = Counter(name(source) for row in later for source in row.sources)
    expected = {"documents.jsonl": 10, "more.jsonl": 10, "talks.jsonl": 20}
    assert all(abs(counts[file] - count) <= max(workers, 1) for file, count in expected.items()), counts
    seen = [source for row in (*rows, *later) for source in row.sources if "talks" in source]
    assert len(seen) == len(set(seen)) > 20  # of the first pass over 41, which goes on
    again = load(more, replay=old, workers=workers, packing="none")  # from here on, on the same bits
    assert again.load_state_dict(second.state_dict()) is None
    assert [row.sources for row in islice(again, 6)] == [row.sources for row in islice(second, 6)]
    with pytest.raises(UserError, match=r"data\.train"):  # what is left out does not continue
        load([{"path": data / "documents.jsonl"}], replay=old, workers=workers, packing="none").load_state_dict(
            second.state_dict()
        )


def test_a_source_ends_with_its_tokens_and_the_others_go_on(load, data):
    """On two ranks: max_tokens to within a sample of each worker, the same bits when it continues before and after."""
    limit, longest = 600, 512
    blend = [{"path": data / "talks.jsonl", "max_tokens": limit}, {"path": data / "documents.jsonl"}]

    def start(states=None, blend=blend):
        ranks = [load(blend, packing_buffer=4, dp_rank=rank, dp_size=2) for rank in range(2)]
        return ranks, [loader.load_state_dict(states) for loader in ranks if states]

    whole, _ = start()
    rows = [list(islice(loader, 12)) for loader in whole]
    given = [
        length
        for row in (row for of_rank in rows for row in of_rank)
        for source, length in zip(row.source_ids, row.sample_lengths, strict=True)
        if source == 0
    ]
    assert limit <= sum(given) <= limit + 2 * max(given), given
    assert max(given) < longest
    assert [loader.given for loader in whole] == [["talks"], ["talks"]]
    assert all(set(row.source_ids) == {1} for of_rank in rows for row in of_rank[-4:])
    for cut in (1, 8):
        ranks, _ = start()
        assert not ranks[0].given
        first = [list(islice(loader, cut)) for loader in ranks]
        assert [loader.given for loader in ranks] == [["talks"] * (cut == 8)] * 2
        later, told = start(states_of(ranks))
        assert told == [None, None]
        for before, loader, expected in zip(first, later, rows, strict=True):
            assert contents([*before, *islice(loader, 12 - cut)]) == contents(expected)
    raised = [blend[0] | {"max_tokens": 2 * limit}, blend[1]]
    more, told = start(states_of(whole), raised)
    assert "or their limits" in told[0]
    assert not more[0].given
    assert 0 in next(more[0]).source_ids


def test_state_fits_only_the_same_run(load):
    state = load().state_dict()
    for settings, named in (
        ({"seq_length": 256}, r"data\.seq_length 512, but it is now 256"),
        ({"seed": 5}, "train.seed"),
        ({"train": "documents.jsonl"}, "data.train"),
        ({"packing": "none"}, "data.packing"),
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


def shares_of(loader, count):
    rows = islice(loader, count)
    return Counter(row.sources[0].rpartition(":")[0].rpartition("/")[2].removesuffix(".jsonl") for row in rows)


def test_blends_have_their_shares_at_any_moment(load, data):
    talks, documents = data / "talks.jsonl", data / "documents.jsonl"
    (data / "old.jsonl").write_text(json.dumps({"text": "what was known before"}) + "\n")
    old = data / "old.jsonl"
    by_weight = [{"path": talks, "weight": 1.0}, {"path": documents, "weight": 3.0}]
    loader = load(by_weight, packing="none")
    for _ in range(20):
        assert abs(shares_of(loader, 20)["documents"] - 15) <= 1
    nested = [{"sources": by_weight, "weight": 4.0}, {"path": old, "weight": 1.0}]
    assert shares_of(load(nested, packing="none"), 100) == {"talks": 20, "documents": 60, "old": 20}
    replayed = {"train": by_weight, "replay": {"sources": [{"path": old}], "share": 0.5}}
    assert shares_of(load(**replayed, packing="none"), 80) == {"talks": 10, "documents": 30, "old": 40}
    by_epochs = [{"path": talks, "epochs": 1.0}, {"path": documents, "epochs": 3.0}]
    rows = list(islice(load(by_epochs, packing="none"), 41 + 30))
    times = Counter(Counter(row.sources[0].rpartition("/")[2] for row in rows).values())
    assert times == {1: 41, 3: 10}


def test_small_sources_do_not_come_in_all_workers_at_once(load, data):
    sources = [{"path": data / "talks.jsonl", "weight": 15.0}, {"path": data / "documents.jsonl", "weight": 1.0}]
    ranks = [load(sources, packing="none", dp_rank=rank, dp_size=16) for rank in range(16)]
    turns = Counter()
    for turn in range(16):
        turns[turn] = sum("documents" in next(loader).sources[0] for loader in ranks)
    assert sum(turns.values()) == 16
    assert max(turns.values()) <= 5


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_cannot_be_used_are_told_with_the_next_row(load, data, workers):
    good, bad = json.dumps({"text": "good"}), json.dumps({"text": "<image>", "images": ["missing.png"]})
    long = json.dumps({"text": "long " * 600})
    (data / "broken.png").write_bytes((data / "large.jpg").read_bytes()[:20000])  # its header is whole
    cut = json.dumps({"text": "<image>", "images": ["broken.png"]})
    (data / "bad.jsonl").write_text("\n".join([good] * 5 + [bad, long, cut, "{"] + [good] * 6))
    rows = list(islice(load("bad.jsonl", shuffle=False, packing="none", workers=workers), 12))
    assert lines(rows) == ["1", "2", "3", "4", "5", "10", "11", "12", "13", "14", "15", "1"]
    told = [(f.sample.rpartition(":")[2], f.kind, f.cause) for row in rows for f in row.skipped_samples]
    assert sorted((number, kind) for number, kind, _ in told) == [
        ("6", "broken"), ("7", "too long"), ("8", "broken"), ("9", "broken"),
    ]  # fmt: skip
    causes = {number: cause for number, _, cause in told}
    assert causes["6"].startswith("picture ")
    assert causes["6"].endswith("missing.png does not exist")
    assert "the sample has" in causes["7"]
    assert "broken.png cannot be read" in causes["8"]
    assert causes["9"].startswith("not valid JSON")
    assert not rows[0].skipped_samples


def test_a_source_without_a_good_sample_ends_the_run(load, data):
    bad = json.dumps({"text": "<image>", "images": ["missing.png"]})
    (data / "all-bad.jsonl").write_text("\n".join([bad] * 7))
    loader = load(("talks.jsonl", "all-bad.jsonl"), workers=1)
    with pytest.raises(
        UserError, match=r"all-bad .*: 7 consecutive samples cannot be used.*missing\.png does not exist"
    ):
        list(islice(loader, 40))


def test_one_bad_sample_of_two_does_not_end_the_run(load, data):
    """Each worker of two sees the same one of them over and over."""
    bad = json.dumps({"text": "<image>", "images": ["missing.png"]})
    (data / "half-bad.jsonl").write_text("\n".join([bad, json.dumps({"text": "good"})]))
    loader = load(("talks.jsonl", "half-bad.jsonl"), workers=2, shuffle=False)
    rows = list(islice(loader, 30))
    assert {skipped.sample.rpartition("/")[2] for row in rows for skipped in row.skipped_samples} == {
        "half-bad.jsonl:1"
    }
    assert sum("half-bad.jsonl:2" in source for row in rows for source in row.sources) > 1


def test_picture_budget_of_a_row(load, data):
    rows = list(islice(load("talks.jsonl", max_patches_per_row=200), 12))
    assert max(sum(row.frame_lengths) for row in rows) <= 200
    assert sum(row.num_images for row in rows) > 5
    assert {f.kind for row in rows for f in row.skipped_samples} <= {"too long"}
    assert max(sum(row.frame_lengths) for row in islice(load("talks.jsonl"), 12)) > 200


def test_source_errors(load, data):
    (data / "empty.jsonl").write_text("")
    for train, message in (("none.jsonl", "does not exist"), ("empty.jsonl", "is empty"), ([], "data.train is empty")):
        with pytest.raises(UserError, match=message):
            load(train)


def test_close_ends_the_workers(load):
    others = psutil.Process().children()  # of other tests, such as multiprocessing's servers
    loader = load(workers=2)
    next(loader)
    workers = [process for process in psutil.Process().children() if process not in others]
    assert len(workers) >= 2
    loader.close()
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_errors_go_to_other_processes():
    error = pickle.loads(pickle.dumps(UnfitSample(TOO_LONG, "here:1: long", "shorten it")))
    assert (error.kind, error.message, error.remedy) == (TOO_LONG, "here:1: long", "shorten it")

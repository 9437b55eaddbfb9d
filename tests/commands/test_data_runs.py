"""Training on data as it comes: from shards, from several sources, with samples that cannot be read."""

import json
import shlex
import shutil
import tarfile

import pytest
from parity import Toys
from test_train_verbs import megavlm, metrics_of, sft_config
from toy import write_records

COUNT = 80


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def numbered(toys, count=COUNT):
    """The toy records over and over, each with a number in its answer."""
    records = []
    for number in range(count):
        record = json.loads(json.dumps(toys.records[number % len(toys.records)]))
        record["messages"][-1]["content"] += f" {number}"
        records.append(record)
    return records


def without_times(line):
    times = ("seconds", "tokens_per", "tflops", "mfu", "memory", "imbalance", "slowest")
    return {name: value for name, value in line.items() if not any(time in name for time in times)}


def test_shards_give_the_same_rows_and_the_same_loss_as_jsonl(toys, tmp_path):
    """Bit for bit, over an epoch and more, packed and shuffled in two workers."""
    data = write_records(toys.root / "numbered.jsonl", numbered(toys, 24))
    megavlm("data", "prepare", "--jsonl", data, "--out", tmp_path / "shards", "--shard-size", "60KB")
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 2
    shared = ("data.packing=best_fit", "data.packing_buffer=7", "data.shuffle=true", "data.workers=2")
    lines = {}
    for name, path in (("jsonl", data), ("shards", tmp_path / "shards")):
        config = sft_config(toys, tmp_path, steps=4, lr=0.01)
        source = f"data.train=[{{path: {path}, name: toys}}]"
        output = tmp_path / f"run-{name}"
        megavlm("sft", config, *shared, source, f"output={output}", "train.global_batch_size=4")
        lines[name] = [without_times(line) for line in metrics_of(output)]
    assert lines["jsonl"] == lines["shards"]
    assert sum(line["samples"] for line in lines["jsonl"]) > 24


def test_one_sample_is_enough_for_two_ranks(toys, tmp_path):
    """Both train on it, and one of them has nothing to score: the numbers of one process."""
    data = write_records(toys.root / "single.jsonl", toys.records[:1])
    config = sft_config(toys, tmp_path, steps=2, global_batch_size=2)
    found = {}
    for name, ranks in (("one", ()), ("two", ("--nproc", 2))):
        run = f"output={tmp_path / name}"
        megavlm("sft", config, f"data.train={data}", run, *ranks)
        megavlm("score", config, f"data.eval={data}", run, *ranks)
        (scored,) = (tmp_path / name / "scores.jsonl").read_text().splitlines()
        trained = metrics_of(tmp_path / name)
        assert [line["samples"] for line in trained] == [2, 2]
        found[name] = [*(line["loss"] for line in trained), json.loads(scored)["sum"]]
    assert found["two"] == pytest.approx(found["one"], rel=1e-5)


def test_the_end_of_a_source_is_told(toys, tmp_path):
    data = write_records(toys.root / "numbered.jsonl", numbered(toys, 24))
    config = sft_config(toys, tmp_path, steps=4, global_batch_size=4)
    sources = f"data.train=[{{path: {data}, name: short, max_tokens: 60}}, {{path: {data}, name: long}}]"
    printed = megavlm("sft", config, sources, "data.workers=0").stdout
    lines = metrics_of(tmp_path / "run")
    given = [line["samples/short"] for line in lines]
    assert given[0] > 0
    assert given[-1] == 0
    assert printed.count("short has given its max_tokens (step 1); the blend goes on without it") == 1


def break_samples(toys, records, tmp_path):
    """Breaks every tenth record in its own way; returns the file and {line: (kind, part of the cause)}."""
    whole = (toys.root / records[0]["images"][0]).read_bytes()
    (toys.root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (toys.root / "text.png").write_text("not a picture")
    lines = [json.dumps(record) for record in records]
    blank = {"role": "user", "content": "<image>?"}
    answer = {"role": "assistant", "content": "!"}
    ways = [
        ('{"messages": [', "broken", "not valid JSON"),
        ({"messages": [blank, answer], "images": ["missing.png"]}, "broken", "missing.png does not exist"),
        ({"messages": [blank, answer], "images": ["cut.png"]}, "broken", "cut.png cannot be read"),
        ({"messages": [blank, answer], "images": ["text.png"]}, "broken", "text.png cannot be read"),
        (
            {"messages": [blank, answer], "images": []},
            "broken",
            "the text contains 1 <image>, but images has 0 entries",
        ),
        ({"messages": [{"role": "human", "content": "?"}]}, "broken", "role 'human'; allowed roles"),
        ({"messages": [{"role": "user", "content": "?"}]}, "no target", "contributes to the loss"),
        ({"messages": [{"role": "user", "content": "why? " * 200}, answer]}, "too long", "data.seq_length = 128"),
    ]
    expected = {}
    for place, (record, kind, cause) in enumerate(ways):
        lines[10 * place + 5] = record if isinstance(record, str) else json.dumps(record)
        expected[10 * place + 6] = (kind, cause)
    path = toys.root / "broken-lines.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path, expected


def test_broken_samples_are_named_and_reach_no_row(toys, tmp_path):
    """10 % of the samples, in eight ways, on two data ranks; the run is interrupted and continues in between."""
    path, expected = break_samples(toys, numbered(toys), tmp_path)
    good = toys.root / "good.jsonl"
    write_records(good, toys.records[:2])
    config = sft_config(toys, tmp_path, steps=11, lr=0.01)
    sources = f"data.train=[{{path: {path}, weight: 9}}, {{path: {good}, weight: 1}}]"
    changes = (sources, "data.workers=2", "checkpoint.every=5", "--nproc", 2)
    done = megavlm("sft", config, *changes)
    run = tmp_path / "run"
    passes = metrics_of(run)[-1]["epoch/broken-lines"]
    assert passes == pytest.approx(0.9 * 88 / 72, abs=2 / 72 + 0.02)  # 72 of the 80 samples can be trained on
    assert f"broken-lines: {passes:.3g} passes over 80 samples" in done.stdout
    assert "broken-lines: of 80 samples, 6 are broken (7.5 %), 1 is too long for a row (1.2 %), 1 is" in done.stdout
    shutil.copytree(run, tmp_path / "straight")
    shutil.rmtree(run / "checkpoints" / "step_00000011")  # as if killed behind step 9
    megavlm("sft", config, *changes)

    told = [json.loads(line) for line in (run / "data_errors.jsonl").read_text().splitlines()]
    found = {int(line["sample"].rpartition(":")[2]): line for line in told}
    assert len(told) == len(found) == 8
    assert {line["source"] for line in told} == {"broken-lines"}
    for number, (kind, cause) in expected.items():
        assert found[number]["kind"] == kind
        assert cause in found[number]["cause"]
        assert str(path) in found[number]["sample"]
    assert (tmp_path / "straight" / "data_errors.jsonl").read_text() == (run / "data_errors.jsonl").read_text()

    lines = metrics_of(run)
    assert [without_times(line) for line in lines] == [
        without_times(line) for line in metrics_of(tmp_path / "straight")
    ]
    assert (lines[-1]["bad_samples"], lines[-1]["dropped_samples"]) == (6, 2)
    for line in lines:
        counts = [line[f"samples/{name}"] for name in ("broken-lines", "good")]
        assert sum(counts) == line["samples"] == 8
        targets = [line[f"target_tokens/{name}"] for name in ("broken-lines", "good")]
        assert sum(targets) == line["target_tokens"]
        losses = [line[f"loss/{name}"] or 0.0 for name in ("broken-lines", "good")]
        mean = sum(loss * n for loss, n in zip(losses, targets, strict=True)) / sum(targets)
        assert mean == pytest.approx(line["loss"], rel=1e-5)
    assert sum(line["samples/good"] for line in lines) == pytest.approx(0.1 * 88, abs=2)


def test_too_many_broken_samples_end_the_run(toys, tmp_path):
    path, _ = break_samples(toys, numbered(toys), tmp_path)
    config = sft_config(toys, tmp_path, steps=40, lr=0.01, global_batch_size=16)
    done = megavlm("sft", config, f"data.train={path}", "data.max_bad_fraction=0.05", status=2)
    assert f"{path} (80 samples, 8 passes)" in done.stdout
    assert "broken-lines: " in done.stderr
    assert "data.max_bad_fraction = 0.05" in done.stderr
    assert "Traceback" not in done.stderr
    # 78 of the 80 samples can be packed or are broken when packed; all have been read in the fifth step of 16 rows
    assert len(metrics_of(tmp_path / "run")) == 5


def test_a_source_without_a_usable_sample_names_a_command_that_can_be_typed(toys, tmp_path):
    """It has the configuration and the overrides of the run, and shows all that is wrong."""
    path = toys.root / "all bad.jsonl"
    path.write_text("{\n" * 7)
    config = sft_config(toys, tmp_path)
    override = f"data.train={path}"
    told = megavlm("sft", config, override, "data.max_bad_fraction=1", status=2).stderr
    assert "consecutive samples cannot be used" in told
    typed = shlex.split(told.partition("Look at all of them with: ")[2].strip())
    assert typed == ["megavlm", "data", "inspect", str(config), override, "data.max_bad_fraction=1"]
    megavlm(*typed[1:], "--out", tmp_path / "inspected", status=2)
    page = (tmp_path / "inspected" / "index.html").read_text()
    assert all(f"all bad.jsonl:{line}" in page for line in range(1, 8))


@pytest.mark.parametrize("verb", ["score", "infer", "sft"])
def test_if_no_held_out_sample_can_be_used_the_first_says_what_to_do(verb, toys, tmp_path):
    """How to write a mark that is only a word; `sft` reads the file while it trains."""
    record = {"messages": [{"role": "user", "content": "Tags?"}, {"role": "assistant", "content": "<video>"}]}
    question = {"messages": [{"role": "user", "content": "What is <video>?"}]}
    data = write_records(toys.root / "literal.jsonl", [question if verb == "infer" else record] * 2)
    changes = (f"data.eval={data}", *(["eval.every=1"] if verb == "sft" else []))
    told = megavlm(verb, sft_config(toys, tmp_path), *changes, status=2).stderr
    assert f"{data}:1: the text contains 1 <video>, but videos has 0 entries" in told
    assert '{"type": "text", "text": "<video>"}' in told
    assert "; or give " in told


def test_a_corrupt_shard_costs_its_samples(toys, tmp_path):
    """The last sample's bytes are gone, a member of another is overwritten."""
    data = write_records(toys.root / "numbered.jsonl", numbered(toys, 24))
    shards = tmp_path / "shards"
    megavlm("data", "prepare", "--jsonl", data, "--out", shards, "--shard-size", "60KB")
    first, *_, last = sorted(shards.glob("*.tar"))
    last.write_bytes(last.read_bytes()[:3000])
    with tarfile.open(first) as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
    with first.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(b"\0" * member.size)
    megavlm("sft", sft_config(toys, tmp_path, steps=3, lr=0.01), f"data.train={shards}", "data.max_bad_fraction=1")
    told = [json.loads(line) for line in (tmp_path / "run" / "data_errors.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in told} == {"broken"}
    assert any(f"{last}:" in line["sample"] for line in told)
    assert any(f"{first}:" in line["sample"] and "cannot be read" in line["cause"] for line in told)
    assert metrics_of(tmp_path / "run")[-1]["bad_samples"] == len(told)

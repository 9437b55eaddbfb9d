"""Runs that go wrong, as a user sees them: broken data and weights, a disk that does not answer."""

import copy
import json
import os

import pytest
import torch
from parity import Toys
from safetensors.torch import load_file, save_file
from test_train_verbs import megavlm, metrics_of, sft_config
from toy import write_records

from megavlm.convert import hf_to_mcore


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def test_bad_samples_end_the_run_by_name_or_are_skipped(toys, tmp_path):
    records = copy.deepcopy(toys.records)
    records[4]["messages"][-1]["weight"] = 1e38  # a float32, but the sum over its tokens is none
    data = write_records(toys.root / "bad.jsonl", records)
    config = sft_config(toys, tmp_path, global_batch_size=2, optimizer="adam", steps=4)
    wanted = ("sft", config, "--nproc", 2, f"data.train=[{{path: {data}}}]", "checkpoint.every=1")
    run = tmp_path / "run"

    done = megavlm(*wanted, "train.max_skipped_steps=0", status=1)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert "step 3: the loss" in done.stderr
    assert "samples of rows whose own loss is NaN or infinite: " in done.stderr
    assert done.stderr.index("bad.jsonl:5") < done.stderr.index("bad.jsonl:6")
    assert "bad.jsonl:1" not in done.stderr
    lines = metrics_of(run)  # strict JSON
    assert [line["skipped"] for line in lines] == [0, 0, 1]
    assert lines[-1]["loss"] is None
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]

    # The same run goes on from step 2 where a skip is allowed; the step that asks for a checkpoint still gets one.
    done = megavlm(*wanted, "train.max_skipped_steps=1")
    assert "step 3 was skipped, the weights are unchanged" in done.stdout
    assert [line["skipped"] for line in metrics_of(run)] == [0, 0, 1, 0]
    assert len(list((run / "checkpoints").iterdir())) == 3
    last = metrics_of(run)[-1]
    assert last["seconds_tower_max"] >= last["seconds_tower"] > 0
    assert last["tower_imbalance"] >= 1
    assert last["seconds_data"] > 0
    assert last["slowest_rank"] in (0, 1)


def test_weights_that_are_not_finite_make_no_checkpoint(toys, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in toys.folder("dense").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "language_model.layers.1.mlp" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    hf_to_mcore(folder, tmp_path / "mcore", progress=False)
    done = megavlm("sft", sft_config(toys, tmp_path), f"model.load={tmp_path / 'mcore'}", status=1)
    assert "step 1 was skipped" in done.stdout
    assert "weights of language are NaN or infinite; no checkpoint was written" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_disk_that_does_not_answer_ends_the_run_with_the_stacks_of_all_ranks(toys, tmp_path):
    pipe = toys.root / "never.png"
    os.mkfifo(pipe)  # opening it waits for a writer that never comes
    stuck = {**toys.records[0], "images": [pipe.name]}
    data = write_records(toys.root / "stuck.jsonl", [*toys.records[:5], stuck])
    config = sft_config(toys, tmp_path, global_batch_size=2, steps=9)
    done = megavlm(
        "sft",
        config,
        "--nproc",
        2,
        f"data.train=[{{path: {data}}}]",
        "data.workers=0",
        "train.hang_minutes=0.3",
        status=1,
    )
    told = {rank: (tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1)}
    for rank, text in told.items():
        assert f"rank {rank} of 2 on " in text
        assert "no progress for 0.3 minutes (train.hang_minutes) since step 2" in text
    assert "pictures.py" in told[1]  # the rank that reads the sixth sample
    assert "pictures.py" not in told[0]
    assert "step.py" in told[0]  # it waits for the other one
    assert "rank 0 of 2" in done.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2

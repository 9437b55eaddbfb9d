"""`megavlm plan --data`: rows as `megavlm data inspect` has found them, in place of full ones."""

import json

import pytest
from parity import Toys
from test_train_verbs import megavlm, sft_config


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def test_rows_as_in_the_data(toys, tmp_path):
    config = sft_config(toys, tmp_path, steps=2)
    packed = ["data.seq_length=256", "data.packing=best_fit", "data.max_pixels=9216"]
    megavlm("data", "inspect", config, "--out", tmp_path / "look", *packed)
    summary = tmp_path / "look" / "summary.json"
    rows = json.loads(summary.read_text())["rows"]
    assert rows["fill"] == rows["work"]["tokens"] / 256
    assert rows["patches"]["mean"] == rows["work"]["patches"]
    most = sum(h * w for sample in rows["heaviest"] for h, w in sample["frames"])
    assert rows["patches"]["max"] == most > rows["work"]["patches"]
    assert sum(tokens for sample in rows["heaviest"] for tokens in sample["tokens"]) <= 256
    plan = ["plan", config, "--gpus", 1, "--json", *packed]
    full, of_data = (json.loads(megavlm(*plan, *more).stdout) for more in ([], ["--data", summary]))
    assert of_data["tokens"] == int(8 * rows["work"]["tokens"]) < full["tokens"] == 8 * 256
    assert of_data["mix"].endswith(f"and {most:,} patches in the heaviest, which decides the memory")
    # A worker is as fast as was measured; here, it is as slow as needed for 2.5 workers.
    found, measured = json.loads(summary.read_text()), of_data["workers"]
    assert measured["speed"] == found["worker"]
    assert found["worker"]["rows"] >= 1
    assert (measured["rows"], measured["configured"]) == (8, 1)
    assert full["workers"] is None
    found["worker"]["row_seconds"] = 2.5 * of_data["time"]["seconds"] / 8
    slow, old, page = tmp_path / "slow.json", tmp_path / "old.json", tmp_path / "page.html"
    slow.write_text(json.dumps(found))
    old.write_text(json.dumps({key: value for key, value in found.items() if key != "worker"}))
    told = " ".join(megavlm(*plan[:4], *packed, "--data", slow, "--page", page, "data.workers=2").stdout.split())
    for text in (told, page.read_text()):
        assert "3 data workers needed on each rank that loads data" in text
        assert "waiting for data; set data.workers=3" in text
    told = " ".join(megavlm(*plan[:4], *packed, "--data", old).stdout.split())
    assert "data worker takes for a row was not measured there" in told
    assert "workers needed" not in told
    # A row of data has fewer pictures than fit, and so fewer features and operations of the tower.
    assert of_data["model_flops"]["vision"] < full["model_flops"]["vision"]
    sizes = [found["stages"][0]["peak"]["by_phase"] for found in (of_data, full)]
    assert sizes[0]["tower"] < sizes[1]["tower"]
    refused = {
        ("--data", summary, "--pictures", 1): "--data says what the rows contain, as --samples and --pictures do",
        ("--data", config): "is not a summary.json of megavlm data inspect",
        ("--data", summary, "data.seq_length=512"): "is of rows of 256 tokens, but data.seq_length is 512",
        ("--imbalance", "0.5"): "argument --imbalance: '0.5' is not a number of at least 1",
    }
    for words, told in refused.items():
        assert told in " ".join(megavlm(*plan, *words, status=2).stderr.split())

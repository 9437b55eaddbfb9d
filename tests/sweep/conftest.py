"""A folder with everything that a verb can read, made once; a test spoils one file of it for a while."""

import json
import shutil
import struct
import tarfile
from pathlib import Path

import pytest
from PIL import Image

CONFIG = """
base: base.yaml
model: {hf: hf, load: mcore}
data: {train: train.jsonl, eval: eval.jsonl, seq_length: 128, workers: 0}
train: {steps: 1, global_batch_size: 1, lr: 1e-3, precision: fp32, memory_check: false}
log: {wandb: {mode: "off"}}
output: run
"""


def talk(content: str) -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "So it is."}]


@pytest.fixture(scope="session")
def stocked(model_folder, tmp_path_factory) -> Path:
    from megavlm.convert import hf_to_mcore

    place = tmp_path_factory.mktemp("sweep")
    shutil.copytree(model_folder, place / "hf")
    hf_to_mcore(place / "hf", place / "mcore", progress=False)
    Image.effect_noise((64, 48), 60).save(place / "cat.png")
    (place / "base.yaml").write_text("train: {schedule: constant}\n")
    (place / "run.yaml").write_text(CONFIG)
    seen = {"images": ["cat.png"]}
    records = {
        "train": [{"messages": talk("<image>What?")} | seen],
        "eval": [{"messages": talk("<image>What?")} | seen],
        "pairs": [{"prompt": "<image>What?", "chosen": "A cat.", "rejected": "A dog."} | seen],
        "judged": [{"prompt": "<image>What?", "completion": "A cat.", "label": True} | seen],
    }
    for name, lines in records.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    shards(place / "shards", records["train"] * 2, place / "cat.png")
    return place


def shards(folder: Path, records: list[dict], picture: Path) -> None:
    """A folder of one shard with energon's index, which takes many seconds to make with energon."""
    (folder / ".nv-meta").mkdir(parents=True)
    starts = []
    with tarfile.open(folder / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, record in enumerate(records):
            (folder / "record").write_text(json.dumps(record | {"images": ["0.png"]}))
            starts.append(tar.offset)
            tar.add(folder / "record", f"{number}.json")
            tar.add(picture, f"{number}.0.png")
        starts.append(tar.offset)
    (folder / "record").unlink()
    (folder / "a.tar.idx").write_bytes(struct.pack(f"<{len(starts)}Q", *starts))
    (folder / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": {"a.tar": len(records)}}))


@pytest.fixture
def place(stocked, monkeypatch) -> Path:
    """The stocked folder as current directory, without leftovers of an earlier command."""
    monkeypatch.chdir(stocked)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # left by what ran before in this process
    for name in ("run", "out"):
        shutil.rmtree(stocked / name, ignore_errors=True)
    return stocked

"""Files that only some runs read, spoiled in every way: adapters, weights, a critic, rewards, tables, clips."""

import json
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from spoiling import FAULTS, check_words, run_apart, run_here, spoiled
from test_file_sweep import arguments_of

from megavlm.base.errors import UserError
from megavlm.rewards.own_function import load_function

MODULE = "model.language_model.layers.0.self_attn.q_proj"
JUDGED = ("reward=[{python: 'rewards.py:brief'}]", "rollout.max_new_tokens=8")
CRITIC = ("align.critic.load=critic", "rollout.max_new_tokens=8")
DATA = ("table.parquet", "table.feather", "list.json")


@pytest.fixture(scope="session")
def further(stocked):
    """The stocked folder with more files."""
    records = [json.loads(line) for line in (stocked / "train.jsonl").read_text().splitlines()]
    table = pa.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, stocked / "table.parquet")
    pyarrow.feather.write_feather(table, stocked / "table.feather", compression="uncompressed")
    (stocked / "list.json").write_text(json.dumps(records))
    with av.open(str(stocked / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(8):
            picture = np.full((64, 64, 3), 30 * number, np.uint8)
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        clip.mux(stream.encode())
    told = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "So it is."}]
    (stocked / "clips.jsonl").write_text((json.dumps({"messages": told, "videos": ["clip.mp4"]}) + "\n") * 2)
    (stocked / "rewards.py").write_text("def brief(completions):\n    return [-len(text) for text in completions]\n")
    with safe_open(stocked / "hf/model.safetensors", "pt") as weights:
        rows, width = weights.get_slice(f"{MODULE}.weight").get_shape()
    for folder in ("adapter", "critic"):
        (stocked / folder).mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]}
    (stocked / "adapter/adapter_config.json").write_text(json.dumps(config))
    name = f"base_model.model.{MODULE}"
    matrices = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    save_file(matrices, stocked / "adapter/adapter_model.safetensors")
    shutil.copytree(stocked / "hf", stocked / "critic", dirs_exist_ok=True)
    save_file({"weight": torch.ones(1, width)}, stocked / "critic/reward_head.safetensors")
    return stocked


@pytest.fixture
def place(further, place):
    return place


def check(place, capfd, fault, file, *commands, may_pass=()):
    """Each command says in words what is wrong with the file, and is well without a fault."""
    for command in commands:
        with spoiled(place / file, fault):
            status, printed = run_here(capfd, *command)
        shutil.rmtree(place / "out", ignore_errors=True)
        if (status, fault in may_pass) != (0, True):
            check_words(status, printed, file.rpartition("/")[2], file.partition("/")[0])


def commands_of(*more, verbs=("validate",)):
    return [arguments_of(verb, *more) for verb in verbs]


def test_nothing_is_spoiled(place, capfd):
    for more in (*([f"data.train={name}"] for name in (*DATA, "clips.jsonl")), ["model.load=hf"], JUDGED,
                 ["model.adapter=adapter"], CRITIC):  # fmt: skip
        assert run_here(capfd, *arguments_of("validate", *more)) == (0, "")
    assert run_here(capfd, *arguments_of("export", "model.adapter=adapter"))[0] == 0


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", DATA)
def test_tables_and_lists(place, capfd, file, fault):
    check(place, capfd, fault, file, *commands_of(f"data.train={file}", verbs=("validate", "data inspect")))


@pytest.mark.parametrize("fault", FAULTS)
def test_clips(place, capfd, fault):
    check(place, capfd, fault, "clip.mp4", *commands_of("data.train=clips.jsonl", verbs=("validate", "data inspect")))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_file_of_a_reward(place, capfd, fault):
    if fault != "not permitted":  # as root, the process that runs the file has all rights again
        check(place, capfd, fault, "rewards.py", *commands_of(*JUDGED))
        return
    shutil.rmtree(place / "__pycache__", ignore_errors=True)
    with spoiled(place / "rewards.py", fault), pytest.raises(UserError, match=r"rewards\.py cannot be used: .*denied"):
        load_function("rewards.py", "brief")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters(place, capfd, name, fault):
    commands = commands_of("model.adapter=adapter", verbs=("validate", "export"))
    check(place, capfd, fault, f"adapter/{name}", *commands)


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_of_hugging_face(place, capfd, fault):
    check(place, capfd, fault, "hf/model.safetensors", *commands_of("model.load=hf"))


@pytest.mark.parametrize(
    ("verb", "file", "fault", "more"),
    [
        ("sft", "hf/model.safetensors", "truncated", "model.load=hf"),
        ("score", "hf/model.safetensors", "binary", "model.load=hf"),
        ("ppo", "critic/model.safetensors", "truncated", "align.critic.load=critic"),
        ("ppo", "critic/config.json", "a list", "align.critic.load=critic"),
        ("ppo", "critic/model.safetensors", "a dangling link", "align.critic.load=critic"),
        ("ppo", "critic/reward_head.safetensors", "binary", "align.critic.load=critic"),
        ("infer", "adapter/adapter_model.safetensors", "a list", "model.adapter=adapter"),
        ("sft", "table.parquet", "binary", "data.train=table.parquet"),
        ("sft", "clip.mp4", "truncated", "data.train=clips.jsonl"),
    ],
)
def test_verbs_that_build_a_model(place, verb, file, fault, more):
    with spoiled(place / file, fault):
        check_words(*run_apart(*arguments_of(verb, more)), file.rpartition("/")[2], file.partition("/")[0])

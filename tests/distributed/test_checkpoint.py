"""Checkpoints of a run: continuing gives the same bits in the same layout, and the same numbers in another."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import ROWS, settings_of
from pool import RankError
from toy import toy_folder, toy_records

LAYOUTS = {
    "one process": (1, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "DP2": (2, "dense", {}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "MoE EP2": (2, "moe", {"expert": 2}),
}


class CountingLoader:
    """The same few rows over and over; its place is a number."""

    def __init__(self, rows):
        self.rows, self.place = rows, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.place += 1
        return self.rows[(self.place - 1) % len(self.rows)]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def run(folder, weights, root, records, settings, checkpoints, *, steps, save_at=(), restore=None):
    """Runs on every rank: trains from ``weights`` or a checkpoint.

    Returns losses, local weights after the last step, random numbers drawn after it, rows read (None: no leader), and
    the step that the checkpoint said.
    """
    from megavlm import platform
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.training.checkpoint import Checkpoints
    from megavlm.training.feed import Feed
    from megavlm.training.optimizer import Optimization
    from megavlm.training.state import load_weights
    from megavlm.training.step import Step

    settings = Settings(**settings)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    if restore is None:
        load_weights(weights, vlm)
    renderer = Renderer(folder, settings.data)
    samples = [renderer.encode(r, root, f"record {i}", kind="tune", index=i) for i, r in enumerate(records)]
    rows = [renderer.pack([samples[i] for i in row]) for row in ROWS]
    each = 2 // groups.data_size  # rows of a step on this rank; four rows make two steps
    mine = [row for i, row in enumerate(rows) if i % groups.data_size == groups.data_rank]
    loader = CountingLoader(mine) if groups.is_leader else None
    optimization = Optimization(vlm, settings.train)
    store = Checkpoints(checkpoints, vlm, optimization, loader, settings.checkpoint, settings.train, origin=weights)
    first = store.restore(restore) if restore else 0
    step = Step(vlm, optimization, Feed(vlm, loader), each, settings.train.logprob_chunk_tokens)
    losses = []
    for number in range(first + 1, steps + 1):
        losses.append(step().loss)
        if number in save_at:
            store.save(number)
        store.poll()
    store.finish()
    chunks = [vlm.vision, vlm.projector, *vlm.language]
    local = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    draws = (random.random(), np.random.rand(), torch.rand(1).item())
    return losses, local, draws, loader and loader.place, first


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """kind → (HF folder, Megatron checkpoint, folder of the pictures, records)."""
    from megavlm.convert import hf_to_mcore

    root = tmp_path_factory.mktemp("toys")
    records, made = toy_records(root), {}
    for kind in ("dense", "moe"):
        folder = toy_folder(root, moe=kind == "moe", tied=kind == "dense")
        hf_to_mcore(folder, root / f"{kind}-mcore", progress=False)
        made[kind] = folder, root / f"{kind}-mcore", root, records
    return made


def adam(folder: Path, kind: str, parallel: dict, *, background: bool = True, keep: int = 3, **train) -> dict:
    train = {"optimizer": "adam", "lr": 1e-3, "precision": "bf16", "global_batch_size": 2, "warmup_steps": 2, **train}
    settings = settings_of(folder, parallel, moe=kind == "moe", **train)
    settings["train"] |= {"schedule": "cosine", "steps": 4}
    return {**settings, "checkpoint": {"async": background, "keep": keep}}


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_continues_on_the_same_bits(layout, background, toys, tmp_path, request):
    size, kind, parallel = LAYOUTS[layout]
    if background and layout not in ("one process", "TP2"):
        pytest.skip("covered by the others")
    world, toy = request.getfixturevalue(f"world{size}"), toys[kind]
    settings = adam(toy[0], kind, parallel, background=background)
    straight = world.run(run, *toy, settings, tmp_path, steps=3, save_at=[2])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    resumed = world.run(run, *toy, settings, tmp_path, steps=3, restore=tmp_path / "step_00000002")
    for (losses, weights, draws, place, _), (late_losses, late_weights, late_draws, late_place, first) in zip(
        straight, resumed, strict=True
    ):
        assert first == 2
        assert late_losses == losses[2:]
        assert all(torch.equal(x, y) for x, y in zip(weights, late_weights, strict=True))
        assert late_draws == draws
        assert late_place == place


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("dense", (2, {"tensor": 2}), (2, {"pipeline": 2})),
        ("dense", (2, {"pipeline": 2}), (1, {})),
        ("moe", (2, {"expert": 2}), (4, {"tensor": 2, "expert": 2, "expert_tensor": 1})),
    ],
    ids=["TP2 to PP2", "PP2 to one process", "MoE EP2 to TP2 × EP2"],
)
def test_continues_in_another_layout(kind, first, second, toys, tmp_path, request):
    toy = toys[kind]
    worlds = [request.getfixturevalue(f"world{size}") for size, _ in (first, second)]
    settings = [adam(toy[0], kind, parallel, precision="fp32") for _, parallel in (first, second)]
    straight = worlds[0].run(run, *toy, settings[0], tmp_path, steps=3, save_at=[2])
    resumed = worlds[1].run(run, *toy, settings[1], tmp_path, steps=3, restore=tmp_path / "step_00000002")
    assert resumed[0][0] == pytest.approx(straight[0][0][2:], rel=1e-5)
    assert straight[0][0][2] != pytest.approx(straight[0][0][0], rel=1e-3)  # the same rows, two steps earlier


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_keeps_the_newest(background, toys, tmp_path, world1):
    toy = toys["dense"]
    settings = adam(toy[0], "dense", {}, background=background, keep=2)
    (tmp_path / "step_00000007.partial").mkdir(parents=True)  # of a run that was killed
    world1.run(run, *toy, settings, tmp_path, steps=4, save_at=[1, 2, 3, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    # the newest one is damaged: the run goes on from the one before, and its own step 4 takes that place
    next((tmp_path / "step_00000004").glob("*.distcp")).unlink()
    world1.run(run, *toy, settings, tmp_path, steps=4, save_at=[4], restore=tmp_path / "step_00000003")
    (tmp_path / "step_00000009").mkdir()
    assert world1.run(newest, tmp_path) == [tmp_path / "step_00000004"]


def newest(root):
    from megavlm.training.checkpoint import latest

    return latest(root)


def test_another_run_is_refused(toys, tmp_path, world1, world2):
    toy = toys["dense"]
    world1.run(run, *toy, adam(toy[0], "dense", {}), tmp_path, steps=1, save_at=[1])
    cases = [
        (world2, adam(toy[0], "dense", {}), "data-parallel ranks 1, now it is 2"),
        (world1, adam(toy[0], "dense", {}, optimizer="sgd"), "train.optimizer adam, now it is sgd"),
        (world1, adam(toy[0], "dense", {}, freeze=("vision",)), "learning parts"),
    ]
    for world, settings, words in cases:
        with pytest.raises(RankError, match=words):
            world.run(run, *toy, settings, tmp_path, steps=2, restore=tmp_path / "step_00000001")


def test_exports_with_the_original_layout(toys, tmp_path, world2):
    """From a folder with configuration alone: the checkpoint hands on what the conversion noted."""
    from megavlm.convert import mcore_to_hf
    from megavlm.convert.safetensors_file import SafetensorsReader

    folder, *rest = toys["dense"]
    settings = adam(folder, "dense", {"tensor": 2}, lr=1e-30, weight_decay=0.0)
    world2.run(run, folder, *rest, settings, tmp_path / "run", steps=1, save_at=[1])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folder / "config.json").read_text())
    mcore_to_hf(tmp_path / "run" / "step_00000001", tmp_path / "bare", tmp_path / "out", progress=False)
    before, after = (SafetensorsReader(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert after.tensors == before.tensors
    for name in before.tensors:
        assert torch.equal(after.read(name), before.read(name).bfloat16().float()), name

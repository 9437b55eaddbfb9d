"""Checkpoints of a run: continuing gives the same bits in the same layout, and the same numbers in another."""

import json
import math
import random
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from crafted import Command, objects_of, put_object
from packed import packed_rows
from parity import mostly_slow, settings_of
from pool import RankError
from toy import toy_folder, toy_records

ROWS = ((0, 1, 2), (3, 5), (4, 6), (7,), (5, 6), (0, 3))  # toy records in each row
WORKERS = 4  # data workers in all, on however many ranks


@dataclass(frozen=True)
class Layout:
    """Ranks, kind of the model, ``parallel`` settings."""

    world: int
    kind: str
    parallel: dict

    @property
    def dp_size(self) -> int:
        return self.world // math.prod(self.parallel.get(name, 1) for name in ("tensor", "pipeline", "context"))


ONE, MOE = Layout(1, "dense", {}), Layout(1, "moe", {})
TP2, PP2, DP2 = Layout(2, "dense", {"tensor": 2}), Layout(2, "dense", {"pipeline": 2}), Layout(2, "dense", {})
VPP2 = Layout(2, "dense", {"pipeline": 2, "virtual_pipeline": 2})
DP4, TP2_DP2 = Layout(4, "dense", {}), Layout(4, "dense", {"tensor": 2})
TP2_PP2 = Layout(4, "dense", {"tensor": 2, "pipeline": 2})
EP2 = Layout(2, "moe", {"expert": 2})
EP2_TP2 = Layout(4, "moe", {"expert": 2, "tensor": 2, "expert_tensor": 1})
EP2_ETP2 = Layout(4, "moe", {"expert": 2, "tensor": 2, "expert_tensor": 2})
EP2_PP2 = Layout(4, "moe", {"expert": 2, "pipeline": 2})
CP2, CP2_PP2 = Layout(2, "dense", {"context": 2}), Layout(4, "dense", {"context": 2, "pipeline": 2})
EP2_CP2 = Layout(2, "moe", {"expert": 2, "context": 2})

SAME = {"one process": ONE, "TP2": TP2, "DP2": DP2, "PP2 × VPP2": VPP2, "CP2": CP2, "MoE EP2": EP2}
# Saved under the first, continued under the second.
PAIRS = {
    "TP2 to DP2": (TP2, DP2),
    "TP2 to PP2": (TP2, PP2),
    "DP2 to one process": (DP2, ONE),
    "one process to TP2 × PP2": (ONE, TP2_PP2),
    "PP2 × VPP2 to TP2": (VPP2, TP2),
    "PP2 to PP2 × VPP2": (PP2, VPP2),
    "DP4 to TP2": (DP4, TP2),
    "TP2 × DP2 to DP4": (TP2_DP2, DP4),
    "MoE EP2 to one process": (EP2, MOE),
    "MoE EP2 × TP2 to EP2 × PP2": (EP2_TP2, EP2_PP2),
    "MoE one process to EP2 × TP2": (MOE, EP2_TP2),
    "CP2 to TP2": (CP2, TP2),
    "DP2 to CP2 × PP2": (DP2, CP2_PP2),
    "MoE EP2 × CP2 to EP2": (EP2_CP2, EP2),
}

# Every kind of layout once on either side.
QUICK_PAIRS = {
    *("TP2 to PP2", "one process to TP2 × PP2", "PP2 × VPP2 to TP2", "DP4 to TP2", "DP2 to CP2 × PP2"),
    *("MoE EP2 × TP2 to EP2 × PP2", "MoE EP2 × CP2 to EP2"),
}


class CountingLoader:
    """The same few rows over and over, dealt to the data ranks in turn; its place: rows of all ranks."""

    def __init__(self, rows, dp_rank, dp_size, workers):
        self.rows, self.rank, self.size, self.workers, self.place = rows, dp_rank, dp_size, workers, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.place += self.size
        return self.rows[(self.place - self.size + self.rank) % len(self.rows)]

    def state_dict(self):
        return [{"place": self.place}] * max(self.workers, 1)

    def load_state_dict(self, states):
        self.place = states[0]["place"]


def run(folder, weights, root, records, settings, checkpoints, *, steps, save_at=(), restore=None, threads=1):
    """Runs on every rank: trains from ``weights`` or a checkpoint.

    Returns loss and norms of each step, local weights after the last step, random numbers drawn after it, rows
    read by all ranks (None: no leader), and the step that the checkpoint said.
    """
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel
    from megavlm.config.settings import Settings
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    torch.set_num_threads(threads)
    settings = Settings(**settings)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    if restore is None:
        load_weights(weights, vlm)
    rows = packed_rows(folder, root, records, settings, ROWS) if groups.is_leader else []
    each = settings.train.global_batch_size // groups.dp_size  # rows of a step on this rank
    loader = CountingLoader(rows, groups.dp_rank, groups.dp_size, settings.data.workers) if groups.is_leader else None
    optimizers = Optimizers(vlm, settings.train)
    store = Checkpoints(checkpoints, {MAIN: TrainedModel(vlm, optimizers)}, loader, settings, origin=weights)
    first = store.restore(restore) if restore else 0
    step = Step(vlm, optimizers, Feed(vlm, loader), each, CrossEntropy(["data"], settings.train.logprob_chunk_tokens))
    metrics = []
    if 0 in save_at:
        store.save(0)
    for number in range(first + 1, steps + 1):
        optimizers.unfreeze(number)
        result = step()
        metrics.append({"loss": result.loss, **result.norms})
        if number in save_at:
            store.save(number)
        store.poll()
    store.finish()
    chunks = [vlm.vision, vlm.projector, *vlm.language]
    local = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    draws = (random.random(), np.random.rand(), torch.rand(1).item())
    return metrics, local, draws, loader and loader.place, first


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


def adam(toy, layout: Layout, *, background: bool = True, keep: int = 3, workers: int | None = None, **train) -> dict:
    settings = settings_of(
        toy[0],
        layout.parallel,
        moe=layout.kind == "moe",
        **{"optimizer": "adam", "lr": 1e-3, "precision": "fp32", "global_batch_size": 2, "warmup_steps": 2, **train},
    )
    settings["train"] |= {"schedule": "cosine", "steps": 6}
    settings["data"] |= {
        "workers": workers or WORKERS // layout.dp_size,
        "pad_multiple": 4,
    }  # the same rows in all layouts
    return {**settings, "checkpoint": {"async": background, "keep": keep}}


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("name", SAME)
def test_continues_on_the_same_bits(name, background, toys, tmp_path, request):
    layout = SAME[name]
    if background and name not in ("one process", "TP2", "DP2"):
        pytest.skip("covered by the others")
    world, toy = request.getfixturevalue(f"world{layout.world}"), toys[layout.kind]
    # bf16 products take twelve times as long on a CPU that has none, so each question is asked in bf16 once or twice
    settings = adam(toy, layout, background=background, precision="fp32" if background else "bf16")
    straight = world.run(run, *toy, settings, tmp_path, steps=3, save_at=[2])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    assert_compact(tmp_path / "step_00000002")
    resumed = world.run(run, *toy, settings, tmp_path, steps=3, restore=tmp_path / "step_00000002")
    for (metrics, weights, draws, place, _), (late_metrics, late_weights, late_draws, late_place, first) in zip(
        straight, resumed, strict=True
    ):
        assert first == 2
        assert late_metrics == metrics[2:]
        assert all(torch.equal(x, y) for x, y in zip(weights, late_weights, strict=True))
        assert late_draws == draws
        assert late_place == place


@pytest.mark.parametrize(
    "name", mostly_slow(["one process", "TP2", "DP2", "PP2 × VPP2", "MoE EP2"], {"DP2", "PP2 × VPP2"}.__contains__)
)
def test_continues_on_the_same_bits_around_a_thaw(name, toys, tmp_path, request):
    """The decoder is unfrozen after step 2: from checkpoints of before, of that very step, and of after it."""
    layout = SAME[name]
    world, toy = request.getfixturevalue(f"world{layout.world}"), toys[layout.kind]
    precision = "bf16" if name in ("TP2", "MoE EP2") else "fp32"
    settings = adam(toy, layout, keep=5, precision=precision, freeze=("language",), unfreeze_after={"language": 2})
    saves = [0, 1, 2, 3] if name == "one process" else [2, 3]
    straight = world.run(run, *toy, settings, tmp_path, steps=4, save_at=saves)
    assert [metrics["grad_norm/language"] > 0 for metrics in straight[0][0]] == [False, False, True, True]
    for step in saves:
        resumed = world.run(run, *toy, settings, tmp_path, steps=4, restore=tmp_path / f"step_{step:08d}")
        for (metrics, weights, draws, _, _), (late_metrics, late_weights, late_draws, _, first) in zip(
            straight, resumed, strict=True
        ):
            assert first == step
            assert late_metrics == metrics[step:]
            assert all(torch.equal(x, y) for x, y in zip(weights, late_weights, strict=True))
            assert late_draws == draws


def test_a_thawed_run_continues_in_another_layout(toys, tmp_path, world2):
    """As in test_continues_in_another_layout: the parts' own numbers of steps go with them."""
    toy, train = toys["dense"], {"freeze": ("vision", "language"), "unfreeze_after": {"language": 2}}
    straight, resumed = (
        world2.run(run, *toy, adam(toy, layout, **train), tmp_path, steps=5, **how)[0]
        for layout, how in ((TP2, {"save_at": [3]}), (PP2, {"restore": tmp_path / "step_00000003"}))
    )
    for before, after in zip(straight[0][3:], resumed[0], strict=True):
        assert after == pytest.approx(before, rel=1e-5)


def assert_compact(checkpoint):
    """The files hold each tensor once, a kilobyte of zip archive around each piece, and objects."""
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    tensors = McoreCheckpoint(checkpoint).tensors.values()
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
    files = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert nbytes < files < nbytes + 4096 * len(tensors) + 2**20


@pytest.mark.parametrize("pair", mostly_slow(PAIRS, QUICK_PAIRS.__contains__))
def test_continues_in_another_layout(pair, toys, tmp_path, request):
    """Float32, where another order of sums is the only difference: 1e-5 of each number."""
    first, second = PAIRS[pair]
    toy, batch = toys[first.kind], max(2, first.dp_size, second.dp_size)
    straight, resumed = (
        request.getfixturevalue(f"world{layout.world}").run(
            run, *toy, adam(toy, layout, global_batch_size=batch), tmp_path, steps=4, **how
        )[0]
        for layout, how in ((first, {"save_at": [2]}), (second, {"restore": tmp_path / "step_00000002"}))
    )
    assert (straight[3], resumed[3], resumed[4]) == (4 * batch, 4 * batch, 2)
    for before, after in zip(straight[0][2:], resumed[0], strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    assert straight[0][2]["loss"] != pytest.approx(straight[0][0]["loss"], rel=1e-3)  # the rows of two steps earlier


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_keeps_the_newest(background, toys, tmp_path, world1):
    toy = toys["dense"]
    settings = adam(toy, ONE, background=background, keep=2)
    (tmp_path / "step_00000007.0badcafe.partial").mkdir(parents=True)  # of a run that was killed
    world1.run(run, *toy, settings, tmp_path, steps=4, save_at=[1, 2, 3, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    # the newest one is damaged: the run goes on from the one before, and its own step 4 takes that place
    next((tmp_path / "step_00000004").glob("*.distcp")).unlink()
    world1.run(run, *toy, settings, tmp_path, steps=4, save_at=[4], restore=tmp_path / "step_00000003")
    (tmp_path / "step_00000009").mkdir()
    assert world1.run(newest, tmp_path) == [tmp_path / "step_00000004"]


def test_a_writer_has_no_threads_of_its_parent(toys, tmp_path, world1):
    """OpenMP's threads do not live in a forked child: a copy that counts on them hangs."""
    toy = toys["dense"]
    settings = adam(toy, ONE)
    world1.run(run, *toy, settings, tmp_path, steps=2, save_at=[1, 2], threads=2, timeout=120)
    assert_compact(tmp_path / "step_00000002")


def newest(root):
    from megavlm.checkpoint.folders import latest

    return latest(root)


def test_another_run_is_refused(toys, tmp_path, world1):
    toy = toys["dense"]
    world1.run(run, *toy, adam(toy, ONE, workers=2), tmp_path, steps=1, save_at=[1])
    cases = [
        (world1, adam(toy, ONE, workers=2, optimizer="sgd"), "train.optimizer = adam, but now it is sgd"),
        (world1, adam(toy, ONE, workers=2, freeze=("vision",)), "learning parts"),
    ]
    for world, settings, words in cases:
        with pytest.raises(RankError, match=words):
            world.run(run, *toy, settings, tmp_path, steps=2, restore=tmp_path / "step_00000001")


def test_exports_with_the_original_layout(toys, tmp_path, world2):
    """From a folder with configuration alone: the checkpoint hands on what the conversion noted."""
    from megavlm.convert import mcore_to_hf
    from megavlm.convert.safetensors_file import SafetensorsReader

    folder, *rest = toys["dense"]
    settings = adam(toys["dense"], TP2, precision="bf16", lr=1e-30, weight_decay=0.0)
    world2.run(run, folder, *rest, settings, tmp_path / "run", steps=1, save_at=[1])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folder / "config.json").read_text())
    mcore_to_hf(tmp_path / "run" / "step_00000001", tmp_path / "bare", tmp_path / "out", progress=False)
    before, after = (SafetensorsReader(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert after.tensors == before.tensors
    for name in before.tensors:
        assert torch.equal(after.read(name), before.read(name).bfloat16().float()), name


def objects_crafted_in(checkpoint, tmp_path, mark):
    """(what is crafted, copy of the checkpoint) for every kind of object that a run stores, and for the description."""
    import pickle

    for kind in (".metadata", "common_state", "rng", "data"):
        copy = tmp_path / f"crafted-{kind}"
        shutil.copytree(checkpoint, copy)
        if kind == ".metadata":
            (copy / kind).write_bytes(pickle.dumps(Command(mark)))
        else:
            (key,) = [key for key in objects_of(copy) if key.startswith(f"{kind}/shard_0_")]
            put_object(copy, key, Command(mark))
        yield kind, copy


def test_a_crafted_checkpoint_runs_nothing(toys, tmp_path, world1):
    """Neither as the start of a run nor when a run is continued from it."""
    toy, mark = toys["dense"], tmp_path / "it ran"
    settings = adam(toy, ONE, workers=1)
    world1.run(run, *toy, settings, tmp_path, steps=1, save_at=[1])
    for kind, crafted in objects_crafted_in(tmp_path / "step_00000001", tmp_path, mark):
        folder, _, root, records = toy
        for arguments in ({"weights": crafted}, {"weights": toy[1], "restore": crafted}):
            start = {"folder": folder, "root": root, "records": records, **arguments}
            with pytest.raises(RankError, match=r"posix\.system, which is no part of a checkpoint") as raised:
                world1.run(run, settings=settings, checkpoints=tmp_path / "other", steps=1, **start)
            assert type(raised.value.exceptions[0]).__name__ == "UserError", kind
        assert not mark.exists(), kind


def test_a_run_is_not_continued_with_another_model(toys, tmp_path, world1):
    """model.hf has been replaced meanwhile."""
    folder, weights, root, records = toys["dense"]
    settings = adam(toys["dense"], ONE, workers=1)
    world1.run(run, *toys["dense"], settings, tmp_path, steps=1, save_at=[1])
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 3, "layer_types": None}
    shutil.copytree(folder, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RankError, match=r"num_hidden_layers is 4 in the checkpoint and 3 in config\.json"):
        world1.run(
            run,
            tmp_path / "hf",
            weights,
            root,
            records,
            settings,
            tmp_path,
            steps=2,
            restore=tmp_path / "step_00000001",
        )

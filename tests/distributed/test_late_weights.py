"""train.overlap.weights: weights that are gathered while the next step begins change no bit, whoever reads them.

All of it runs with weights that arrive as late as they may (``late_gathers``).
"""

import math

import pytest
import torch
from late_gathers import late_gathers
from packed import packed_rows
from parity import ROWS, mostly_slow, settings_of
from test_evaluation import lines_of, settings, train, without  # noqa: F401 (a fixture)
from test_kill import same_bits
from test_preference import judged_of, pairs_of
from toy import write_records

PARTS = {"held out": slice(0, 8)}  # of the toy's records
ADAM = {"optimizer": "adam", "lr": 0.01}
# name: (processes, toy, parallel settings, other settings)
LAYOUTS = {
    "DP2, windows of 1": (2, "dense", {}, {"vision": {"window": 1}}),
    "DP2, untied": (2, "dense-untied", {}, {}),
    "PP2 × DP2": (4, "dense-untied", {"pipeline": 2}, {}),
    "PP2 × VPP2 × DP2": (4, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "CP2": (2, "dense", {"context": 2}, {}),
    "TP2 × DP2, recomputed": (4, "dense", {"tensor": 2}, {"recompute": "full"}),
    "MoE EP2": (2, "moe", {"expert": 2}, {}),
    "MoE EP2 × DP2": (4, "moe", {"expert": 2}, {}),
    "DP2, state on the host": (2, "dense", {}, {"offload_optimizer": True}),
    "DP2, against the start": (2, "dense", {}, {"kl_to_start": 0.5}),
    "DP2, unfrozen later": (2, "dense", {}, {"freeze": ("language",), "unfreeze_after": {"language": 1}}),
}
QUICK = {"DP2, windows of 1", "MoE EP2", "PP2 × VPP2 × DP2", "DP2, against the start"}


def nobody_gathers(vlm, counts) -> None:
    """What Megatron does before modules are called, which ranks may do at different times, begins no gathering."""
    before = counts["all"]
    for module in (module for chunk in vlm.language for module in chunk.modules()):
        for hook in module._forward_pre_hooks.values():
            hook(module)
    assert counts["all"] == before


def steps(folder, checkpoint, root, records, sections, *, late: bool):
    """Runs on every rank: four steps. Returns losses and norms, the weights, how often pieces of weights were gathered,
    and how many pieces there are."""
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import MAIN, Model, Session
    from megavlm.training.objective import CrossEntropy, CrossEntropyWithKL
    from megavlm.training.start_weights import StartWeights
    from megavlm.training.step import Step

    sections["train"]["overlap"] = {"weights": late}
    own = Settings(**sections)
    groups = platform.init(own.parallel)
    vlm = VLM(Shapes.from_hf(folder), own, groups).train()
    load_weights(checkpoint, vlm)
    rows = packed_rows(folder, root, records, own, ROWS) if groups.is_leader else []
    each = len(ROWS) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    objective = CrossEntropy(["data"], 64)
    if own.train.kl_to_start:
        start = StartWeights(Session(own, vlm.shapes, groups, {MAIN: Model(vlm)}))
        objective = CrossEntropyWithKL(objective, own.train.kl_to_start, start)
    Optimizers.bucket_size = 3000
    try:
        with late_gathers() as counts:
            optimizers, found = Optimizers(vlm, own.train), []
            step = Step(
                vlm, optimizers, Feed(vlm, iter(mine * 5) if mine else None), each, objective, own.vision.window
            )
            nobody_gathers(vlm, counts)
            for number in range(1, 5):
                optimizers.unfreeze(number)
                result = step(wait=False)
                found.append((result.loss, result.norms, dict(counts)))
            optimizers.wait_for_weights()
            bad = step.gradients(step.rows(step.feed, each))
            assert optimizers.step(bad.sums * math.nan, bad.counts["weight"], wait=False).non_finite
            nobody_gathers(vlm, counts)
    finally:
        Optimizers.bucket_size = None
    parameters = [p.detach().clone() for m in (vlm.vision, vlm.projector, *vlm.language) for p in m.parameters()]
    ddps = [ddp for ddps in optimizers.ddp.values() for ddp in ddps]
    groups = [group for ddp in ddps for group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups)]
    return found, parameters, dict(counts), sum(len(group.buckets) for group in groups)


@pytest.mark.parametrize("name", mostly_slow(LAYOUTS, QUICK.__contains__))
def test_steps_have_the_same_bits(name, toys, request):
    size, kind, parallel, others = LAYOUTS[name]
    world, folder = request.getfixturevalue(f"world{size}"), toys.folder(kind)
    arguments = folder, toys.checkpoint(kind), toys.root, toys.records
    sections = settings_of(folder, parallel, moe=kind == "moe", **ADAM, **others)
    sections["model"]["load"] = str(toys.checkpoint(kind))
    early = world.run(steps, *arguments, sections, late=False)
    late = world.run(steps, *arguments, sections, late=True)
    for (before, weights, none, _), (after, others, counts, pieces) in zip(early, late, strict=True):
        assert [line[:2] for line in before] == [line[:2] for line in after]
        assert all(torch.equal(x, y) for x, y in zip(weights, others, strict=True))
        assert none["all"] == counts["all"]
        assert counts["all"] == 4 * pieces or "later" in name  # each once a step
        assert none["begun"] == 0
        assert counts["begun"] == counts["waited"] >= 4  # in several pieces, but for later stages of a pipeline
        _, _, at_the_end = after[-1]
        assert at_the_end["waited"] < at_the_end["begun"], "the step has waited for its own weights"


@pytest.mark.slow
def test_transformer_engines_layers_wait_for_their_weights(toys, te_world):
    folder = toys.folder("moe")
    arguments = folder, toys.checkpoint("moe"), toys.root, toys.records
    sections = settings_of(folder, {"expert": 2}, moe=True, **ADAM)
    sections["model"] |= {"load": str(toys.checkpoint("moe")), "kernels": "te"}
    early, late = (te_world(2).run(steps, *arguments, sections, late=late) for late in (False, True))
    for (before, weights, *_), (after, others, counts, _) in zip(early, late, strict=True):
        assert [line[:2] for line in before] == [line[:2] for line in after]
        assert all(torch.equal(x, y) for x, y in zip(weights, others, strict=True))
        assert counts["begun"] == counts["waited"] > 8


def in_pieces(sections: dict, method: str = "sft") -> str:
    """Runs on every rank: a training verb with weights in many pieces, which arrive late if they may."""
    from megavlm.optim.optimizers import Optimizers

    with late_gathers() as counts, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizers, "bucket_size", 3000)
        message = train(sections, method)
    assert counts["begun"] == counts["waited"]
    assert (counts["begun"] > 0) == sections["train"]["overlap"]["weights"]
    return message


def both(settings, tmp_path, world, run, **own) -> list[list[dict]]:  # noqa: F811
    """The metrics of a run of four steps, and of one whose weights arrive late; checkpoints have the same bits."""
    for name in ("early", "late"):
        made = settings("dense-untied", {}, 4, own.get("evaluation"), {"workers": 1, **own.get("data", {})}, **ADAM)
        made["train"]["overlap"] = {"weights": name == "late"}
        made |= {"checkpoint": {"every": 3, "keep": 9}, "output": str(tmp_path / name), **own.get("sections", {})}
        assert world.run(run, made, *own.get("method", ())) == [""] * 2
    for step in (3, 4):
        assert same_bits(*(tmp_path / name / f"checkpoints/step_{step:08}" for name in ("early", "late")))
    return [lines_of(tmp_path / name / "metrics.jsonl") for name in ("early", "late")]


def test_a_run_has_the_same_bits(settings, tmp_path, world2):  # noqa: F811
    """With checkpoints, held-out losses and sampled answers between steps, and one step after which nothing reads."""
    answers = {"samples": 2, "scorer": "exact", "max_new_tokens": 4}
    early, late = both(settings, tmp_path, world2, in_pieces, evaluation={"every": 2, "answers": answers})
    assert without(early) == without(late)
    assert ["eval/loss" in line for line in late] == [True, False, True, False, True]


def test_a_loss_that_looks_at_all_rows_first(settings, toys, tmp_path, world2):  # noqa: F811
    """kto, which needs the mean of all rows before their losses."""
    file = write_records(toys.root / "late-kto.jsonl", judged_of(pairs_of(toys.records)))
    own = {"data": {"train": str(file), "eval": []}, "sections": {"eval": {}, "align": {"reference_at": "step"}}}
    early, late = both(settings, tmp_path, world2, in_pieces, **own, method=("kto",))
    assert without(early) == without(late)


def with_hook(sections: dict) -> str:
    """Runs on every rank: tuning with a hook that reads the weights, after some steps and at the end."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.training.hooks import Hook
    from megavlm.training.loop import train

    at_end = []

    def read(run, number, say):
        parameters = (p for chunk in run.session.vlm.language for p in chunk.parameters())
        at_end.append(sum(p.detach().double().abs().sum().item() for p in parameters))
        return {"all_weights": at_end[-1]}

    own = Settings(**sections)
    with late_gathers():
        assert train(own, make_method("sft", own), [Hook(read, every=2), Hook(read, at_end=True)]) == 0
    assert at_end[-1] == at_end[-2] != at_end[0]
    return ""


def test_hooks_read_new_weights(settings, tmp_path, world2):  # noqa: F811
    early, late = both(settings, tmp_path, world2, with_hook, sections={"eval": {}})
    assert without(early) == without(late)
    assert ["all_weights" in line for line in late] == [False, True, False, True]

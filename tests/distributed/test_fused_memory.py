"""What Transformer Engine's layers keep for the backward pass: its own Python on a CPU, against the plan's layers."""

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from parity import settings_of
from test_dry_run import alone

# name: (processes, toy, parallel settings, options of settings_of, other sections)
CASES = {
    "dense": (1, "dense", {}, {}, {}),
    "recomputed MLPs": (1, "dense", {}, {"recompute": ["mlp"]}, {}),
    "recomputed layers": (1, "dense", {}, {"recompute": "full"}, {}),
    "frozen tower": (1, "dense", {}, {"freeze": ("vision", "projector")}, {}),
    "frozen decoder": (1, "dense", {}, {"freeze": ("language",)}, {}),
    "LoRA": (1, "dense", {}, {}, {"adapter": {"type": "lora", "rank": 8}}),
    "TP2": (2, "dense", {"tensor": 2}, {}, {}),
    "CP2": (2, "dense", {"context": 2}, {}, {}),
    "experts": (1, "moe", {}, {}, {}),
    "64 experts": (1, "moe", {}, {}, {}),
    "experts, EP2": (2, "moe", {"expert": 2}, {}, {}),
}


def kept(settings, world: int | None = None, rank: int = 0) -> dict[str, int]:
    """Bytes that this rank keeps of the forward passes of a window and a micro-batch, or one that does not exist."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.session import start
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent

    settings = Settings(**settings)
    if world is None:
        session = start(settings, training=True, load=False)
        optimizers = Optimizers(session.vlm, settings.train)
        assert session.vlm.kernels == "te"
        return of_forward_passes(session.vlm, optimizers, settings, torch.device("cpu"))
    with absent_rank(that_can_be_absent(settings), make_method("sft", settings), rank, world) as (session, (model,)):
        return of_forward_passes(session.vlm, model.optimizers, settings, torch.device("meta"))


def of_forward_passes(vlm, optimizers, settings, where: torch.device) -> dict[str, int]:
    from megavlm.plan.mix import Mix
    from megavlm.plan.step_memory import RowsAtHand
    from megavlm.runtime.forward import encode_window, forward_chunk, prepare_schedule
    from megavlm.tracing.balanced_experts import BalancedExperts
    from megavlm.tracing.fused_layers import fused_layers
    from megavlm.tracing.live_memory import LiveMemory, PhasesOf

    absent = where.type == "meta"
    row = Mix.of(settings, vlm.shapes, samples=2, pictures=4).row(settings, vlm.shapes)
    rows = 2
    prepare_schedule(vlm.decoder_config)

    def run() -> dict[str, int]:
        memory = LiveMemory(where)
        feed, phases = RowsAtHand(vlm, [row] * rows), PhasesOf(memory)
        experts = BalancedExperts(vlm) if absent else nullcontext()
        layers = fused_layers(vlm, settings) if absent else nullcontext()
        with experts, memory, layers, phases.step():
            before = Counter(memory.by_phase)
            (window,) = feed.windows(feed.rows(rows), rows)
            with phases("exchange"):
                encode_window(vlm, window, partial(phases, "tower"))
            tower = memory.by_phase["tower"] - before["tower"]
            with phases("decoder"):
                output = forward_chunk(vlm, vlm.language[0], window.micro_batches[0])
            assert output.numel()
            return {"tower": tower, "decoder": memory.by_phase["decoder"] - before["decoder"]}

    run()  # makes what stays: Transformer Engine's workspace
    return run()


def planned(settings, world):
    with alone():
        return [kept(settings, world, rank) for rank in range(world)]


def with_experts(folder, out, number: int):
    """The model's folder with so many experts in each layer; it has no weights."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["num_local_experts"] = number  # as transformers writes it
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("case", CASES)
def test_what_transformer_engine_keeps_is_planned(case, toys, te_world, world1, tmp_path):
    size, kind, parallel, options, sections = CASES[case]
    folder = toys.folder(kind)
    if "64" in case:
        folder = with_experts(folder, tmp_path / "model", 64)
    settings = settings_of(folder, parallel, precision="bf16", **options, moe=kind == "moe") | sections
    settings["model"] |= {"load": "none", "kernels": "te"}
    settings["data"]["max_pixels"] = 96 * 96
    measured = te_world(size).run(kept, settings)
    (expected,) = world1.run(planned, settings, size)
    print(measured, expected)
    for name in ("tower", "decoder"):
        real, plan = (sum(rank[name] for rank in ranks) for ranks in (measured, expected))  # experts get unequal shares
        # Beside the layers, only lengths of segments and the state of random numbers differ: some hundred bytes.
        assert plan == pytest.approx(real, rel=0.002), (name, measured, expected)

"""The peak of a step's tensors: planned without memory, against the same count of real tensors on real ranks."""

import pytest
import torch
from parity import mostly_slow, settings_of
from test_dry_run import alone

# name: (processes, toy, parallel settings, options of settings_of, rows of a data rank, pictures of a row)
CASES = {
    "one process": (1, "dense", {}, {}, 2, None),
    "rows of 512 tokens": (1, "dense-untied", {}, {"seq_length": 512}, 2, None),
    "text alone": (1, "dense", {}, {}, 1, 0),
    "recomputed layers": (1, "dense", {}, {"recompute": "full"}, 2, None),
    "recomputed MLPs": (1, "dense", {}, {"recompute": ["mlp"]}, 2, 1),
    "recomputed tower": (1, "dense", {}, {"vision": {"recompute": True, "chunk_patches": 64}}, 2, None),
    "windows": (1, "dense", {}, {"vision": {"window": 1}}, 3, None),
    "frozen tower": (1, "dense", {}, {"freeze": ("vision", "projector")}, 2, None),
    "experts": (1, "moe", {}, {}, 2, None),
    "TP2": (2, "dense", {"tensor": 2}, {}, 2, None),
    "CP2": (2, "dense", {"context": 2}, {}, 2, None),
    "PP2": (2, "dense", {"pipeline": 2}, {}, 4, None),
    "PP2 × VPP2, recomputed layers": (
        2,
        "dense",
        {"pipeline": 2, "virtual_pipeline": 2},
        {"recompute": "full"},
        6,
        None,
    ),
    "experts, EP2": (2, "moe", {"expert": 2}, {}, 2, None),
}
QUICK = {"one process", "recomputed layers", "PP2", "experts"}


def peak(settings, rows: int, pictures: int | None, world: int | None = None, rank: int = 0):
    """The peak of this rank, or of a rank of a world that does not exist."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.plan.mix import Mix
    from megavlm.plan.step_memory import peak_of
    from megavlm.runtime.session import start
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
    from megavlm.training.objective import CrossEntropy

    settings = Settings(**settings)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens)

    def of(session, optimizers, where):
        mix = Mix.of(settings, session.shapes, samples=2, pictures=pictures)
        row = mix.row(settings, session.shapes)
        return peak_of(session.vlm, optimizers, objective, [row] * rows, settings.vision.window, torch.device(where))

    if world is None:
        session = start(settings, training=True, load=False)
        return of(session, Optimizers(session.vlm, settings.train), "cpu")
    with absent_rank(that_can_be_absent(settings), make_method("sft", settings), rank, world) as (session, (model,)):
        return of(session, model.optimizers, "meta")


def planned(settings, rows, pictures, world):
    with alone():
        return [peak(settings, rows, pictures, world, rank) for rank in range(world)]


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK.__contains__))
def test_each_rank_peaks_where_it_was_planned(case, toys, request, world1):
    size, kind, parallel, options, rows, pictures = CASES[case]
    settings = settings_of(toys.folder(kind), parallel, **options, moe=kind == "moe")
    settings["model"]["load"] = "none"
    settings["data"]["max_pixels"] = 96 * 96
    measured = request.getfixturevalue(f"world{size}").run(peak, settings, rows, pictures)
    (expected,) = world1.run(planned, settings, rows, pictures, size)
    for real, plan in zip(measured, expected, strict=True):
        # Indices that a CPU takes as the host made them are copied to another device: up to 0.25 % in these small rows.
        # Experts are planned as equally busy, and are not (up to 2.5 %).
        assert plan.total == pytest.approx(real.total, rel=0.03 if kind == "moe" else 0.005), (real, plan)

"""The memory of a run's phases beside the step: planned without memory, against what real ranks make."""

import pytest
import torch
from packed import packed_rows
from parity import ROWS, settings_of
from test_dry_run import alone

BF16 = {"precision": "bf16", "optimizer": "adam"}
# name: (processes, toy, parallel settings, options of settings_of, section adapter)
CASES = {
    "one process": (1, "dense", {}, BF16, {}),
    "GaLore": (
        1,
        "dense",
        {},
        {"precision": "bf16", "optimizer": "galore", "galore_rank": 8, "galore_update_every": 1},
        {},
    ),
    "4 bits": (1, "dense", {}, BF16, {"type": "lora", "rank": 4, "quantize": "nf4"}),
    "TP2": (2, "dense-untied", {"tensor": 2}, BF16, {}),
    "DP2": (2, "dense", {}, BF16, {}),
    "DP2, state on the host": (2, "dense", {}, {**BF16, "offload_optimizer": True}, {}),
    "experts, EP2": (2, "moe", {"expert": 2}, BF16, {}),
}


def real(folder, checkpoint, root, records, settings, out):
    """Runs on every rank: bytes at the peak of loading and behind it, and what an update and a checkpoint make.

    Of the checkpoint: what exists only while an optimizer's state is put together, which is on the device; the tensors
    of the state that are not the optimizers' own, which are in host memory; and the peak of all that is made.
    """
    import gc

    from megavlm.checkpoint import optimizer_state, sharing
    from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel, _sharded_model
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import start
    from megavlm.tracing.live_memory import LiveMemory
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings, cpu = Settings(**settings), torch.device("cpu")
    with LiveMemory(cpu) as memory:
        session = start(settings, training=True)
        gc.collect()
        loading, loaded = memory.peak, memory.live
    groups = session.groups
    rows = packed_rows(folder, root, records, settings, ROWS) if groups.is_leader else []
    each = len(ROWS) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    optimizers = Optimizers(session.vlm, settings.train)
    feed = Feed(session.vlm, iter(mine * 2) if groups.is_leader else None)
    step = Step(session.vlm, optimizers, feed, each, CrossEntropy(["data"], 64))
    step()
    found = step.gradients(step.rows(feed, each))
    with LiveMemory(cpu) as updating:
        optimizers.step(found.sums, found.counts["weight"])
    model = TrainedModel(session.vlm, optimizers, adapters=session.adapters)
    buffers = [0]

    def put_together(*args, **options):
        with LiveMemory(cpu) as memory:
            stored = sharing.put_together(*args, **options)
        buffers.append(memory.peak - memory.live)
        return stored

    with pytest.MonkeyPatch.context() as patch, LiveMemory(cpu) as saving:
        patch.setattr(optimizer_state, "put_together", put_together)
        state = _sharded_model(model, loading=False)
    store = Checkpoints(out, {MAIN: model}, None, settings)
    with LiveMemory(cpu) as all_of_it:
        store.save(1)
    store.finish()
    assert state
    return loading, loaded, updating.peak, max(buffers), saving.live, all_of_it.peak


def planned(settings: dict, world: int) -> dict[str, tuple[int, int]]:
    """By phase, what the first rank holds and what it makes, as it is planned."""
    from megavlm.config.settings import Settings
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.mix import Mix
    from megavlm.plan.stage import Layout, stage_of

    settings = Settings(**settings)
    shapes = model_shapes(settings.model)
    with alone():
        stage = stage_of(Layout(settings, shapes, "sft", world, Mix.of(settings, shapes), 4, 1.0), 0)
    return {moment.name: (moment.static.total, moment.peak.total) for moment in stage.moments(0, 1)}


@pytest.mark.parametrize("case", CASES)
def test_what_loading_an_update_and_a_checkpoint_make(case, toys, request, world1, tmp_path):
    size, kind, parallel, options, adapter = CASES[case]
    if adapter.get("quantize"):
        pytest.importorskip("bitsandbytes")
    settings = settings_of(toys.folder(kind), parallel, **options, moe=kind == "moe")
    settings["model"]["load"] = str(toys.checkpoint(kind))
    settings["adapter"], settings["train"]["steps"] = adapter, 2
    arguments = toys.folder(kind), toys.checkpoint(kind), toys.root, toys.records, settings, tmp_path / "out"
    measured = request.getfixturevalue(f"world{size}").run(real, *arguments)
    (plan,) = world1.run(planned, settings, size)
    loading, loaded, updated, *_ = measured[0]
    if not adapter.get("quantize"):  # weights in 4 bits are loaded as the others, and are smaller afterwards
        assert 0 <= loaded - plan["load"][0] < 1024  # besides: counts of the experts' tokens
    # Not planned: one matrix at a time, in float32, as it is read. The largest is the word embedding, 1536 × 128.
    assert 0 <= loading - plan["load"][0] <= 4 * 1536 * 128 // parallel.get("tensor", 1) + 1024
    assert plan["update"][1] == pytest.approx(updated, rel=0.001)
    buffer = max(buffer for *_, buffer, _, _ in measured)
    assert plan["checkpoint"][1] == buffer
    assert (buffer > 0) == (size > 1)  # with TP2, ranks share what they have of the tower
    # Not planned: tensors in host memory, and lists of what the checkpoint contains, which the ranks send each other.
    assert all(0 <= saved - host < own + 160_000 for *_, own, host, saved in measured)

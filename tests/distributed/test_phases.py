"""The split of a step: each second counts for the phase that it was spent in, and the training stays the same."""

import time

import pytest
from parity import ROWS, settings_of

# Seconds of the clock below that each piece of work of a step takes.
ROW, TOWER, FORWARD, BACKWARD, UPDATE, BETWEEN = 1.0, 10.0, 100.0, 1000.0, 1e5, 1e7


def steps_with_phases(folder, checkpoint, root, records, settings, *, measured, out=None, false_clock=False):
    """Runs on every rank: two steps. Returns the fields, the seconds by a clock of its own, and the weights.

    The second one is profiled if there is a folder ``out``. With ``false_clock``, time only goes on where the constants
    above say so.
    """
    import torch
    import torch.distributed as dist
    from packed import packed_rows

    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.profile_section import ProfileSettings
    from megavlm.config.settings import Settings
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.monitor import phases as module
    from megavlm.monitor.phases import Phases
    from megavlm.monitor.profile import Profile
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    now = [0.0]

    def work(seconds):
        now[0] += seconds

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            work(FORWARD)
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            work(BACKWARD)
            return grad

    class SlowHead(CrossEntropy):
        def outputs(self, chunk, hidden, micro_batch):
            return Slow.apply(super().outputs(chunk, hidden, micro_batch))

    def slow_rows(rows):
        for row in rows:
            work(ROW)
            yield row

    settings = Settings(**settings)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    load_weights(checkpoint, vlm)
    phases = Phases(groups.world_host if measured else None, measured=measured)
    rows = packed_rows(folder, root, records, settings, ROWS) if groups.is_leader else []
    each = len(ROWS) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    optimizers = Optimizers(vlm, settings.train)
    update, encode = optimizers.step, vlm.tower.vision.forward

    def slow_update(*args, **options):
        work(UPDATE)
        return update(*args, **options)

    def slow_encode(*args):
        work(TOWER)
        return encode(*args)

    optimizers.step, vlm.tower.vision.forward = slow_update, slow_encode
    objective = SlowHead(["data"], settings.train.logprob_chunk_tokens)
    feed = Feed(vlm, slow_rows(mine * 2) if groups.is_leader else None)
    step = Step(vlm, optimizers, feed, each, objective, 1, tower_timer=lambda: phases("tower"), phases=phases)
    asked = ProfileSettings(start=2, steps=1, ranks=[1]) if out is not None else ProfileSettings()
    profile = Profile(asked, out, dist.get_rank(), dist.get_world_size(), phases)
    real, module.mark = module.mark, (lambda: now[0]) if false_clock else module.mark
    seconds = 0.0
    try:
        for number in (1, 2):
            dist.barrier()
            with profile.step(number):
                began = time.perf_counter()
                with phases.step():
                    step()
                seconds += time.perf_counter() - began
            work(BETWEEN)
        fields = phases.fields()
    finally:
        module.mark = real
    return fields, seconds, [p.detach() for part in (vlm.vision, *vlm.language) for p in part.parameters()]


def run(world, toys, parallel, **how):
    folder = toys.folder("dense")
    settings = settings_of(folder, parallel)
    return world.run(steps_with_phases, folder, toys.checkpoint("dense"), toys.root, toys.records, settings, **how)


def test_each_second_counts_for_its_phase(toys, world1):
    ((fields, _, _),) = run(world1, toys, {}, measured=True, false_clock=True)
    assert fields == {
        "phase/data": ROW * len(ROWS),
        "phase/sampling": 0.0,
        "phase/reference": 0.0,
        "phase/tower": TOWER * 3,  # one of the rows, each of which is a window here, has no picture
        "phase/exchange": 0.0,
        "phase/decoder": 0.0,
        "phase/head": (FORWARD + BACKWARD) * len(ROWS),
        "phase/reduction": 0.0,
        "phase/optimizer": UPDATE,
        "phase/other": 0.0,
    }


def test_the_head_is_on_the_last_stage(toys, world2):
    (fields, _, _), (nothing, _, _) = run(world2, toys, {"pipeline": 2}, measured=True, false_clock=True)
    assert nothing == {}
    assert fields["phase/head"] == (FORWARD + BACKWARD) * len(ROWS) / 2  # the mean over both ranks
    assert fields["phase/data"] == ROW * len(ROWS) / 2
    assert fields["phase/optimizer"] == UPDATE


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=["DP2", "PP2"])
def test_phases_and_traces_change_nothing(parallel, toys, world2, tmp_path):
    import torch

    measured = run(world2, toys, parallel, measured=True, out=tmp_path)
    plain = run(world2, toys, parallel, measured=False)
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["steps_2-2.rank_1.json.gz"]
    total = 2 * sum(measured[0][0].values())  # of two steps, a mean over both ranks
    seconds = sum(rank[1] for rank in measured) / 2
    assert 0.5 * seconds < total <= seconds  # a busy machine may stop a rank between two clocks
    assert measured[0][0]["phase/decoder"] > 0
    assert all(rank[0] == {} for rank in plain)
    for (_, _, with_phases), (_, _, without) in zip(measured, plain, strict=True):
        assert all(map(torch.equal, with_phases, without))

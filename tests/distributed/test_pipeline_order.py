"""The simulated order of forward and backward passes, against that of Megatron's own schedule on every stage."""

import pytest
from parity import settings_of
from test_dry_run import alone

# name: (stages, chunks of each, micro-batches)
CASES = {
    "PP2": (2, 1, 4),
    "PP4": (4, 1, 6),
    "fewer micro-batches than stages": (4, 1, 2),
    "PP2 × VPP2": (2, 2, 6),
    "as many micro-batches as stages": (2, 2, 2),
}


def orders(cases: dict) -> dict:
    """For each case, the order of the passes on each stage: (backward, micro-batch, chunk)."""
    import torch

    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.plan.mix import Mix
    from megavlm.plan.step_memory import RowsAtHand
    from megavlm.runtime import forward
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
    from megavlm.training import step as module
    from megavlm.training.step import Step

    found, original = {}, forward.forward_chunk
    with alone():
        for name, (sections, micro_batches) in cases.items():
            settings, found[name] = Settings(**sections), []
            for stage in range(settings.parallel.pipeline):
                absent = absent_rank(
                    that_can_be_absent(settings), make_method("sft", settings), stage, settings.parallel.pipeline
                )
                seen = []

                def noted(vlm, chunk, micro_batch, seen=seen):
                    hidden = original(vlm, chunk, micro_batch)
                    place = (micro_batch.number, chunk.vp_stage or 0)
                    seen.append((False, *place))
                    hidden.register_hook(lambda grad: seen.append((True, *place)))
                    return hidden

                with absent as (session, (one,)):
                    module.forward_chunk = noted
                    one.vlm.decoder_config.batch_p2p_comm = False
                    row = Mix.of(settings, session.shapes, pictures=0).row(settings, session.shapes)
                    feed = RowsAtHand(one.vlm, [row] * micro_batches)
                    try:
                        Step(one.vlm, one.optimizers, feed, micro_batches, one.objective).gradients(
                            feed.rows(micro_batches)
                        )
                    finally:
                        module.forward_chunk = original
                found[name].append(seen)
                assert torch.is_grad_enabled()
    return found


def test_stages_take_their_turns_in_megatrons_order(toys, world1):
    from megavlm.plan.schedule import turns

    cases = {}
    for name, (stages, chunks, micro_batches) in CASES.items():
        parallel = {"pipeline": stages, **({"virtual_pipeline": chunks} if chunks > 1 else {})}
        settings = settings_of(toys.folder("dense"), parallel, seq_length=64)
        settings["model"]["load"], settings["train"]["global_batch_size"] = "none", micro_batches
        cases[name] = (settings, micro_batches)
    (found,) = world1.run(orders, cases)
    for name, (stages, chunks, micro_batches) in CASES.items():
        for stage, real in enumerate(found[name]):
            assert [tuple(turn) for turn in turns(stage, stages, micro_batches, chunks)] == real, (name, stage)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 8), (8, 8)])
def test_the_bubble_is_that_of_1f1b(stages, micro_batches):
    from megavlm.plan.schedule import Passes, timeline

    def end(chunks: int) -> float:
        passes = [Passes(1.0 / chunks, 2.0 / chunks)] * stages
        timed = timeline(passes, micro_batches, chunks, head=Passes(0.0, 0.0), message=0.0)
        return max(one.end for one in timed)

    busy = 3.0 * micro_batches
    assert end(1) == pytest.approx(busy + 3.0 * (stages - 1))  # (p - 1) / m of the time, arXiv:2104.04473
    assert end(2) == pytest.approx(busy + 3.0 * (stages - 1) / 2)  # divided by the number of chunks


def test_a_message_delays_the_next_stage():
    from megavlm.plan.schedule import Passes, timeline

    timed = timeline([Passes(1.0, 2.0)] * 2, 1, 1, head=Passes(0.5, 0.25), message=10.0)
    # forward, message, forward with head, backward with head, message, backward
    assert max(one.end for one in timed) == pytest.approx(1 + 10 + 1.5 + 2.25 + 10 + 2)

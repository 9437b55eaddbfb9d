"""A frozen vision tower encodes each frame once in a step of GRPO: for sampling, reference and updates."""

import pytest
import torch
from parity import Toys, check_update, mostly_slow, pieces_of, settings_of
from test_policy_step import (
    GROUP,
    LAYOUTS,
    LOSSES,
    MOST,
    PROMPTS,
    expected,
    policy_step,
    start_of,
    step_in_layout,
    weights_of,
)

FRAMES = 6  # of the four prompts, all different
# (layout, parts that are frozen, section vision)
KEEPING = {
    **{f"{layout}, {len(frozen)} frozen": (layout, frozen, {})
       for layout in LAYOUTS for frozen in (("vision",), ("vision", "projector"))},
    "DP2, frames shared": ("DP2", ("vision",), {"balance": "world"}),
    "TP2, recomputed": ("TP2", ("vision",), {"recompute": True, "offload": True, "chunk_patches": 32}),
}  # fmt: skip


def steps_that_sample(settings: dict, root, records: list[dict], most_bytes: int | None = None):
    """Runs on every rank: as ``step_in_layout``, but the prompts are also sampled; then a further step, before which
    parts are unfrozen that are due.

    It also returns how many frames have gone through the tower of this rank in each of the two steps.

    ``most_bytes``: that may be kept; None: as always.
    """
    from megavlm.runtime import kept_frames

    usual = kept_frames.MOST_BYTES
    kept_frames.MOST_BYTES = usual if most_bytes is None else most_bytes
    try:
        session, step = policy_step(settings, root, records, samples=True)
        seen: list[int] = []
        session.vlm.vision.register_forward_pre_hook(lambda _, frames: seen.append(len(frames[0].lengths)))
        result = step()
        pieces, first = [(*where, values.clone()) for *where, values in pieces_of(session.vlm)], sum(seen)
        step._step.optimizers.unfreeze(2)
        step()
    finally:
        kept_frames.MOST_BYTES = usual
    assert not kept_frames._OF_TOWER, "nothing is kept beyond a step"
    return result.loss, result.norms, result.counts, result.fields, (first, sum(seen) - first), pieces


@pytest.mark.parametrize("layout", ["one process", "PP2 × VPP2"])
def test_a_frozen_tower_encodes_once_for_all_passes(layout, toys, request):
    """Old and reference log-probabilities and both updates use the features of the first pass."""
    processes, kind, parallel = LAYOUTS[layout]
    frozen = ("vision", "projector")
    losses, wanted, weights = expected(toys, kind, "grpo", frozen)
    settings = settings_of(toys.folder(kind), parallel, seq_length=512, lr=LOSSES["grpo"][2], moe_aux_loss_coeff=0.0)
    settings["model"] |= {"load": str(toys.checkpoint(kind)), "freeze": list(frozen)}
    settings["train"]["global_batch_size"] = None
    settings["align"] = {"loss": "grpo", "updates": 2, **LOSSES["grpo"][0]}
    settings["rollout"] = {"group_size": GROUP, "max_new_tokens": MOST, "temperature": LOSSES["grpo"][1]}
    world, records = request.getfixturevalue(f"world{processes}"), [toys.records[n] for n in PROMPTS]
    ranks = world.run(step_in_layout, settings, toys.root, records)
    loss, norms, counts, *_ = ranks[0]
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert norms["grad_norm/language"] == pytest.approx(wanted["language"], rel=3e-5)
    assert counts["frames"] > counts["frames_encoded"] == 0  # of both updates
    check_update(weights_of(ranks, toys.folder(kind)), weights, start_of(toys.folder(kind)))


@pytest.mark.parametrize(
    "case", mostly_slow(KEEPING, lambda case: not case.startswith(("PP2 × VPP2, 2", "MoE", "DP2, 1", "TP2, 1")))
)
def test_sampling_reference_and_updates_share_the_frozen_tower(case, toys, request):
    """A frame goes through the tower once in a step, whichever rank samples and learns; the numbers are unchanged."""
    layout, frozen, vision = KEEPING[case]
    processes, kind, _ = LAYOUTS[layout]
    losses, wanted, weights = expected(toys, kind, "grpo", frozen)
    settings = settings_that_freeze(toys, layout, frozen)
    settings["vision"] = {**settings.get("vision", {}), **vision}
    world, records = request.getfixturevalue(f"world{processes}"), [toys.records[n] for n in PROMPTS]
    ranks = world.run(steps_that_sample, settings, toys.root, records)
    loss, norms, counts, fields, *_ = ranks[0]
    for number in (0, 1):
        assert sum(rank[4][number] for rank in ranks) == FRAMES, number
    assert counts["frames"] > counts["frames_encoded"] == 0  # of both updates
    assert fields["frames_kept"] == FRAMES
    assert loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    for part in {"projector", "language"} - set(frozen):
        assert norms[f"grad_norm/{part}"] == pytest.approx(wanted[part], rel=3e-5), part
    check_update(weights_of(ranks, toys.folder(kind)), weights, start_of(toys.folder(kind)))


def settings_that_freeze(toys: Toys, layout: str, frozen: tuple[str, ...]) -> dict:
    """The settings of a step with a reference and two updates."""
    _, kind, parallel = LAYOUTS[layout]
    settings = settings_of(toys.folder(kind), parallel, seq_length=192, lr=LOSSES["grpo"][2], moe_aux_loss_coeff=0.0)
    settings["model"] |= {"load": str(toys.checkpoint(kind)), "freeze": list(frozen)}
    settings["train"]["global_batch_size"] = None
    settings["align"] = {"loss": "grpo", "updates": 2, **LOSSES["grpo"][0]}
    settings["rollout"] = {"group_size": GROUP, "max_new_tokens": MOST, "temperature": LOSSES["grpo"][1]}
    return settings


def test_what_is_not_kept_is_encoded_again(toys, world1):
    """A trained tower keeps nothing, nor does one that has no room; the latter computes the same to the bit."""
    records = [toys.records[n] for n in PROMPTS]

    def run(frozen: tuple[str, ...], most: int | None, unfreeze_after: dict[str, int] | None = None):
        settings = settings_that_freeze(toys, "one process", frozen)
        settings["train"]["unfreeze_after"] = unfreeze_after or {}
        return world1.run(steps_that_sample, settings, toys.root, records, most)[0]

    *_, fields, trained, _ = run((), None)
    assert "frames_kept" not in fields
    *_, later, _ = run(("vision",), None, {"vision": 1})
    assert later == (FRAMES, trained[1]), "as soon as it is trained"
    *kept, fields, _, kept_pieces = run(("vision",), None)
    *without, other_fields, again, pieces = run(("vision",), 0)
    assert (fields["frames_kept"], other_fields["frames_kept"]) == (FRAMES, 0)
    assert trained == again, "each pass encodes"
    assert trained[0] > 3 * FRAMES, trained
    assert without[:2] == kept[:2]
    for (name, *_, values), (*_, others) in zip(pieces, kept_pieces, strict=True):
        assert torch.equal(values, others), name

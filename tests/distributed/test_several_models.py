"""Two models in one session, both trained: they are saved and continue on the same bits, each under its own keys."""

from pathlib import Path

import pytest
import torch
from packed import packed_rows
from parity import ROWS, settings_of


def train(folder: Path, checkpoint: Path, root: Path, records: list[dict], settings: dict, out: Path, steps: range):
    """Runs on every rank: steps of a policy and of a critic in turn; ``steps`` from 2 on continue from step 1.

    Returns the losses and the weights of both.
    """
    from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import start
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = Settings(**settings)
    session = start(settings, training=True)
    session.add_model("critic", checkpoint, trained=True)
    frozen = session.add_model("reference", checkpoint, trained=False)
    assert not any(p.requires_grad for chunk in frozen.vlm.language for p in chunk.parameters())
    rows = packed_rows(folder, root, records, settings, ROWS)
    each = len(rows) // session.groups.dp_size
    trained, stepping = {}, {}
    for number, name in enumerate((MAIN, "critic")):  # the critic takes the rows in another order, so they part
        vlm = session.models[name].vlm
        trained[name] = TrainedModel(vlm, Optimizers(vlm, settings.train))
        mine = (rows[number:] + rows[:number])[session.groups.dp_rank * each :][:each]
        feed = Feed(vlm, iter(mine * 3) if session.groups.is_leader else None)
        stepping[name] = Step(vlm, trained[name].optimizers, feed, each, CrossEntropy(["data"], 64))
    store = Checkpoints(out, trained, None, settings)
    if steps.start > 1:
        assert store.restore(out / "step_00000001") == 1
    losses = []
    for number in steps:
        losses.append([step().loss for step in stepping.values()])
        if number == 1:
            store.save(1)
    store.finish()
    return losses, [p.detach().clone() for model in trained.values() for p in model.vlm.language[0].parameters()]


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["one process", "TP2"])
def test_both_continue_on_the_same_bits(parallel, toys, tmp_path, request):
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    world = request.getfixturevalue(f"world{parallel.get('tensor', 1)}")
    settings = settings_of(toys.folder("dense"), parallel, optimizer="adam", lr=1e-3)
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    arguments = toys.folder("dense"), toys.checkpoint("dense"), toys.root, toys.records, settings, tmp_path
    straight, resumed = (world.run(train, *arguments, range(first, 4)) for first in (1, 2))
    for (losses, weights), (later, after) in zip(straight, resumed, strict=True):
        assert losses[0][0] != losses[1][0]
        assert losses[1:] == later
        assert all(torch.equal(x, y) for x, y in zip(weights, after, strict=True))
    keys = McoreCheckpoint(tmp_path / "step_00000001").tensors
    plain = {key for key in keys if not key.startswith("critic.")}
    assert {f"critic.{key}" for key in plain} == set(keys) - plain


def refuse(settings: dict, weights: Path, out: Path):
    """Runs on every rank: what is said where a checkpoint of one model is continued with two."""
    from megavlm.base.errors import UserError
    from megavlm.checkpoint.manager import MAIN, Checkpoints, TrainedModel
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=True)
    models = {MAIN: TrainedModel(session.vlm, Optimizers(session.vlm, settings.train))}
    store = Checkpoints(out, models, None, settings)
    store.save(1)
    store.finish()
    critic = session.add_model("critic", weights, trained=True).vlm
    models["critic"] = TrainedModel(critic, Optimizers(critic, settings.train))
    try:
        Checkpoints(out, models, None, settings).restore(out / "step_00000001")
    except UserError as error:
        return error.message


def test_another_set_of_models_is_refused(toys, tmp_path, world1):
    settings = settings_of(toys.folder("dense"), {})
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    (message,) = world1.run(refuse, settings, toys.checkpoint("dense"), tmp_path)
    assert "other models = None, but now it is ['critic']" in message

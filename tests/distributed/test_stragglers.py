"""Each rank's own time: the slow one is found, and the wait of the others for it does not count as theirs."""

import time

import pytest
from parity import settings_of


def slow_rows(rows, seconds: float):
    for row in rows:
        time.sleep(seconds)
        yield row


def step_with_a_slow_rank(folder, checkpoint, root, records, settings, places, slow_rank: int):
    """Runs on every rank: one step. ``places``: per data rank, the toy records of its row; one rank reads slowly.

    Returns the fields, and this rank's own seconds of reading and of the tower.
    """
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.monitor.stragglers import Stragglers
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = Settings(**settings)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    load_weights(checkpoint, vlm)
    renderer = Renderer(folder, settings.data)
    row = renderer.pack(
        [
            renderer.encode(records[i], in_folder(root), f"record {i}", kind="tune", index=i)
            for i in places[groups.dp_rank]
        ]
    )
    stragglers = Stragglers(groups.world_host)
    rows = slow_rows([row, row], 0.4 if groups.dp_rank == slow_rank else 0.0)
    feed = Feed(vlm, stragglers.rows(rows) if groups.is_leader else None)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens)
    step = Step(vlm, Optimizers(vlm, settings.train), feed, 1, objective, tower_timer=stragglers.tower)
    step()  # warms up
    stragglers.start()
    step()
    return stragglers.fields(), stragglers._data, sum(platform.seconds_between(*pair) for pair in stragglers._marks)


def run(world, toys, parallel, places, slow_rank):
    folder = toys.folder("dense")
    settings = settings_of(folder, parallel, global_batch_size=len(places))
    arguments = folder, toys.checkpoint("dense"), toys.root, toys.records, settings
    return world.run(step_with_a_slow_rank, *arguments, places, slow_rank)


def test_the_slow_rank_is_found(toys, world2):
    # rank 0 has the largest picture to encode, rank 1 none; but rank 1 waits longer for its row than that takes
    (fields, data, tower), (nothing, slow_data, no_tower) = run(world2, toys, {}, [[6], [3, 5]], slow_rank=1)
    assert nothing == {}
    assert fields["slowest_rank"] == 1
    assert fields["seconds_data"] == slow_data >= 0.4
    assert data < 0.2
    assert fields["seconds_tower_max"] == tower > 10 * no_tower
    assert fields["seconds_tower"] == pytest.approx((tower + no_tower) / 2)
    assert fields["tower_imbalance"] == pytest.approx(2 * tower / (tower + no_tower))


def test_waiting_for_the_leader_is_not_the_others_time(toys, world2):
    (fields, data, _), (_, other_data, other_tower) = run(world2, toys, {"tensor": 2}, [[1, 4]], slow_rank=0)
    assert fields["slowest_rank"] == 0
    assert data >= 0.4
    assert other_data == 0.0
    assert 0 < other_tower < 0.4
    assert 1 <= fields["tower_imbalance"] < 2

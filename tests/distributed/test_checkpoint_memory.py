"""What ranks send each other for a checkpoint: put together in host memory, with little of the device's."""

from collections import Counter

import pytest
import torch
from parity import settings_of
from test_dry_run import alone

BF16 = {"precision": "bf16", "optimizer": "adam"}
# name: (processes, toy, parallel settings, options of settings_of)
CASES = {
    "DP4": (4, "dense", {}, BF16),
    "DP2, averages": (2, "dense", {}, {**BF16, "ema": 0.5}),
    "experts, EP2": (4, "moe", {"expert": 2}, BF16),
}
AT_A_TIME = 10_000
"""Bytes: so few that large weights of the toys are cut, and that there are many rounds."""


def numbered(settings: dict, at_a_time: int):
    """Runs on every rank: stores state whose numbers tell where they belong: n × their place in the n-th tensor.

    Returns what is stored here, [(key, values)], and the number of rounds.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megavlm.checkpoint import sharing
    from megavlm.checkpoint.manager import TrainedModel, _sharded_model
    from megavlm.checkpoint.optimizer_state import _keys, _pieces
    from megavlm.config.settings import Settings
    from megavlm.optim.ema import fill_adam
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=True, load=False)
    optimizers, rounds = Optimizers(session.vlm, settings.train), []
    for one in optimizers.optimizer.chained_optimizers:
        fill_adam(one)
        parameters = list(_pieces(one))
        for parameter, _ in parameters:
            held = next((found[parameter] for found in _held(one) if parameter in found), None)
            if held is None:
                continue
            tensors = one._get_main_param_and_optimizer_states(parameter)
            for number, kind in enumerate(_keys(one), 1):
                tensors[kind].view(-1).copy_(number * torch.arange(held["param"].start, held["param"].end))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "AT_A_TIME", at_a_time)
        for one in optimizers.optimizer.chained_optimizers:
            rounds.append(len(sharing.rounds_of([pieces for _, pieces in _pieces(one)], _keys(one))))
        state = _sharded_model(TrainedModel(session.vlm, optimizers), loading=False)["optimizer"]
    return [(shard.key, shard.data.detach().clone()) for shard in nested_values(state)], max(rounds)


def _held(optimizer):
    """Megatron's own maps of what this rank has of each parameter."""
    for buffers in optimizer.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                yield bucket["param_map"]


@pytest.mark.parametrize("case", CASES)
def test_every_number_comes_to_its_place(case, toys, request) -> None:
    size, kind, parallel, options = CASES[case]
    settings = settings_of(toys.folder(kind), parallel, **options, moe=kind == "moe")
    found = request.getfixturevalue(f"world{size}").run(numbered, settings, AT_A_TIME)
    kinds = ["param", "exp_avg", "exp_avg_sq", *(["ema"] if "ema" in options else [])]
    assert all(rounds > 5 for _, rounds in found)
    seen = Counter[str]()
    for stored, _ in found:
        for key, values in stored:
            number = 1 + next(at for at, one in enumerate(kinds) if key.startswith(f"optimizer.state.{one}."))
            assert torch.equal(values.view(-1), number * torch.arange(values.numel()).float()), key
            seen[kinds[number - 1]] += values.numel()
    assert len(seen) == len(kinds)
    assert len(set(seen.values())) == 1, seen


def made(settings: dict, world: int, at_a_time: int):
    """Of each rank, on the meta device: bytes at the peak on the device, bytes planned, and bytes in host memory."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megavlm.align.registry import make_method
    from megavlm.checkpoint import sharing
    from megavlm.checkpoint.manager import TrainedModel, _sharded_model
    from megavlm.checkpoint.optimizer_state import made_when_saved
    from megavlm.config.settings import Settings
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
    from megavlm.tracing.live_memory import LiveMemory
    from megavlm.tracing.static_memory import make_state

    class ToHost(LiveMemory):
        """Lets values go from the meta device to host memory, where there are none."""

        def carry_out(self, func, args, kwargs):
            if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
                return args[0]
            return super().carry_out(func, args, kwargs)

    settings, found = Settings(**settings), []
    with pytest.MonkeyPatch.context() as patch, alone():
        patch.setattr(torch.distributed, "batch_isend_irecv", lambda operations: [])
        patch.setattr(sharing, "AT_A_TIME", at_a_time)
        for rank in range(world):
            method = make_method("sft", settings)
            with absent_rank(that_can_be_absent(settings), method, rank, world) as (_, (model,)):
                make_state(model.optimizers)
                with ToHost(torch.device("meta")) as memory:
                    state = _sharded_model(TrainedModel(model.vlm, model.optimizers), loading=False)
                    apply_factories(state)
                shards = [one for one in nested_values(state["optimizer"]) if isinstance(one, ShardedTensor)]
                host = sum(one.data.nbytes for one in shards if not one.data.is_meta)
                found.append((memory.peak, made_when_saved(model.optimizers), host))
    return found


@pytest.mark.parametrize("at_a_time", [AT_A_TIME, 2**26], ids=["bounded", "all at once"])
@pytest.mark.parametrize("case", CASES)
def test_the_device_has_a_buffer_alone(case, at_a_time, toys, world1) -> None:
    size, kind, parallel, options = CASES[case]
    settings = settings_of(toys.folder(kind), parallel, **options, moe=kind == "moe")
    (found,) = world1.run(made, settings, size, at_a_time)
    assert max(peak for peak, *_ in found) == max(planned for _, planned, _ in found) <= at_a_time, found
    assert max(host for *_, host in found) > 10 * AT_A_TIME, found

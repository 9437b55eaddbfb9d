"""The optimizer state in a checkpoint, stored by each parameter's global name and shape, in any layout.

Megatron's DistributedOptimizer concatenates the parameters of a buffer and divides them into one equal piece for each
data-parallel rank. Its own way to save this ("fully_reshardable") copies everything five times and sends the state of
all data-parallel ranks to each of them. Here, the rank that has most of a parameter stores it, and only the pieces of
its neighbours are sent to it (``sharing.py``). The stored format and the loading are Megatron's.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megavlm.checkpoint.sharing import largest_buffer, put_together, rounds_of
from megavlm.model.vlm import PARTS
from megavlm.optim import megatron_galore, megatron_muon
from megavlm.optim.ema import EMA, fill_adam, has_average
from megavlm.optim.optimizers import Optimizers
from megavlm.optim.stored_adam import StoredAdam, is_stored, readable
from megavlm.platform import device


def saved_state(optimizers: Optimizers, model: dict, metadata: dict) -> dict:
    """Returns the optimizer state that this rank stores. Call it on all ranks.

    If this rank has a whole parameter, the tensors are the optimizer's own, so use them before the next step; those of
    which other ranks have pieces are in host memory. The optimizers' settings are not stored, because they follow from
    the settings of the run, and their numbers of steps from ``Optimizers.updates``.

    Args:
        optimizers: the optimizers.
        model: the sharded state of the weights.
        metadata: Megatron's metadata for sharded states.
    """
    if megatron_galore.has_galore(optimizers):
        return megatron_galore.state(optimizers)
    if optimizers.train.optimizer == "muon":
        return megatron_muon.state(optimizers, model)
    chained = optimizers.optimizer
    inner = chained.chained_optimizers
    if not _are_sharded(inner):
        return chained.sharded_state_dict(model, metadata=metadata)
    for optimizer in inner:
        if not optimizer.optimizer.state:  # the optimizer of a part whose first step was skipped
            fill_adam(optimizer)
    entries = {entry.data: entry for entry in model.values() if isinstance(entry, ShardedTensor | ShardedTensorFactory)}
    # Megatron would keep an empty list in the common state, where it does not fit that of other ranks.
    return {"tensors": list(filter(None, (list(_stored_here(optimizer, entries)) for optimizer in inner)))}


def made_when_saved(optimizers: Optimizers) -> int:
    """Bytes that ``saved_state`` makes on the device, on that of this rank's data ranks on which it makes most.

    They are the buffer for Adam's state of other ranks, and for what is sent of state that is not on the device in
    float32; with other optimizers, there is none.
    """
    inner = optimizers.optimizer.chained_optimizers
    if optimizers.train.optimizer != "adam" or not _are_sharded(inner):
        return 0
    rounds = [rounds_of((pieces for _, pieces in _pieces(one)), _keys(one)) for one in inner]
    sends = is_stored(optimizers.train)
    return max((largest_buffer(one, sends=sends) for one in rounds), default=0)  # one after the other


def wanted_state(optimizers: Optimizers, model: dict, metadata: dict) -> dict:
    """Returns the state that this rank must load for the optimizers; the loaded state is passed to ``load_state``."""
    if megatron_galore.has_galore(optimizers):
        return megatron_galore.state(optimizers)
    if optimizers.train.optimizer == "muon":
        return megatron_muon.state(optimizers, model)
    chained = optimizers.optimizer
    inner = chained.chained_optimizers
    if not _are_sharded(inner):
        return chained.sharded_state_dict(model, metadata=metadata)  # SGD, which has no state to be created first
    wanted = {}
    for number, optimizer in enumerate(inner):
        tensors = optimizer.sharded_param_state_fully_reshardable(model, is_loading=True, metadata=metadata)
        if tensors:  # a pipeline stage may have nothing that is trained
            wanted[number] = {index: one | _wanted_average(optimizer, one) for index, one in tensors.items()}
    return {"tensors": wanted}


def load_state(optimizers: Optimizers, state: dict, model: dict) -> None:
    """Loads what ``dist_checkpointing.load`` returned for ``wanted_state``. The schedule must be restored already.

    ``model`` is the sharded state of the weights, as for ``wanted_state``.

    With torch's Adam, Megatron's DistributedOptimizer expects a stored tensor for each tensor of Adam's state, also for
    "step", which is stored as a number; and it gives all parameters the same step tensor, which each of them would
    increment. Therefore the tensors are loaded while the steps are plain numbers, and each parameter gets a step tensor
    of its own afterwards.
    """
    if megatron_galore.has_galore(optimizers):
        megatron_galore.load(optimizers, state)
        return
    if optimizers.train.optimizer == "muon":
        megatron_muon.load(optimizers, model, state)
        return
    chained = optimizers.optimizer
    if not _are_sharded(chained.chained_optimizers):
        _use_own_rates(chained.chained_optimizers, state)
        chained.load_state_dict(state)
        return
    updates = [optimizers.updates(part) for part in PARTS for _ in optimizers.parts.get(part, [])]
    for number, (optimizer, step) in enumerate(zip(chained.chained_optimizers, updates, strict=True)):
        adam = optimizer.optimizer
        if not any(group["params"] for group in adam.param_groups):
            continue  # a pipeline stage of which nothing is trained
        tensors = state.get("tensors", {}).get(number, {})
        if isinstance(adam, StoredAdam):
            adam.steps = step
            optimizer.load_parameter_state_from_fully_reshardable(tensors)
            continue
        if isinstance(adam, torch.optim.Adam):
            fill_adam(optimizer)  # DistributedOptimizer requires existing state
        settings = optimizer.state_dict()
        for group in settings["optimizer"]["param_groups"]:
            group["step"] = step
        optimizer.load_state_dict(settings)
        if isinstance(adam, torch.optim.Adam):
            for value in adam.state.values():
                value["step"] = value["step"].item()
        optimizer.load_parameter_state_from_fully_reshardable(tensors)
        if isinstance(adam, torch.optim.Adam):
            for value in adam.state.values():
                value["step"] = torch.tensor(value["step"])


def _use_own_rates(optimizers: list, state: dict) -> None:
    """Writes the rates of the settings into the stored groups; Megatron finds a group only if they are equal."""
    stored = [state] if len(optimizers) == 1 else [one for _, one in sorted(state.items())]
    for optimizer, one in zip(optimizers, stored, strict=True):
        # Megatron sorts the groups, so they are in the same order in every layout.
        for group, own in zip(one.get("optimizer", one)["param_groups"], optimizer.param_groups, strict=True):
            group.update({key: own[key] for key in ("max_lr", "min_lr", "start_wd", "end_wd") if key in own})


def _are_sharded(optimizers: list) -> bool:
    return all(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers)


def _stored_here(optimizer: DistributedOptimizer, entries: dict) -> Iterator[dict]:
    """Yields {kind of state: ShardedTensor or its factory} for each parameter that this rank stores."""
    group, keys = optimizer.data_parallel_group, _keys(optimizer)
    parameters = list(_pieces(optimizer))

    def own(number: int) -> dict[str, Tensor]:
        tensors = optimizer._get_main_param_and_optimizer_states(parameters[number][0])
        return {key: tensors[key].detach().view(-1) for key in keys}

    made = None
    if isinstance(optimizer.optimizer, StoredAdam):
        optimizer.optimizer.arrive()
        made = readable
    stored = put_together([pieces for _, pieces in parameters], keys, own, group, device(), made)
    alone = group.size() == dist.get_world_size()
    for number, tensors in stored.items():
        entry = entries[parameters[number][0]]
        yield {key: _named(entry, key, tensor, alone) for key, tensor in tensors.items()}


def _keys(optimizer: DistributedOptimizer) -> tuple[str, ...]:
    return ("param", *optimizer.optimizer_state_keys, *([EMA] if has_average(optimizer) else []))


def _wanted_average(optimizer: DistributedOptimizer, wanted: dict) -> dict:
    """The entry of the average of a weight, if the optimizer has averages, made from those of its other tensors."""
    if not has_average(optimizer):
        return {}
    entry = wanted["param"]
    changes: dict[str, object] = {"key": entry.key.replace("optimizer.state.param.", f"optimizer.state.{EMA}.", 1)}
    if isinstance(entry.data, Tensor):
        changes["data"] = torch.empty_like(entry.data)
    return {EMA: replace(entry, **changes)}


def _pieces(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, dict[int, tuple[int, int]]]]:
    """Yields each parameter with the elements that each data-parallel rank has: {rank: (first, last)}.

    The result is the same on all ranks.
    """
    size = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (begin, end, bucket_index) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_index]
            length = bucket.grad_data.numel() // size
            begin, end = begin - bucket.offset, end - bucket.offset
            yield (
                parameter,
                {
                    rank: (max(begin, rank * length) - begin, min(end, (rank + 1) * length) - begin)
                    for rank in range(begin // length, (end - 1) // length + 1)
                },
            )


def _named(
    entry: ShardedTensor | ShardedTensorFactory, key: str, tensor: Tensor, alone: bool
) -> ShardedTensor | ShardedTensorFactory:
    """Returns the entry of an optimizer state, made from the entry of its weight.

    The rank that stores the state is marked as the first data-parallel rank; if ``alone``, that is, if the
    data-parallel group has all ranks, it is marked as the first of all ranks.
    """
    assert len(entry.replica_id) == 3, entry  # Megatron's (pipeline copy, tensor rank, data rank)
    changes: dict[str, object] = {
        "key": f"optimizer.state.{key}.{entry.key}",
        "data": tensor.view(entry.data.shape),
        "replica_id": (0, 0, 0) if alone else (*entry.replica_id[:2], 0),
    }
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return replace(entry, **changes)

"""Process groups: Megatron's own for the decoder, and those that encoding the frames needs in addition."""

import datetime
import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from megavlm.platform import cpu
from megavlm.platform.device import backend, host_backend, on_gpu, repeat_results, seed_everything

if TYPE_CHECKING:  # Megatron takes seconds to import, and not every program that imports this module needs it
    from megatron.core.process_groups_config import ProcessGroupCollection


_RANKS_OF_BLOCK = 32  # see ``blocks``


class ParallelSizes(Protocol):
    """The sizes of a parallel layout; ``ParallelSettings`` has them."""

    @property
    def tensor(self) -> int: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int | None: ...
    @property
    def context(self) -> int: ...
    @property
    def expert(self) -> int: ...
    @property
    def expert_tensor(self) -> int: ...


@dataclass(frozen=True)
class SamplingGroups:
    """The process groups of sampling, in which context-parallel ranks are further data-parallel ranks.

    Attributes:
        model_parallel: the TP × PP ranks that sample together.
        model_parallel_host: the same ranks on gloo.
        members: the ranks of each of these groups.
        peers_host: on gloo, the context-parallel ranks that share a row in training; None without context parallelism.
    """

    model_parallel: dist.ProcessGroup
    model_parallel_host: dist.ProcessGroup
    members: list[list[int]]
    peers_host: dist.ProcessGroup | None


@dataclass(frozen=True)
class SharingGroups:
    """A block of data-parallel ranks that share the frames of their rows (``vision.balance: world``).

    Attributes:
        ranks: all ranks of the block.
        peers_host: on gloo, the ranks of the block with the same index in their model-parallel groups, one for each
            data-parallel rank.
        members: for each data-parallel rank of the block, the ranks of its model-parallel group, as ranks of ``ranks``.
    """

    ranks: dist.ProcessGroup
    peers_host: dist.ProcessGroup
    members: list[list[int]]


@dataclass(frozen=True)
class Groups:
    """The process groups of a run.

    Attributes:
        language: Megatron's collection for the decoder.
        tower: the collection for the replicated vision tower: no model parallelism, all ranks are data-parallel ranks.
        model_parallel: the TP × CP × PP ranks that share one stream of rows and divide its frames among themselves.
        model_parallel_host: the same ranks on gloo, for metadata that stays on the host.
        world_host: all ranks, on gloo.
        sharing: the ranks with which this one shares frames; None unless ``init`` was asked for it.
        members: the ranks of each model-parallel group, in the order of the data-parallel ranks.
        sampling: the groups of sampling.
        dp_rank, dp_size: data-parallel rank of this process; number of data-parallel ranks.
    """

    language: "ProcessGroupCollection"
    tower: "ProcessGroupCollection"
    model_parallel: dist.ProcessGroup
    model_parallel_host: dist.ProcessGroup
    world_host: dist.ProcessGroup
    sharing: SharingGroups | None
    members: list[list[int]]
    sampling: SamplingGroups
    dp_rank: int
    dp_size: int

    @property
    def is_leader(self) -> bool:
        """Whether this is the rank of its model-parallel group that reads the data."""
        return self.model_parallel.rank() == 0


def init(
    parallel: ParallelSizes,
    seed: int = 1234,
    timeout_minutes: float = 30.0,
    *,
    share_frames: bool = False,
    deterministic: bool = False,
) -> Groups:
    """Initialises torch.distributed (unless it already is) and Megatron's parallel state for the layout ``parallel``.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. Without them the process is
    a world of one rank.

    Args:
        parallel: the layout.
        seed: seed of all random numbers.
        timeout_minutes: longest time that a collective of any group may wait.
        share_frames: whether to create ``Groups.sharing``.
        deterministic: whether a GPU is to repeat its results to the bit.
    """
    if deterministic:
        repeat_results()
    if not on_gpu():
        cpu.install()
    if not dist.is_initialized():
        _start(timeout_minutes)

    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    seed_everything(seed)

    language = ProcessGroupCollection.use_mpu_process_groups()
    ranks = _ranks(parallel, "tp-cp-pp")
    mine = next(group for group in ranks if dist.get_rank() in group)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    model_parallel, _ = dist.new_subgroups_by_enumeration(ranks, timeout, backend())
    host, _ = dist.new_subgroups_by_enumeration(ranks, timeout, host_backend()) if on_gpu() else (model_parallel, None)
    return Groups(
        language=language,
        tower=_tower_collection(),
        model_parallel=model_parallel,
        model_parallel_host=host,
        sharing=_sharing_groups(ranks, timeout) if share_frames else None,
        members=ranks,
        sampling=_sampling_groups(parallel, timeout, SamplingGroups(model_parallel, host, ranks, None)),
        world_host=dist.new_group(timeout=timeout, backend=host_backend()) if on_gpu() else _world(),
        dp_rank=ranks.index(mine),
        dp_size=len(ranks),
    )


def host_copy(members: list[list[int]], timeout_minutes: float) -> dist.ProcessGroup:
    """Makes one more group on gloo for each group of ranks; returns that of this rank. Call it on all ranks.

    What is sent beside the main thread needs a group of its own, or it would mix with what the main thread sends.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    mine, _ = dist.new_subgroups_by_enumeration(members, timeout, host_backend())
    return mine


def _start(timeout_minutes: float) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if on_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend(), timeout=timeout)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # init has created it
    return world


def blocks(data_ranks: int, ranks_of_each: int) -> list[range]:
    """The data-parallel ranks of each block that shares frames: as many as have ``_RANKS_OF_BLOCK`` ranks, at least 2.

    Every rank plans for all frames of its block in each window, which takes a time proportional to its ranks. Over a
    block the loads are already even, so a larger one would only take longer (docs/measurements.md).
    """
    most = max(_RANKS_OF_BLOCK // ranks_of_each, 2)
    count = -(-data_ranks // most)
    ends = [data_ranks * n // count for n in range(count + 1)]  # blocks differ by one data-parallel rank at most
    return [range(*pair) for pair in itertools.pairwise(ends)]


def _sharing_groups(ranks: list[list[int]], timeout: datetime.timedelta) -> SharingGroups:
    """``ranks``: those of each data-parallel rank."""
    parts = [[ranks[data_rank] for data_rank in block] for block in blocks(len(ranks), len(ranks[0]))]
    whole = [sorted(itertools.chain.from_iterable(part)) for part in parts]
    together = _world()
    if len(parts) > 1:
        together, _ = dist.new_subgroups_by_enumeration(whole, timeout, backend())
    peers_of = [list(same) for part in parts for same in zip(*part, strict=True)]
    peers, _ = dist.new_subgroups_by_enumeration(peers_of, timeout, host_backend())
    mine = next(number for number, block in enumerate(whole) if dist.get_rank() in block)
    return SharingGroups(together, peers, [[whole[mine].index(rank) for rank in one] for one in parts[mine]])


def _sampling_groups(
    parallel: ParallelSizes, timeout: datetime.timedelta, without_context: SamplingGroups
) -> SamplingGroups:
    if parallel.context == 1:
        return without_context
    ranks = _ranks(parallel, "tp-pp")
    together, _ = dist.new_subgroups_by_enumeration(ranks, timeout, backend())
    host, _ = dist.new_subgroups_by_enumeration(ranks, timeout, host_backend()) if on_gpu() else (together, None)
    peers, _ = dist.new_subgroups_by_enumeration(_ranks(parallel, "cp"), timeout, host_backend())
    return SamplingGroups(together, host, ranks, peers)


def _ranks(parallel: ParallelSizes, kinds: str) -> list[list[int]]:
    """Ranks of each group over some kinds of parallelism, such as "tp-cp-pp", in the order of the data-parallel ranks.

    Megatron orders tp-cp-ep-dp-pp.
    """
    from megatron.core.parallel_state import RankGenerator

    world = dist.get_world_size()
    data = world // (parallel.tensor * parallel.context * parallel.pipeline)
    generator = RankGenerator(
        tp=parallel.tensor, ep=1, dp=data, pp=parallel.pipeline, cp=parallel.context, order="tp-cp-ep-dp-pp"
    )
    return generator.get_ranks(kinds)


def _tower_collection() -> "ProcessGroupCollection":
    """Groups of one rank for every kind of model parallelism, and all ranks for data parallelism."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    alone, _ = dist.new_subgroups(group_size=1, backend=backend())
    world = _world()
    return ProcessGroupCollection(
        tp=alone, pp=alone, cp=alone, ep=alone, expt_tp=alone, tp_ep=alone, tp_ep_pp=alone, tp_cp=alone,
        mp=alone, embd=alone, pos_embd=alone, dp=world, dp_cp=world, expt_dp=alone, intra_dist_opt=world,
    )  # fmt: skip


def shutdown() -> None:
    """Destroys Megatron's parallel state. torch.distributed stays initialised, because tests reuse it.

    Megatron keeps some of its groups. In a process that is forked later, the end of such a group would wait forever for
    threads that are not there.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for name in [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]:
        setattr(parallel_state, name, None)

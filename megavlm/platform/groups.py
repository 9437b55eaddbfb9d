"""Process groups: Megatron's own for the decoder, and the two that the tower phase adds."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavlm.platform import cpu
from megavlm.platform.device import backend, host_backend, on_gpu, seed_everything


@dataclass(frozen=True)
class Groups:
    """The process groups of a run.

    ``language`` is Megatron's collection for the decoder. ``tower`` is the collection for the replicated vision tower:
    no model parallelism inside, the whole world as its data ranks. ``model_parallel`` spans TP × CP × PP, the ranks
    that share one stream of rows and deal its frames among themselves; ``model_parallel_host`` are the same ranks on
    gloo, for metadata that must stay on the host. ``members``: the ranks of each such group, first data rank first.
    ``data_peers_host``: on gloo, the ranks with the same index in those groups, one for each data rank; None
    where nobody asked for it.
    """

    language: "ProcessGroupCollection"  # noqa: F821 (megatron.core.process_groups_config)
    tower: "ProcessGroupCollection"  # noqa: F821
    model_parallel: dist.ProcessGroup
    model_parallel_host: dist.ProcessGroup
    world_host: dist.ProcessGroup
    data_peers_host: dist.ProcessGroup | None
    members: list[list[int]]
    dp_rank: int
    dp_size: int

    @property
    def is_leader(self) -> bool:
        """The rank of its model-parallel group that reads the data."""
        return self.model_parallel.rank() == 0


def init(parallel, seed: int = 1234, timeout_minutes: float = 30.0, *, data_peers: bool = False) -> Groups:
    """Starts torch.distributed (unless it runs) and Megatron's parallel state for the layout ``parallel``.

    ``parallel`` has the fields of ``ParallelSettings``: tensor, pipeline, virtual_pipeline, context, expert,
    expert_tensor. Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT as torchrun sets them; without them
    the process is a world of one. ``timeout_minutes``: longest wait of a collective in any group. ``data_peers``:
    make that group, too.
    """
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
    ranks = _model_parallel_ranks(parallel)
    mine = next(group for group in ranks if dist.get_rank() in group)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    model_parallel, _ = dist.new_subgroups_by_enumeration(ranks, timeout, backend())
    host, _ = dist.new_subgroups_by_enumeration(ranks, timeout, host_backend()) if on_gpu() else (model_parallel, None)
    peers = None
    if data_peers:
        peers_of = [list(same) for same in zip(*ranks, strict=True)]
        peers, _ = dist.new_subgroups_by_enumeration(peers_of, timeout, host_backend())
    return Groups(
        language=language,
        tower=_tower_collection(),
        model_parallel=model_parallel,
        model_parallel_host=host,
        data_peers_host=peers,
        members=ranks,
        world_host=dist.new_group(timeout=timeout, backend=host_backend()) if on_gpu() else dist.group.WORLD,
        dp_rank=ranks.index(mine),
        dp_size=len(ranks),
    )


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


def _model_parallel_ranks(parallel) -> list[list[int]]:
    """Ranks of each TP × CP × PP group, first data rank first. Megatron's rank order is tp-cp-ep-dp-pp."""
    from megatron.core.parallel_state import RankGenerator

    world = dist.get_world_size()
    data = world // (parallel.tensor * parallel.context * parallel.pipeline)
    generator = RankGenerator(
        tp=parallel.tensor, ep=1, dp=data, pp=parallel.pipeline, cp=parallel.context, order="tp-cp-ep-dp-pp"
    )
    return generator.get_ranks("tp-cp-pp")


def _tower_collection():
    """Groups of one rank for every kind of model parallelism, the world for data parallelism."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    alone, _ = dist.new_subgroups(group_size=1, backend=backend())
    world = dist.group.WORLD
    return ProcessGroupCollection(
        tp=alone, pp=alone, cp=alone, ep=alone, expt_tp=alone, tp_ep=alone, tp_ep_pp=alone, tp_cp=alone,
        mp=alone, embd=alone, pos_embd=alone, dp=world, dp_cp=world, expt_dp=alone, intra_dist_opt=world,
    )  # fmt: skip


def shutdown() -> None:
    """Forgets Megatron's parallel state; the torch.distributed world stays (tests reuse it)."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()

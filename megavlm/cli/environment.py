"""The rank of this process in a group that torchrun or srun started, in the environment variables of torchrun."""

import os
import re

from megavlm.base.errors import UserError


def join_group() -> int | None:
    """If RANK is not set, sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from srun's variables.

    It does so only inside a job step: a batch script also has SLURM_PROCID, but it is a single process, regardless of
    SLURM_NTASKS.

    Returns:
        The number of processes in the group; None if the process does not belong to a group.

    Raises:
        UserError: RANK is set, but other variables that torchrun sets are missing.
    """
    environment = os.environ
    if "RANK" not in environment and "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
        if size == "1":
            return None
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = size
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "localhost"
        if "MASTER_ADDR" not in environment:
            environment["MASTER_ADDR"] = first_host(nodes)
        # The port must be equal on all nodes, and different for jobs and steps that share a node.
        number = int(environment.get("SLURM_JOB_ID", 0)) * 7 + int(environment["SLURM_STEP_ID"])
        environment.setdefault("MASTER_PORT", str(20000 + number % 10000))
    if "RANK" not in environment:
        return None
    needed = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UserError(
            f"the environment has RANK={environment['RANK']} but not {', '.join(missing)}",
            "start the command with torchrun, srun or --nproc, or unset RANK",
        )
    return int(environment["WORLD_SIZE"])


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: "gpu[007-012,20],x1" gives "gpu007", "rack[1-2]n[3-4]" gives "rack1n3".

    Raises:
        UserError: ``nodes`` is not such a list.
    """
    match = re.fullmatch(r"((?:[^,\[\]\s]|\[\w+[^\[\]]*\])+)(?:,.*)?", nodes)
    if match is None:
        raise UserError(
            f"SLURM's list of nodes is {nodes!r}, which cannot be read", "set MASTER_ADDR to the first node"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[1])

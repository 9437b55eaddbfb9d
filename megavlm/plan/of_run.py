"""What a run is predicted to need and to take, in OUTPUT/plan.json, written while the run goes on.

A process of its own plans: a new interpreter, which shares nothing with the trainer and sees no GPU. It has the lowest
priority and ends with the trainer.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.processes import end_with_parent
from megavlm.config.load import load_settings
from megavlm.plan.gpus import Gpu, gpu_of, gpus
from megavlm.platform import device_gib, device_name, on_gpu

FILE_NAME = "plan.json"
USUAL_GPU = "h100"
"""The GPU that is meant in a run without one."""
_LOWEST = 19
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class PlanOfRun:
    """Starts to plan the run that this process belongs to, whose config.yaml is in ``output``.

    Create it on the first rank, in the thread that lives as long as the run: the kernel ends a child when the thread
    that has started it ends.

    The file has the plan's JSON form with the run's "device", or an "error" that says in a line why there is no plan.

    Args:
        output: the run's folder.
        verb: the verb of the run.
    """

    def __init__(self, output: Path, verb: str) -> None:
        self._file = output / FILE_NAME
        facts = [verb, dist.get_world_size(), device_name() or "", device_gib() or 0.0]
        arguments = [sys.executable, "-m", __name__, str(output), str(os.getpid()), *map(str, facts)]
        environment = {key: value for key, value in os.environ.items() if key not in _RANK}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        silent = subprocess.DEVNULL
        self._process: subprocess.Popen | None = None
        try:
            self._file.unlink(missing_ok=True)  # that of an earlier start, which may have had other settings
            self._process = subprocess.Popen(arguments, env=environment, stdin=silent, stdout=silent, stderr=silent)
        except OSError as error:  # no memory or no process left: the run matters more
            self._refused = f"no process could be started for it: {error.strerror}"

    def close(self, patience: float) -> str | None:
        """Waits for the plan, for ``patience`` seconds at most; returns a line that says why there is none, if so."""
        if self._process is None:
            return self._refused
        try:
            status = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "the run ended before it was planned"
        try:
            return parse_json(self._file.read_text(encoding="utf-8")).get("error")
        except (OSError, ValueError):
            return f"the process that planned it ended with status {status}"


def is_wanted(setting: bool | None) -> bool:
    """Whether a run with this ``log.plan`` is planned."""
    return on_gpu() if setting is None else setting


def plan_of_run(output: Path, verb: str, world_size: int, device: tuple[str, float] | None) -> dict[str, Any]:
    """Plans the run in ``output``.

    Args:
        output: the run's folder.
        verb: the verb of the run.
        world_size: its number of processes.
        device: what CUDA calls its GPUs, and their memory in GiB; None on a CPU.

    Returns:
        What the file contains.

    Raises:
        UserError: the planner does not know the GPU, or cannot plan such a run.
    """
    from megavlm.convert.hf_shapes import model_shapes  # these import Megatron, for many seconds
    from megavlm.plan.as_json import plan_json
    from megavlm.plan.mix import contents_of
    from megavlm.plan.plan import make_plan

    settings = load_settings(output / "config.yaml")
    gpu = gpu_of(USUAL_GPU) if device is None else gpu_called(*device)
    shapes = model_shapes(settings.model)
    plan = make_plan(settings, shapes, verb, world_size, gpu, mix=contents_of(settings, shapes, verb))
    return plan_json(plan) | {"device": device[0] if device is not None else None}


def gpu_called(device_name: str, memory_gib: float) -> Gpu:
    """The GPU that CUDA calls ``device_name``, such as "NVIDIA H100 80GB HBM3", with the memory that it really has.

    Raises:
        UserError: no GPU is known by this name.
    """
    words = device_name.upper().replace("-", " ").split()
    for name, gpu in gpus().items():
        if name.upper() in words:
            return replace(gpu, memory_gib=memory_gib)
    raise UserError(f"the planner does not know the GPU {device_name}", f"it knows {', '.join(gpus())}")


def main() -> None:
    """The process: see the arguments that ``PlanOfRun`` gives it."""
    folder, trainer, verb, world_size, device, memory = sys.argv[1:]
    end_with_parent(int(trainer))
    os.nice(_LOWEST)
    try:
        found = plan_of_run(Path(folder), verb, int(world_size), (device, float(memory)) if device else None)
    except UserError as error:
        found = {"error": error.message}
    except Exception as error:  # whatever it is, it is told, and the run goes on
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    write_text(Path(folder) / FILE_NAME, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

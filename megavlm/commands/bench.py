"""`megavlm bench`: steps of a configuration on this machine, as one line of JSON, and times of single operators."""

import json
from pathlib import Path

import torch.distributed as dist

from megavlm.base.errors import UserError
from megavlm.bench.bench import at_full_size, check, leave, measure
from megavlm.bench.bench_report import planned_memory, report
from megavlm.bench.measured_gpu import measured_gpu
from megavlm.commands.plan_words import verb_of
from megavlm.config.settings import Settings
from megavlm.convert.hf_shapes import model_shapes
from megavlm.plan.gpus import write_gpu
from megavlm.plan.mix import contents_of


def main(
    settings: Settings,
    steps: int = 10,
    warmup: int = 3,
    verb: str | None = None,
    synthetic: bool = False,
    samples: int = 1,
    pictures: int | None = None,
    operators: Path | None = None,
) -> int:
    """Measures steps, and prints on rank 0 what they took and what memory is planned for them.

    Args:
        settings: the settings of the configuration.
        steps, warmup: number of measured steps, and of steps before them.
        verb: the verb for which the configuration is intended; default: a guess from the settings.
        synthetic: take random weights and synthetic rows instead of ``model.load`` and ``data.train``.
        samples, pictures: what each synthetic row contains (``megavlm.plan.mix.Mix.of``).
        operators: a new file for the times of single operators, which ``megavlm plan --gpu`` reads.

    Raises:
        UserError: the settings do not fit the model, the verb or the processes, the data cannot be read, or
            ``operators`` exists.
    """
    if operators is not None and operators.exists():
        raise UserError(f"--operators {operators} exists already", "move it away, or give another file")
    verb, synthetic_rows = verb or verb_of(settings), synthetic or not settings.data.train
    check(settings, verb, synthetic=synthetic_rows)
    full = at_full_size(settings, synthetic=synthetic)
    mix = contents_of(full, model_shapes(full.model), verb, samples=samples, pictures=pictures)
    found = measure(full, verb, mix if synthetic_rows else None, steps, warmup)
    session, world_size, rows = found.session, dist.get_world_size(), found.rows
    line = report(settings, verb, found)
    line |= {"rows": str(mix) if synthetic_rows else "data.train", "weights": str(full.model.start or "random")}
    is_first, measured = session.is_first, session.settings
    leave(session)
    del session, found  # their memory is wanted for what follows
    if operators is not None:
        gpu = measured_gpu(measured, verb, mix, world_size)
        if is_first:
            write_gpu(operators, gpu)
    if is_first:
        if rows:
            line["memory"]["planned"] = planned_memory(measured, verb, world_size, rows)
        print(json.dumps(line))
    return 0
